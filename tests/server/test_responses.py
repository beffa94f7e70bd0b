from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asyncengine.server import create_app
from tests.server.serving import MODEL, Later, echo_engine, error, listening, scripted_engine, served
from tests.server.tooling import TOOL, call, think, tool_engine

openai = Later("openai")

pytestmark = pytest.mark.loops("either")

URL = "/v1/responses"
FUNCTION = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]


@asynccontextmanager
async def strict_client(engine: Any) -> AsyncIterator[Any]:
    async with engine, listening(create_app(engine)) as url:
        options: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "-", "max_retries": 0}
        async with openai.AsyncOpenAI(**options, _strict_response_validation=True) as client:
            yield client


async def test_text_in_and_out() -> None:
    async with strict_client(scripted_engine("Hello there")) as client:
        found = await client.responses.create(model=MODEL, input="hi", instructions="Be kind.", metadata={"a": "b"})
        assert found.output_text == "Hello there" and found.status == "completed"
        assert found.usage.output_tokens == 12 and found.metadata == {"a": "b"}
        cut = await client.responses.create(model=MODEL, input="hi", max_output_tokens=2)
        assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
        assert cut.output_text == "He"


@pytest.mark.loops("each")
async def test_a_stream_has_every_event_in_order() -> None:
    async with strict_client(scripted_engine("Hello", step_seconds=0.001)) as client:
        events = [event async for event in await client.responses.create(model=MODEL, input="hi", stream=True)]
        names = [event.type.removeprefix("response.") for event in events]
        deltas = names.count("output_text.delta")
        assert names == [
            "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
            "output_text.done", "content_part.done", "output_item.done", "completed",
        ]  # fmt: skip
        assert deltas and [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Hello"
        assert events[-1].response.output_text == "Hello" and events[-1].response.usage.total_tokens > 6
        async with client.responses.stream(model=MODEL, input="hi") as stream:
            assert (await stream.get_final_response()).output_text == "Hello"


async def test_reasoning_and_function_calls_are_items_of_their_own() -> None:
    async with strict_client(tool_engine(think("hm") + "Adding." + call("add", a=2))) as client:
        arguments: dict[str, Any] = {"model": MODEL, "input": "hi", "tools": [FUNCTION]}
        arguments["extra_body"] = {"stop_token_ids": [2]}
        found = await client.responses.create(**arguments)
        assert [item.type for item in found.output] == ["reasoning", "message", "function_call"]
        assert found.output[0].content[0].text == "hm" and found.output_text == "Adding."
        assert found.output[2].name == "add" and found.output[2].arguments == '{"a": 2}'
        async with client.responses.stream(**arguments) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('<tool_call>{"name": "add", "arguments": "{bad"}</tool_call>', {"tools": [FUNCTION]}),
        (call("add", a=1), {"tools": [FUNCTION], "tool_choice": "none"}),
        (call("add", a=1), {}),
    ],
)
async def test_a_call_that_cannot_be_read_or_is_not_taken_is_text(text: str, fields: dict[str, Any]) -> None:
    async with strict_client(tool_engine(text, ends=False)) as client:
        found = await client.responses.create(model=MODEL, input="hi", **fields)
        assert [item.type for item in found.output] == ["message"] and found.output_text == text
        async with client.responses.stream(model=MODEL, input="hi", **fields) as stream:
            final = await stream.get_final_response()
        assert [item.type for item in final.output] == ["message"] and final.output_text == text


async def test_a_conversation_is_read_item_by_item() -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is 2 + 2?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 2}'},
        {"type": "function_call_output", "call_id": "c1", "output": "4"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "4.", "annotations": []}],
        },
        {"role": "user", "content": "Sure?"},
    ]
    async with served(echo_engine()) as client:
        answer = (await client.post(URL, json={"model": MODEL, "input": items})).json()
        assert answer["output"][0]["content"][0]["text"] == (
            "user: What is 2 + 2?\nassistant: \ntool: 4\nassistant: 4.\nuser: Sure?\nassistant: "
        )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [FUNCTION]}, "tools"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"text": {"format": {"type": "json_schema", "schema": 3}}}, "text.format"),
        ({"inputs": "x"}, "inputs"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_is_wrong_is_a_400_by_name(fields: dict[str, Any], param: str) -> None:
    async with served(scripted_engine("Hi!")) as client:
        for stream in (False, True):
            refused = await client.post(URL, json={"model": MODEL, "input": "hi", "stream": stream} | fields)
            assert refused.status_code == 400, refused.text
            assert error(refused)["param"] == param, refused.text


async def test_what_changes_nothing_is_reported() -> None:
    async with served(scripted_engine("Hi!")) as client:
        body = {"input": "hi", "store": False, "reasoning": {"effort": "low"}, "truncation": "disabled", "include": []}
        answer = await client.post(URL, json=body)
        assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "reasoning, store"


@pytest.mark.loops("each")
async def test_an_error_in_the_middle_of_a_stream() -> None:
    engine = scripted_engine("Hello there")
    async with strict_client(engine) as client:
        await engine.debug_call_func_on_all_workers("fail_next", RuntimeError("boom"))
        with pytest.raises(openai.APIError, match="step"):
            async for _ in await client.responses.create(model=MODEL, input="hi", stream=True):
                pass
