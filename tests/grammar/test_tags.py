"""Structural tags: how many of them there are, and what may be around them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from asyncengine import tiny
from asyncengine.grammar.select import make_backend
from asyncengine.model.tokenizer import load_tokenizer
from asyncengine.response_format import StructuralTag, StructuralTags
from asyncengine.tokenizer import Tokenizer

END = 2


@cache
def tokenizer() -> Tokenizer:
    found = load_tokenizer(tiny.PATH)
    assert found is not None
    return found


@cache
def backend() -> Any:
    return make_backend("llguidance", tokenizer(), 1024, (END,))


def may_be_all(wanted: StructuralTags, text: str) -> bool:
    """Whether a text can be written and end there."""
    matcher = backend().compile(wanted).matcher()
    for token_id in [*tokenizer().encode(text)[1:], END]:
        if matcher.finished:
            return token_id == END
        row = np.zeros(32, dtype=np.int32)
        matcher.fill(row)
        if not row[token_id // 32] >> (token_id % 32) & 1:
            return False
        if token_id != END:
            matcher.accept(token_id)
    return True


@pytest.mark.parametrize("begin", ["<n>", "<|user|>"])
@pytest.mark.parametrize("free_text", [True, False])
@pytest.mark.parametrize("at_least_one", [True, False])
@pytest.mark.parametrize("stop_after_first", [True, False])
def test_how_many_there_are_and_what_is_around_them(
    begin: str, free_text: bool, at_least_one: bool, stop_after_first: bool
) -> None:
    wanted = StructuralTags(
        [StructuralTag(begin, {"enum": [1, 2]}, ".")],
        free_text=free_text,
        at_least_one=at_least_one,
        stop_after_first=stop_after_first,
    )
    piece = f"{begin}1."
    assert may_be_all(wanted, piece)
    assert not may_be_all(wanted, f"{begin}3.") and not may_be_all(wanted, begin)
    assert may_be_all(wanted, f"{piece}{begin}2.") is not stop_after_first
    assert may_be_all(wanted, f"so {piece}") is free_text
    assert may_be_all(wanted, f"{piece} so") is (free_text and not stop_after_first)
    assert may_be_all(wanted, "so") is (free_text and not at_least_one)
    assert may_be_all(wanted, "") is not at_least_one
