"""How Whisper is asked to transcribe (Radford et al., 2022), and how its answer is read. On worker threads.

Its decoder's tokens begin with ``<|startoftranscript|>``, the language, the task, and whether it writes no times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

from transformers import GenerationConfig as TransformersGenerationConfig
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from asyncengine.detokenizer import TextStream
from asyncengine.errors import InvalidRequestError, UnsupportedModelError
from asyncengine.generation import GenerationConfig
from asyncengine.logits_processor import LogitsProcessor
from asyncengine.media import AudioSource
from asyncengine.model.media.sounds import Samples, blocks_of
from asyncengine.model.speech.alignment import token_ends
from asyncengine.model.speech.cutting import pieces
from asyncengine.model.speech.rules import Rules
from asyncengine.model.speech.words import Spelling, SpokenToken, words_of
from asyncengine.outputs import TranscriptSegment, TranscriptWord
from asyncengine.tokenizer import WritingTokenizer
from asyncengine.transcription import (
    Alignment,
    AnswerReader,
    AudioPiece,
    LanguageQuestion,
    Quality,
    TranscriptionPrompt,
)

_START, _NO_TIMES, _BEFORE = "<|startoftranscript|>", "<|notimestamps|>", "<|startofprev|>"
_NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")
"""Names of the token that says so, by age of the tokenizer."""
_MULTILINGUAL_VOCABULARY = 51865
"""From so many tokens on, a published model knows other languages than English, where nothing else is said."""
_SEEK = 100
"""In a second, of what `TranscriptSegment.seek` counts: frames of openai-whisper's features."""
_FEATURES = 2
"""Of the features of a sound, for each frame of the encoder's output."""
_SHORTEST = 0.001
"""Seconds of a segment: subtitles know no shorter ones."""
_MOST_OF_HINT = 2
"""A hint may take one of so many parts of the tokens that the decoder has room for."""


@dataclass(frozen=True, slots=True)
class Hearing:
    """How a model hears.

    Attributes:
        rate: Samples in a second.
        samples: Most of them that it hears at once.
        seconds: How long a frame of its encoder's output is.
        filter_width: Frames that are filtered together where it is found out when words are said.
        no_words: Why that cannot be found out, in words; empty if it can.
    """

    rate: int
    samples: int
    seconds: float
    filter_width: int
    no_words: str


class WhisperTranscription:
    """As `asyncengine.transcription.Transcribing`.

    Args:
        tokenizer: The model's.
        generation: What its checkpoint says of generating.
        hearing: How it hears.
        vocab_size: How many tokens it knows.
        longest: How many tokens its decoder has room for.

    Raises:
        UnsupportedModelError: The tokenizer is not one of Whisper's.
    """

    def __init__(
        self,
        tokenizer: WritingTokenizer,
        generation: TransformersGenerationConfig,
        hearing: Hearing,
        vocab_size: int,
        longest: int,
    ) -> None:
        self._tokenizer, self._hearing, self._longest = tokenizer, hearing, longest
        self._end = self._token("<|endoftext|>")
        self._spelling = Spelling(tokenizer, self._end)
        self._rules = Rules(generation, self._token(_NO_TIMES), self._end, vocab_size)
        frames = round(hearing.samples / hearing.rate / hearing.seconds)
        self._times = range(self._rules.first_time, self._rules.first_time + frames + 1)
        stated = getattr(generation, "lang_to_id", None) or LANGUAGES
        codes = {code: f"<|{code}|>" for code in (mark.removeprefix("<|").removesuffix("|>") for mark in stated)}
        found = {code: self._find(mark) for code, mark in codes.items()}
        known = {code: token for code, token in found.items() if token is not None and token < vocab_size}
        told = getattr(generation, "is_multilingual", None)
        if told is None:
            told = hasattr(generation, "lang_to_id") or vocab_size >= _MULTILINGUAL_VOCABULARY
        self._languages = known if told else {}
        silent = [token for mark in _NO_SPEECH if (token := self._find(mark)) is not None and token < vocab_size]
        self.no_speech = (self._token(_START), silent[0]) if silent else None
        self.question: LanguageQuestion | None = None
        if self._languages:
            self.question = LanguageQuestion(_START, {token: code for code, token in self._languages.items()})

    def _find(self, mark: str) -> int | None:
        ids = self._tokenizer.encode_piece(mark)
        return ids[0] if len(ids) == 1 else None

    def _is_text(self, token: int) -> bool:
        """Whether it is said. Tokens that a finetuned model knows besides have ids behind those of times."""
        return token < self._end or token >= self._times.stop

    def _token(self, mark: str) -> int:
        found = self._find(mark)
        if found is None:
            raise UnsupportedModelError(f"its tokenizer has no token {mark}, as Whisper's have")
        return found

    def pieces(self, audio: AudioSource) -> Iterator[AudioPiece]:
        """As the protocol says."""
        rate = self._hearing.rate

        def piece(found: tuple[int, Samples]) -> AudioPiece:
            start, samples = found
            return AudioPiece((samples, rate), start / rate, (start + len(samples)) / rate)

        try:  # which keeps none of them while the next is awaited
            yield from map(piece, pieces(blocks_of(audio, rate), self._hearing.samples, rate))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"audio[0]: {error}") from error

    def request(self, asked: TranscriptionPrompt) -> str:
        """As the protocol says."""
        if asked.words and self._hearing.no_words:
            raise InvalidRequestError(
                f"timestamps is 'word'; the model knows no times of words: {self._hearing.no_words}"
            )
        hint = "" if asked.hint is None or not asked.hint.strip() else self._hint(asked.hint)
        marks = [_START]
        known = self._languages or {"en": 0}
        code = next(iter(known)) if asked.language is None else self.code(asked.language)
        if code not in known:
            codes = ", ".join(sorted(self._languages)) or "English alone"
            raise InvalidRequestError(f"language is {asked.language!r:.80}; the model knows {codes}")
        if self._languages:
            marks += [f"<|{code}|>", f"<|{asked.task}|>"]
        elif asked.task != "transcribe":
            raise InvalidRequestError(f"task is {asked.task!r}; the model knows English alone")
        return hint + "".join(marks if asked.timestamps else [*marks, _NO_TIMES])

    def _hint(self, hint: str) -> str:
        text = f" {hint.strip()}"
        ids = self._tokenizer.encode_piece(text)
        if not all(map(self._is_text, ids)):
            raise InvalidRequestError(f"hint is {hint!r:.80}, which has marks of the model's in it")
        if len(ids) >= (most := self._longest // _MOST_OF_HINT):
            raise InvalidRequestError(f"hint has {len(ids)} tokens; allowed: up to {most - 1}")
        return _BEFORE + text

    def code(self, language: str) -> str:
        """As the protocol says."""
        name = language.strip().lower().removeprefix("<|").removesuffix("|>")
        return str(TO_LANGUAGE_CODE.get(name, name))

    def settings(self, config: GenerationConfig, asked: TranscriptionPrompt) -> GenerationConfig:
        """As the protocol says; greedy where nothing is said. Log-probabilities are those that openai-whisper looks at,
        of what may be said; of a beam search, those that it adds up. What is said is read off the tokens.
        """
        assert isinstance(config.logits_processors, tuple)
        temperature = 0.0 if config.temperature is None else config.temperature
        rules: LogitsProcessor = self._rules.with_times if asked.timestamps else self._rules.without_times
        return config.replace(
            temperature=temperature,
            logits_processors=(rules, *config.logits_processors),
            logprobs=config.logprobs or bool(asked.timestamps),
            logprobs_mode="masked" if config.num_beams == 1 else "raw",
            detokenize=False,
        )

    def reader(self, stop_strs: tuple[str, ...]) -> AnswerReader:
        """As the protocol says."""
        return _WithoutTimes(TextStream(self._tokenizer, stop_strs), self._times)

    def to_align(self, token_ids: Sequence[int], piece: AudioPiece) -> tuple[int, int]:
        """As the protocol says: all tokens but the last, behind which nothing was asked, as in transformers."""
        assert piece.end is not None
        hearing = self._hearing
        samples, step = round((piece.end - piece.start) * hearing.rate), hearing.seconds * hearing.rate / _FEATURES
        frames = max(1, math.ceil(samples / round(step)) // _FEATURES)
        return (len(token_ids) - 1, frames) if any(map(self._is_text, token_ids)) else (0, 0)

    def segments(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None,
        piece: AudioPiece,
        quality: Quality,
        alignment: Alignment | None = None,
    ) -> list[TranscriptSegment]:
        """As the protocol says: what stands between two times, and what stands behind the last up to the end. A word
        does not reach from one into the next.

        What begins where the piece has ended, as said in the silence that the model hears behind it, takes the time
        since what was said before, or belongs to that.
        """
        assert piece.end is not None
        found: list[TranscriptSegment] = []
        spoken = [] if alignment is None else self._spoken(token_ids, logprobs, piece, alignment)

        def words() -> tuple[TranscriptWord, ...]:
            if alignment is None:
                return ()
            return words_of([spoken[place] for place in said], self._spelling, alignment.language)

        start, first, begin = piece.start, 0, 0  # its time, its first token behind that, and with that
        for place, token in enumerate([*token_ids, self._times[-1]]):
            if token not in self._times:
                continue
            time = min(piece.start + (token - self._times.start) * self._hearing.seconds, piece.end)
            said = [place for place in range(first, place) if self._is_text(token_ids[place])]
            text = self._tokenizer.decode([token_ids[place] for place in said], skip_special_tokens=True).strip()
            if not text:
                start, first, begin = time, place + 1, place
                continue
            segment = TranscriptSegment(
                start,
                time,
                text,
                tuple(token for token in token_ids[begin : place + 1] if token != self._end),
                None if logprobs is None else fmean(logprobs[place] for place in said),
                seek=round(piece.start * _SEEK),
                words=words(),
                **asdict(quality),
            )
            _add(found, segment, piece.start)
            start, first, begin = time, place + 1, place + 1
        return found

    def _spoken(
        self, token_ids: Sequence[int], logprobs: Sequence[float] | None, piece: AudioPiece, alignment: Alignment
    ) -> list[SpokenToken]:
        """All tokens of an answer. Behind the last nothing was looked at: it ends where the one before it does."""
        assert piece.end is not None
        frames = [0]
        if alignment.attention:
            frames = token_ends(alignment.attention, self._hearing.filter_width).tolist()
        ends = [min(piece.start + frame * self._hearing.seconds, piece.end) for frame in (*frames, frames[-1])]
        listed = [None] * len(token_ids) if logprobs is None else logprobs
        return list(map(SpokenToken, token_ids, (piece.start, *ends), ends, listed))


class _WithoutTimes:
    """As `AnswerReader`: a text of which the times are left out."""

    def __init__(self, text: TextStream, times: range) -> None:
        self._text, self._times = text, times

    def push(self, text: str, token_ids: Sequence[int]) -> str:
        """As the protocol says."""
        return self._text.push([token for token in token_ids if token not in self._times])

    def flush(self) -> str:
        """As the protocol says."""
        return self._text.flush()


def _add(found: list[TranscriptSegment], segment: TranscriptSegment, earliest: float) -> None:
    """Adds a segment that has a length, or gets one.

    Args:
        found: Those before it in its piece.
        segment: It.
        earliest: Where the piece begins.
    """
    if segment.end - segment.start >= _SHORTEST:
        found.append(segment)
        return
    earliest = found[-1].end if found else earliest
    if segment.end - earliest >= _SHORTEST:
        found.append(replace(segment, start=earliest))
    elif found:
        before = found.pop()
        found.append(
            replace(
                before,
                text=f"{before.text} {segment.text}",
                token_ids=(*before.token_ids, *segment.token_ids),
                words=(*before.words, *segment.words),
            )
        )
