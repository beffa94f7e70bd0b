"""Tool calls that must come, and arguments that must fit, of a model that has never seen a tool."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema
import pytest

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.server import create_app
from asyncengine.server.call_layout import call_layout
from tests.server.serving import MODEL, USER, chat, error, events, listening, served
from tests.server.tooling import TOOL, call, marked, think, tool_checkpoint, tool_engine

pytestmark = [pytest.mark.loops("either"), pytest.mark.usefixtures("one_torch_thread")]
URL = "/v1/chat/completions"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Paris", "Rome", "Bern"]}},
}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
STRICT = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
SCHEMA: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "mood",
        "schema": {"properties": {"mood": {"enum": ["good", "bad"]}}, "required": ["mood"]},
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}


def tooled(path: Any) -> AsyncEngine:
    return AsyncEngine(EngineConfig(str(path), mode="local"))


def arguments(made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(made["function"]["arguments"])
    return found


async def test_a_call_that_must_come_comes_and_fits_on_every_route() -> None:
    with tool_checkpoint() as path:
        async with served(tooled(path)) as client:
            body = {"messages": USER, "tools": [TOOL, WEATHER], "n": 8, "seed": 1, "max_tokens": 120, "temperature": 1}
            for choice in (NAMED, "required"):
                asked = body | {"tool_choice": choice, "parallel_tool_calls": False}
                found = (await client.post(URL, json=asked)).json()["choices"]
                calls = [branch["message"]["tool_calls"][0]["function"]["arguments"] for branch in found]
                assert len(set(calls)) > 1, "one call only: the test would notice little"
                for branch in found:
                    assert branch["finish_reason"] == "tool_calls" and branch["message"]["content"] is None
                    [made] = branch["message"]["tool_calls"]
                    if made["function"]["name"] == "weather":
                        jsonschema.validate(arguments(made), PARAMETERS)
                    else:
                        assert choice == "required" and made["function"]["name"] == "add"
            chunks = events((await client.post(URL, json=body | {"tool_choice": NAMED, "stream": True, "n": 1})).text)
            deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
            [made] = [made for delta in deltas for made in delta.get("tool_calls", [])]
            jsonschema.validate(arguments(made), PARAMETERS)
            assert not "".join(delta.get("content") or "" for delta in deltas)

            free = (await client.post(URL, json=body | {"tools": [STRICT], "n": 1, "temperature": 0})).json()
            assert free["choices"][0]["message"]["content"], "a strict tool does not force a call"

            function = {"type": "function", **WEATHER["function"]}
            response: dict[str, Any] = {"input": "hi", "tools": [function], "max_output_tokens": 120}
            for choice in ("required", {"type": "function", "name": "weather"}):
                body = response | {"tool_choice": choice, "parallel_tool_calls": False}
                [item] = (await client.post("/v1/responses", json=body)).json()["output"]
                jsonschema.validate(json.loads(item["arguments"]), PARAMETERS)
            named = [{"name": "weather", "input_schema": PARAMETERS}]
            anthropic = {"messages": USER, "max_tokens": 120, "tools": named}
            for kind in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}):
                found = (await client.post("/v1/messages", json=anthropic | {"tool_choice": kind})).json()
                [block] = found["content"]
                assert found["stop_reason"] == "tool_use"
                jsonschema.validate(block["input"], PARAMETERS)


async def test_openai_parses_the_arguments_of_a_strict_tool() -> None:
    openai, pydantic = pytest.importorskip("openai"), pytest.importorskip("pydantic")

    class Weather(pydantic.BaseModel):  # type: ignore[name-defined, misc]
        city: Literal["Paris", "Rome"]
        days: int = pydantic.Field(ge=1, le=9)

    engine = tool_engine(call("Weather", city="Rome", days=2), ends=False)
    async with engine, listening(create_app(engine)) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", _strict_response_validation=True) as client:
            for choice in ("auto", "required", {"type": "function", "function": {"name": "Weather"}}):
                found = await client.chat.completions.parse(
                    model=MODEL, messages=USER, tools=[openai.pydantic_function_tool(Weather)], tool_choice=choice
                )
                [made] = found.choices[0].message.tool_calls
                assert made.function.parsed_arguments == Weather(city="Rome", days=2)


@pytest.mark.parametrize(
    ("answer", "changes", "kept"),
    [
        (call("weather", city="Rome", days=2), {}, True),
        ("Hm. " + call("weather", city="Rome", days=2), {}, True),
        (call("weather", city="Oslo", days=2), {}, False),
        (call("add", a="x"), {}, True),  # not strict
        (call("add", a="x"), {"tool_choice": "required"}, False),
        ("No.", {}, True),
        (think("hm") + call("weather", city="Rome", days=2), {"tool_choice": "required"}, True),
        (call("add", a=1), {"tool_choice": NAMED}, False),
        (call("weather", city="Rome", days=2) * 2, {}, True),
        (call("weather", city="Rome", days=2) * 2, {"parallel_tool_calls": False}, True),
    ],
    ids=str,
)
async def test_only_what_fits_can_be_said(answer: str, changes: dict[str, Any], kept: bool) -> None:
    """A script that leaves the grammar ends its request: what the grammar allows is what comes through."""
    async with served(tool_engine(answer, ends=False)) as client:
        body = chat(tools=[TOOL, STRICT], **changes)
        response = await client.post(URL, json=body)
        assert response.is_success is kept, response.text
        if kept:
            message = response.json()["choices"][0]["message"]
            single = changes.get("parallel_tool_calls") is False
            assert len(message.get("tool_calls") or []) == (1 if single else answer.count("<tool_call>"))
        else:
            assert error(response)["code"] == "request_dropped"


async def test_what_cannot_be_forced_is_a_400_by_name() -> None:
    unreadable = {"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}, "strict": True}}
    odd = {"type": "function", "function": {"name": 'a"b', "strict": True}}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tools": [TOOL], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [unreadable]}, "tools"),
        ({"tools": [odd]}, "tools[0].function.name"),
        ({"tools": [TOOL], "response_format": {"type": "regex", "regex": "a"}}, "response_format"),
        ({"tools": [TOOL], "response_format": SCHEMA | {"json_schema": {"schema": {"type": "no"}}}}, "response_format"),
    ]
    async with served(tool_engine("Hi")) as client:
        for fields, param in wrong:
            for stream in (False, True):
                refused = await client.post(URL, json=chat(stream=stream, **fields))
                assert refused.status_code == 400 and error(refused)["param"] == param, refused.text


@pytest.mark.parametrize(
    ("field", "value"),
    [("open", "[TOOL]"), ("close", "[END]"), ("transform", {"type": "function", "function": {"name": "same"}})],
)
async def test_a_model_whose_calls_cannot_be_told_says_so(field: str, value: Any) -> None:
    async with served(tool_engine("Hi", tokenizer=marked(**{field: value}))) as client:
        forced = await client.post(URL, json=chat(tools=[TOOL], tool_choice="required"))
        assert forced.status_code == 400 and error(forced)["param"] == "tool_choice"
        strict = await client.post(URL, json=chat(tools=[TOOL, STRICT]))
        assert strict.status_code == 400 and error(strict)["param"] == "tools[1].function.strict"
        beside = await client.post(URL, json=chat(tools=[TOOL], response_format=SCHEMA))
        assert beside.status_code == 400 and error(beside)["param"] == "response_format"


def test_a_layout_is_what_the_template_writes() -> None:
    layout = call_layout(marked())  # type: ignore[arg-type]
    assert layout is not None and layout.opening == "<tool_call>"
    tag = layout.tag("add", {"type": "object"})
    assert (tag.begin, tag.end) == ('<tool_call>{"name": "add", "arguments": ', "}</tool_call>")


@pytest.mark.parametrize(
    ("answer", "changes", "kept"),
    [
        ('{"mood": "good"}', {}, True),
        (call("add", a=1), {}, True),
        (call("add", a=1) * 2, {}, True),
        (call("add", a=1) * 2, {"parallel_tool_calls": False}, True),
        ("Fine, thanks.", {}, False),
        ('{"mood": "so"}', {}, False),
        (call("weather", city="Oslo", days=2), {"tools": [STRICT]}, False),
        (call("weather", city="Rome", days=2), {"tools": [STRICT]}, True),
        ('{"colour": "red"}', {"response_format": {"type": "json_object"}}, True),
        (call("add", a=1), {"tool_choice": "required"}, True),
        ('{"mood": "good"}', {"tool_choice": "required"}, False),
        ('{"mood": "good"}', {"tool_choice": "none"}, True),
    ],
)
async def test_beside_a_format_the_answer_is_calls_or_fits_it(answer: str, changes: dict[str, Any], kept: bool) -> None:
    body = chat(**({"tools": [TOOL], "response_format": SCHEMA} | changes))
    async with served(tool_engine(answer, ends=False)) as client:
        found = await client.post(URL, json=body)
        if not kept:
            assert error(found)["code"] == "request_dropped"
            return
        assert found.status_code == 200, found.text
        [branch] = found.json()["choices"]
        if answer.startswith("{"):
            assert branch["message"]["content"] == answer and branch["finish_reason"] == "stop"
        else:
            single = changes.get("parallel_tool_calls") is False
            assert len(branch["message"]["tool_calls"]) == (1 if single else answer.count("<tool_call>"))
            assert branch["finish_reason"] == "tool_calls" and branch["message"]["content"] is None


async def test_beside_a_format_a_model_that_has_seen_neither_keeps_to_one_of_them() -> None:
    with tool_checkpoint() as path:
        async with served(tooled(path)) as client:
            body = {"messages": USER, "tools": [WEATHER], "response_format": SCHEMA, "n": 8, "seed": 1}
            for choice in (await client.post(URL, json=body | {"max_tokens": 120, "temperature": 1})).json()["choices"]:
                message = choice["message"]
                if message.get("tool_calls"):
                    assert all(made["function"]["name"] == "weather" for made in message["tool_calls"])
                else:
                    jsonschema.validate(json.loads(message["content"]), SCHEMA["json_schema"]["schema"])
