"""Taking answers apart, with transformers' parser over a template like those that models ship."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine.server.turn import Piece, Reasoning, Text, ToolCall, Turn
from tests.server.tooling import RESPONSE_TEMPLATE, call, think

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def parser(prefix: str = "") -> Any:
    from transformers.utils.chat_parsing import ResponseParser

    return ResponseParser(RESPONSE_TEMPLATE, prefix=prefix, tools=TOOLS)


def said(turn: Turn, deltas: list[str]) -> list[Piece]:
    return [piece for delta in deltas for piece in turn.push(delta)] + turn.finish()


def joined(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, Any]]]:
    return (
        "".join(piece.text for piece in pieces if isinstance(piece, Text)),
        "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)),
        [(piece.name, json.loads(piece.arguments)) for piece in pieces if isinstance(piece, ToolCall)],
    )


def test_without_a_parser_everything_is_content() -> None:
    assert said(Turn(), ["<think>", "", "a"]) == [Text("<think>"), Text("a")]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_however_an_answer_is_cut_it_says_the_same(data: st.DataObject) -> None:
    text = think("hm, ä") + "Let me add." + call("add", a=2, b=[1, {"c": "}"}]) + call("add", a=3)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    deltas = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    turn = Turn(parser())
    assert joined(said(turn, deltas)) == (
        "Let me add.",
        "hm, ä",
        [("add", {"a": 2, "b": [1, {"c": "}"}]}), ("add", {"a": 3})],
    )
    assert turn.calls == 2


def test_calls_are_numbered_and_named() -> None:
    first, second = (p for p in said(Turn(parser()), [call("f") + call("g", x="ü")]) if isinstance(p, ToolCall))
    assert (first.index, second.index) == (0, 1) and first.call_id != second.call_id
    assert second.arguments == '{"x": "ü"}'


def test_only_the_first_call_is_delivered_where_one_is_wanted() -> None:
    turn = Turn(parser(), parallel=False)
    assert joined(said(turn, [call("f") + call("g")]))[2] == [("f", {})]
    assert turn.calls == 1


def test_what_the_template_has_begun_counts_as_begun() -> None:
    turn = Turn(parser("<|user|>hi<|assistant|><think>"))
    assert joined(said(turn, ["hm", "</think>", "yes"])) == ("yes", "hm", [])


@pytest.mark.parametrize("text", ["<tool_call>{not json}</tool_call>", "<tool_call>[1]</tool_call>"])
def test_a_call_that_cannot_be_read_is_content(text: str) -> None:
    content, _, calls = joined(said(Turn(parser()), ["before ", text, " after"]))
    assert calls == [] and content == f"before {text} after"


def test_a_call_that_is_cut_off_is_content() -> None:
    content, _, calls = joined(said(Turn(parser()), ["a", '<tool_call>{"name": "f"', ', "argu']))
    assert calls == [] and content.startswith("a") and content.endswith('{"name": "f", "argu')
