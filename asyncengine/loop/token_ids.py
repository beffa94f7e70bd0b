"""A loaded model's tokenizer, and the token ids that the model takes. On any thread; functions."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from asyncengine.errors import InvalidRequestError
from asyncengine.step.batch import Int32
from asyncengine.step.model import ModelView
from asyncengine.tokenizer import Tokenizer

T = TypeVar("T")


def tokenizer_of(view: ModelView, otherwise: str) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        InvalidRequestError: It has none; the message says what to do.
    """
    if view.tokenizer is None:
        raise InvalidRequestError(f"{view.config.model!r} has no tokenizer; {otherwise}")
    return view.tokenizer


def typed(function: Callable[[], T]) -> T:
    """Whatever a tokenizer or template raises, it is the input that it did not like."""
    try:
        return function()
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(f"the prompt cannot be encoded: {error}") from error


def encode_piece(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text without special tokens around it, if the tokenizer can tell."""
    encode = getattr(tokenizer, "encode_piece", tokenizer.encode)
    found: list[int] = encode(text)
    return found


def token_ids_of(ids: Iterable[int], view: ModelView) -> Int32:
    """Token ids as an array; raises InvalidRequestError if there are none, or some are not in the vocabulary."""
    values = list(ids)
    if set(map(type, values)) - {int}:
        values = [_index(token_id, view) for token_id in values]
    if not values:
        raise InvalidRequestError("the prompt is empty; allowed: at least one token")
    low, high = min(values), max(values)
    if low < 0 or high >= view.vocab_size:
        raise InvalidRequestError(
            f"the prompt has token id {low if low < 0 else high}; allowed: 0..{view.vocab_size - 1} "
            f"(vocabulary of {view.vocab_size})"
        )
    return np.array(values, dtype=np.int32)


def _index(token_id: object, view: ModelView) -> int:
    if not isinstance(token_id, bool):
        with contextlib.suppress(TypeError):
            return operator.index(token_id)  # type: ignore[arg-type]
    raise InvalidRequestError(
        f"the prompt is not a list of token ids: it has {token_id!r:.40}; allowed: integers in 0..{view.vocab_size - 1}"
    )
