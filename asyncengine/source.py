"""Texts that a model writes another text of, and how they are read: values that any thread may have. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from asyncengine.errors import InvalidRequestError
from asyncengine.logits_processor import LogitsProcessor
from asyncengine.media import ReadPrompt


@dataclass(frozen=True, slots=True)
class SourcePrompt:
    """A prompt for a model that writes one text of another, with more to say of it than the text.

    Attributes:
        source: The text, as a string or as the token ids that the model's tokenizer makes of it: with its language and
            its end.
        decoder: What the answer begins with, behind what the model begins every answer with; a string or token ids.
        src_lang: The source's language, by a code of the model's tokenizer; None is the tokenizer's own. Token ids have
            it among them.
        tgt_lang: The answer's language; None leaves it to what the checkpoint says.
    """

    source: str | Iterable[int]
    decoder: str | Iterable[int] = ""
    src_lang: str | None = None
    tgt_lang: str | None = None

    def __post_init__(self) -> None:
        for name in ("source", "decoder"):
            given = getattr(self, name)
            if isinstance(given, str):
                continue
            if isinstance(given, (bytes, bytearray, Mapping)) or not isinstance(given, Iterable):
                raise InvalidRequestError(f"{name} is {given!r:.80}; expected a string or token ids")
            object.__setattr__(self, name, tuple(given))
        if not self.source:
            raise InvalidRequestError(f"source is {self.source!r}; allowed: at least one token")
        for name in ("src_lang", "tgt_lang"):
            language = getattr(self, name)
            if language is not None and (not isinstance(language, str) or not language):
                raise InvalidRequestError(f"{name} is {language!r:.80}; expected the code of a language, or None")
        if self.src_lang is not None and not isinstance(self.source, str):
            raise InvalidRequestError(
                f"src_lang is {self.src_lang!r:.80} and the source is token ids, which have their language among them"
            )

    @property
    def size(self) -> int:
        """Characters or tokens in it."""
        return sum(len(each) if isinstance(each, (str, tuple)) else 0 for each in (self.source, self.decoder))


class SourceReader(Protocol):
    """Reads sources as one model needs them. May be called from several threads.

    Attributes:
        key: Equal for readers that make the same of the same source.
        written: Most tokens of the decoder, those included that it begins with.
    """

    key: str
    written: int

    def read(self, prompt: SourcePrompt) -> ReadPrompt:
        """A prompt whose first places are the source's, and behind them what the decoder begins with.

        Raises:
            ContextLengthExceededError: The source has more tokens than the model takes.
            InvalidRequestError: Something of it is wrong; the message says what.
        """
        ...

    def forced(self, decoder: Sequence[int]) -> int:
        """How many tokens of what the decoder begins with the checkpoint forces it to write: to transformers, they are
        a text's, and not the prompt's.

        Args:
            decoder: What it begins with.
        """
        ...

    def processors(self, source: Sequence[int]) -> tuple[LogitsProcessor, ...]:
        """What the checkpoint says may not be written.

        Args:
            source: Its token ids.
        """
        ...
