"""Taking answers apart, with transformers' parser over a template like those that models ship."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine.model.answer_parser import AnswerParser
from asyncengine.server.turn import Piece, Reasoning, Text, ToolCall, Turn
from tests.server.tooling import RESPONSE_TEMPLATE, call, think

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


XML = {
    "open_pattern": r"<tool_call>\s*<function=(?P<name>\w+)>",
    "close": "</tool_call>",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {"tag_pattern": r"<parameter=(?P<key>\w+)>(?P<value>.*?)</parameter>"},
    "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
}
LIST = {
    "open_pattern": r"\[(?=\w+\()",
    "close_pattern": r"(?<=\))\]",
    "content": "json",
    "transform": {"function": {"name": "f", "arguments": "{content}"}},
}


def parser(prefix: str = "", calls: dict[str, Any] | None = None) -> AnswerParser:
    fields = RESPONSE_TEMPLATE["fields"] if calls is None else RESPONSE_TEMPLATE["fields"] | {"tool_calls": calls}
    return AnswerParser({**RESPONSE_TEMPLATE, "fields": fields}, prefix, TOOLS)


def cut(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


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
    turn = Turn(parser())
    assert joined(said(turn, cut(data, text))) == (
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


@pytest.mark.parametrize(
    "written",
    [
        "{not json}",
        "[1]",
        "5",
        "",
        '{"arguments": {}}',
        '{"name": 5, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        r'{"name": "\ud800", "arguments": {}}',
        '{"name": "f", "arguments": "{bad"}',
        '{"name": "f", "arguments": ""}',
        '{"name": "f", "arguments": "[1]"}',
        '{"name": "f", "arguments": "null"}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": 5}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        r'{"name": "f", "arguments": {"a": "\ud800"}}',
        '{"name": "f", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5001,
    ],
)
def test_a_call_that_cannot_be_read_is_content_and_the_next_one_is_a_call(written: str) -> None:
    text = f"before <tool_call>{written}</tool_call>"
    assert joined(said(Turn(parser()), [text, " after"])) == (f"{text} after", "", [])
    turn = Turn(parser())
    assert joined(said(turn, [text, call("f", a=1)])) == (text, "", [("f", {"a": 1})])
    assert turn.calls == 1


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"name": "f"}', {}),
        ('{"name": "f", "arguments": null}', {}),
        ('{"name": "f", "arguments": {}}', {}),
        ('{"name": "f", "arguments": "{}"}', {}),
        (r'{"name": "f", "arguments": "{\"a\": 1}"}', {"a": 1}),
    ],
)
def test_arguments_may_be_absent_or_written_as_text(written: str, arguments: dict[str, Any]) -> None:
    assert joined(said(Turn(parser()), [f"<tool_call>{written}</tool_call>"])) == ("", "", [("f", arguments)])


@pytest.mark.parametrize("length", range(1, 30))
def test_a_call_that_is_cut_off_is_content(length: int) -> None:
    text = ("a" + call("f", b=2))[:length]
    assert joined(said(Turn(parser()), [text])) == (text, "", [])
    assert joined(said(Turn(parser()), [*text])) == (text, "", [])


PARTS = st.sampled_from([
    "a", " ", "\n", "<", "<tool", "[", "]", "{", '"', "ä",
    think("hm <tool_call>"), call("add", a="</think>"), "<tool_call>", "</tool_call>", "<tool_call>{bad</tool_call>",
    '<tool_call>{"name": "f", "arguments": "{bad"}</tool_call>', "<tool_call>[]</tool_call>", "<|end|>",
    "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter></function>\n</tool_call>", "[f()]",
])  # fmt: skip
TEMPLATES = st.sampled_from([None, XML, LIST])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(PARTS, max_size=8), TEMPLATES, st.booleans(), st.booleans())
def test_however_anything_is_cut_it_says_the_same(
    data: st.DataObject, parts: list[str], calls: dict[str, Any] | None, parallel: bool, takes_calls: bool
) -> None:
    text = "".join(parts)
    whole = joined(said(Turn(parser(calls=calls), parallel, takes_calls), [text]))
    assert joined(said(Turn(parser(calls=calls), parallel, takes_calls), cut(data, text))) == whole
    assert joined(said(Turn(parser(calls=calls), parallel, takes_calls), [*text])) == whole


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(PARTS.filter(lambda part: "think" not in part and "end" not in part), max_size=8), TEMPLATES)
def test_where_no_call_is_taken_all_of_it_is_content(
    data: st.DataObject, parts: list[str], calls: dict[str, Any] | None
) -> None:
    text = "".join(parts)
    turn = Turn(parser(calls=calls), takes_calls=False)
    assert joined(said(turn, cut(data, text))) == (text, "", [])
    assert turn.calls == 0


def test_where_no_call_is_taken_reasoning_is_told_from_content_and_nothing_waits() -> None:
    turn = Turn(parser(), takes_calls=False)
    deltas = [think("hm"), "\n", "<tool_call>", "{", "</tool_call>", "a"]
    assert [turn.push(delta) for delta in deltas] == [[Reasoning("hm")], *([Text(delta)] for delta in deltas[1:])]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (call("f") + "\n" + call("f"), ""),
        ("\n" + call("f") + "\n\n" + call("f") + "\n", ""),
        (think("hm") + "\n\n" + call("f") + call("f"), ""),
        ("a\n" + call("f") + "\nb " + call("f") + " c", "a\n\nb  c"),
        (" \n", " \n"),
        ("\n<tool_call>{bad</tool_call>", "\n<tool_call>{bad</tool_call>"),
    ],
)
def test_white_space_alone_is_no_content_beside_calls(text: str, content: str) -> None:
    for deltas in ([text], [*text]):
        turn = Turn(parser())
        assert joined(said(turn, deltas))[0] == content
        assert turn.calls == text.count('"f"')


def test_a_call_that_the_prompt_has_made_is_none_of_the_answer_s() -> None:
    turn = Turn(parser("<|assistant|>" + call("f")))
    assert said(turn, ["yes"]) == [Text("yes")] and turn.calls == 0


def test_what_a_template_requires_may_be_missing() -> None:
    fields = {name: {**field, "optional": False} for name, field in RESPONSE_TEMPLATE["fields"].items()}
    turn = Turn(AnswerParser({**RESPONSE_TEMPLATE, "fields": fields}, "", TOOLS))
    assert joined(said(turn, ["a <tool_"])) == ("a <tool_", "", [])


@pytest.mark.parametrize(
    ("prefix", "text", "wanted"),
    [
        ("Hello", " world", (" world", "", [])),
        ("Hello\n", f"\nworld{call('add', a=1)}", ("\nworld", "", [("add", {"a": 1})])),
        ("<think>Let me", " see.</think>Yes", ("Yes", " see.", [])),
        (f"<think>So.</think>{call('add', a=1)}\n", f"{call('add', a=2)}", ("", "", [("add", {"a": 2})])),
    ],
)
def test_what_the_prompt_has_begun_is_no_part_of_the_answer(prefix: str, text: str, wanted: Any) -> None:
    for deltas in ([text], list(text)):
        turn = Turn(parser(prefix))
        pieces = said(turn, deltas)
        assert joined(pieces) == wanted
        assert [piece.index for piece in pieces if isinstance(piece, ToolCall)] == list(range(len(wanted[2])))
