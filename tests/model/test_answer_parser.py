"""What the parser of answers tells beyond transformers' own, whose private methods it stands on."""

from __future__ import annotations

from asyncengine.model.answer_parser import AnswerParser, Event
from tests.server.tooling import RESPONSE_TEMPLATE, call, think


def events_of(text: str, prefix: str = "") -> list[Event]:
    parser = AnswerParser(RESPONSE_TEMPLATE, prefix, [])
    return parser.feed(text) + parser.finalize()[1]


def closed(text: str) -> list[tuple[str, object]]:
    return [(event["field"], event["raw"]) for event in events_of(text) if event["type"] == "region_close"]


def test_a_region_that_closes_tells_all_that_was_written() -> None:
    text = think("hm"), "a ", call("f"), call("g"), " b"
    names = ("reasoning_content", "content", "tool_calls", "tool_calls", "content")
    assert closed("".join(text)) == list(zip(names, text, strict=True))


def test_a_region_that_opens_tells_its_mark() -> None:
    opened = [event for event in events_of(think("hm") + call("f")) if event["type"] == "region_open"]
    assert [event["raw"] for event in opened] == ["<think>", "<tool_call>"]


def test_what_cannot_be_read_has_no_value_and_the_rest_is_read() -> None:
    texts = ["<tool_call>{bad</tool_call>", call("f"), "<tool_call>{cut"]
    values = [event["value"] for event in events_of("".join(texts)) if event["type"] == "region_close"]
    assert values == [None, {"type": "function", "function": {"name": "f", "arguments": {}}}, None]
    assert [raw for _, raw in closed("".join(texts))] == texts


def test_required_fields_may_be_missing() -> None:
    fields = {name: {**field, "optional": False} for name, field in RESPONSE_TEMPLATE["fields"].items()}
    message, events = AnswerParser({**RESPONSE_TEMPLATE, "fields": fields}, "", []).finalize()
    assert (message, events) == ({"role": "assistant"}, [])
