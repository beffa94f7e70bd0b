"""Structural tags: how many of them there are, and what may be around them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from asyncengine import InvalidRequestError, tiny
from asyncengine.grammar.select import make_backend
from asyncengine.model.tokenizer import load_tokenizer
from asyncengine.response_format import JsonObject, JsonSchema, StructuralTag, StructuralTags
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


def test_instead_of_pieces_there_may_be_json() -> None:
    tag, json = StructuralTag("<n>", {"enum": [1, 2]}, "."), JsonSchema({"type": "array", "items": {"enum": [7]}})
    wanted = StructuralTags([tag], free_text=False, otherwise=json)
    for text, may in (("<n>1.", True), ("<n>1.<n>2.", True), ("[7]", True), ("", False), ("so", False)):
        assert may_be_all(wanted, text) is may, text
    assert not may_be_all(wanted, "<n>1.[7]") and not may_be_all(wanted, "[7]<n>1.") and not may_be_all(wanted, "[8]")
    single = StructuralTags([tag], free_text=False, stop_after_first=True, otherwise=JsonObject())
    assert may_be_all(single, "{}") and may_be_all(single, "<n>1.") and not may_be_all(single, "<n>1.<n>2.")
    for wrong in ({"otherwise": json}, {"otherwise": "{}", "free_text": False}):
        with pytest.raises(InvalidRequestError, match=r"response_format\.otherwise"):
            StructuralTags([tag], **wrong)  # type: ignore[arg-type]
