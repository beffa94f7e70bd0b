"""What a grammar back end knows of the model's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The tokens of a tokenizer, in one of two ways.

    Attributes:
        special: Content of each special token to its id; no text ever matches these.
        tokenizer_json: A tokenizer as the tokenizers library writes it.
        huggingface: The same as a transformers tokenizer.
        tokens: Or each token's bytes, by id.
        added: Content of each other token that was added to the vocabulary to its id; their text is text.
    """

    special: Mapping[str, int]
    tokenizer_json: str | None = None
    huggingface: Any = None
    tokens: tuple[bytes, ...] = ()
    added: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class TokenSource(Protocol):
    """A tokenizer that can say what its tokens are."""

    def token_table(self) -> TokenTable:
        """Makes the table. May take a second for a large vocabulary."""
        ...


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        size: Token ids lie below it. May be larger than the tokenizer's own.
        end_token_ids: End a text.
    """

    table: TokenTable
    size: int
    end_token_ids: tuple[int, ...] = field(default=())
