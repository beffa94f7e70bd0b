"""Words out of the tokens of a text, as transformers puts them together, with their times. On worker threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from transformers.models.whisper.tokenization_whisper import LANGUAGES, _combine_tokens_into_words

from asyncengine.outputs import TranscriptWord
from asyncengine.tokenizer import Tokenizer


class SpokenToken(NamedTuple):
    """A token of a text that is said.

    Attributes:
        token_id: It.
        start: Seconds of the audio before it.
        end: Seconds up to its end.
        logprob: Its log-probability; None if it was not asked for.
    """

    token_id: int
    start: float
    end: float
    logprob: float | None


class Spelling:
    """A tokenizer as transformers' functions of words take it.

    Args:
        tokenizer: The model's.
        end: The token that ends a text; all others that are not text have higher ids.
    """

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end

    def decode(self, token_ids: Sequence[int], decode_with_timestamps: bool = False) -> str:
        """The text of tokens; there are no times among them."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


def words_of(tokens: Sequence[SpokenToken], spelling: Spelling, language: str | None) -> tuple[TranscriptWord, ...]:
    """Words, with punctuation beside them, as transformers and openai-whisper put them together. In languages that are
    written without spaces, each is as few tokens as come to whole characters.

    Args:
        tokens: Of a text.
        spelling: Of the model.
        language: Code of the language that is written; None is like one with spaces.
    """
    written = [token for token in tokens if spelling.decode([token.token_id])]  # special ones are not
    ids = [token.token_id for token in written]
    words, _, places = _combine_tokens_into_words(spelling, ids, LANGUAGES.get(language, "english"))
    return tuple(_word(word, [written[place] for place in own]) for word, own in zip(words, places, strict=True))


def _word(word: str, tokens: Sequence[SpokenToken]) -> TranscriptWord:
    likely = [math.exp(token.logprob) for token in tokens if token.logprob is not None]
    return TranscriptWord(word, tokens[0].start, tokens[-1].end, fmean(likely) if likely else None)
