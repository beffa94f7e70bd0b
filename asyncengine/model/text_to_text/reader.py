"""Reads the sources of prompts for a decoder that attends to them. On worker threads."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from asyncengine.errors import ContextLengthExceededError, InvalidRequestError
from asyncengine.logits_processor import LogitsProcessor
from asyncengine.media import MediaItem, PromptMedia, ReadPrompt
from asyncengine.model.encoder_decoder.parting import filled
from asyncengine.model.media.digest import digest_of
from asyncengine.model.text_to_text.languages import Languages
from asyncengine.model.text_to_text.rules import Rules
from asyncengine.model.tokenizer import encode_target
from asyncengine.source import SourcePrompt
from asyncengine.tokenizer import WritingTokenizer


@dataclass(frozen=True, slots=True)
class Beginning:
    """How a model's decoder begins, as transformers' ``generate`` has it.

    Attributes:
        start: The token that it begins with.
        forced: The token behind that, if one is forced.
    """

    start: int
    forced: int | None

    def tokens(self, languages: Languages, tgt_lang: str | None) -> list[int]:
        """With an answer in some language, if the tokenizer says that in the decoder's tokens.

        Raises:
            InvalidRequestError: It does not know the language.
        """
        if tgt_lang is None or languages.marks:
            return [self.start] if self.forced is None else [self.start, self.forced]
        language = languages.target(tgt_lang)
        return [language] if languages.starts else [self.start, language]

    def forces(self, token: int, languages: Languages) -> bool:
        """Whether a token behind the first one is there because it is forced."""
        return token == self.forced or (not languages.starts and token in languages.ids.values())


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model takes.

    Attributes:
        source: Most tokens of a source.
        written: Most tokens of its decoder.
        page_size: Tokens to a block.
        source_vocabulary: Tokens that a source may have.
        vocabulary: Tokens that the decoder has.
    """

    source: int
    written: int
    page_size: int
    source_vocabulary: int
    vocabulary: int


class TextReader:
    """As `asyncengine.source.SourceReader`.

    Args:
        key: As of the protocol.
        tokenizer: The model's.
        languages: That it knows.
        begins: How the decoder begins.
        rules: What may not be written.
        sizes: What the model takes.
    """

    def __init__(
        self,
        key: str,
        tokenizer: WritingTokenizer,
        languages: Languages,
        begins: Beginning,
        rules: Rules,
        sizes: Sizes,
    ) -> None:
        self.key, self.written = key, sizes.written
        self._tokenizer, self._languages = tokenizer, languages
        self._begins, self._rules, self._sizes = begins, rules, sizes

    def read(self, prompt: SourcePrompt) -> ReadPrompt:
        """As the protocol says."""
        sizes = self._sizes
        source, decoder = self._source(prompt), self._decoder(prompt)
        if len(source) > sizes.source:
            raise ContextLengthExceededError(
                f"the source has {len(source)} tokens; the model's encoder takes 1..{sizes.source}"
            )
        if len(decoder) >= sizes.written:
            raise ContextLengthExceededError(
                f"the answer begins with {len(decoder)} tokens; the model's decoder has room for {sizes.written}, and "
                f"so allowed are 1..{sizes.written - 1}"
            )
        inputs = {"input_ids": np.array([source], dtype=np.int64)}
        places = filled(len(source), sizes.page_size)
        start = self._begins.start
        item = MediaItem("text", digest_of("text", inputs), inputs, np.arange(places), start)
        return ReadPrompt([start] * places + decoder, PromptMedia((item,), self.key, source=len(source)))

    def forced(self, decoder: Sequence[int]) -> int:
        """As the protocol says."""
        start = self._begins.start
        return int(len(decoder) > 1 and decoder[0] == start and self._begins.forces(decoder[1], self._languages))

    def processors(self, source: Sequence[int]) -> tuple[LogitsProcessor, ...]:
        """As the protocol says."""
        return self._rules.of(source)

    def _source(self, prompt: SourcePrompt) -> list[int]:
        given, size = prompt.source, self._sizes.source_vocabulary
        if not isinstance(given, str):
            if prompt.tgt_lang is not None and self._languages.marks:
                raise InvalidRequestError(
                    f"tgt_lang is {prompt.tgt_lang!r:.80} and the source is token ids; the model is told it by a mark "
                    "in the source's text"
                )
            return _checked("source", given, size)
        if prompt.tgt_lang is not None and self._languages.marks:
            given = f"{self._languages.mark(prompt.tgt_lang)} {given}"
        if prompt.src_lang is None:
            ids = self._tokenizer.encode(given)
        else:
            before, behind = self._languages.around(prompt.src_lang)
            ids = [*before, *self._tokenizer.encode_piece(given), *behind]
        return _checked("source", ids, size)

    def _decoder(self, prompt: SourcePrompt) -> list[int]:
        begin, given = self._begins.tokens(self._languages, prompt.tgt_lang), prompt.decoder
        behind = encode_target(self._tokenizer, given) if isinstance(given, str) else given
        return begin + _checked("decoder", behind, self._sizes.vocabulary) if given else begin


def _checked(name: str, ids: Iterable[int], vocabulary: int) -> list[int]:
    found = list[int]()
    for token in ids:
        index = _index(token)
        if not 0 <= index < vocabulary:
            raise InvalidRequestError(f"{name} has {token!r:.40}; allowed: token ids in 0..{vocabulary - 1}")
        found.append(index)
    if not found:
        raise InvalidRequestError(f"{name} is empty; allowed: at least one token")
    return found


def _index(token: object) -> int:
    """A token id; -1 of what is none."""
    with contextlib.suppress(TypeError):
        return -1 if isinstance(token, bool) else operator.index(token)  # type: ignore[arg-type]
    return -1
