from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asyncengine.server import create_app
from tests.server.serving import KEY, MODEL, USER, Later, echo_engine, error, listening, scripted_engine, served
from tests.server.tooling import call, think, tool_engine

anthropic = Later("anthropic")

pytestmark = pytest.mark.loops("either")

URL = "/v1/messages"
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {}}}


@asynccontextmanager
async def strict_client(engine: Any) -> AsyncIterator[Any]:
    async with engine, listening(create_app(engine, api_key=KEY)) as url:
        options: dict[str, Any] = {"base_url": url, "api_key": KEY, "max_retries": 0}
        async with anthropic.AsyncAnthropic(**options, _strict_response_validation=True) as client:
            yield client


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 100, "messages": USER, **fields}


@pytest.mark.loops("each")
async def test_a_message_whole_and_streamed() -> None:
    async with strict_client(scripted_engine("Hello there", step_seconds=0.001)) as client:
        found = await client.messages.create(**asked(system="Be kind."))
        assert found.content[0].text == "Hello there" and found.stop_reason == "end_turn"
        assert found.usage.output_tokens == 12 and found.usage.input_tokens > 0
        async with client.messages.stream(**asked()) as stream:
            texts = [text async for text in stream.text_stream]
            final = await stream.get_final_message()
        assert "".join(texts) == "Hello there" == final.content[0].text
        assert final.stop_reason == "end_turn" and final.usage.output_tokens == 12
        raw = [event.type async for event in await client.messages.create(**asked(), stream=True)]
        assert raw[:2] == ["message_start", "content_block_start"]
        assert raw[-3:] == ["content_block_stop", "message_delta", "message_stop"]


async def test_why_a_message_ended() -> None:
    async with strict_client(scripted_engine("Hello there")) as client:
        cut = await client.messages.create(**asked(max_tokens=2))
        assert cut.stop_reason == "max_tokens" and cut.content[0].text == "He"
        stopped = await client.messages.create(**asked(stop_sequences=[" there"]))
        assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == " there"
        assert stopped.content[0].text == "Hello"


async def test_thinking_and_tool_use_are_blocks_of_their_own() -> None:
    async with strict_client(tool_engine(think("hm") + "Adding." + call("add", a=2))) as client:
        body = asked(tools=[TOOL], extra_body={"stop_token_ids": [2]})
        found = await client.messages.create(**body)
        assert [block.type for block in found.content] == ["thinking", "text", "tool_use"]
        assert found.content[0].thinking == "hm" and found.content[2].input == {"a": 2}
        assert found.stop_reason == "tool_use"
        async with client.messages.stream(**body) as stream:
            final = await stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
        assert final.content[2].input == {"a": 2} and final.stop_reason == "tool_use"


@pytest.mark.parametrize("arguments", ['"{bad"', "[1]", '"null"'])
async def test_a_tool_use_that_cannot_be_read_is_text(arguments: str) -> None:
    text = f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'
    async with strict_client(tool_engine(text, ends=False)) as client:
        found = await client.messages.create(**asked(tools=[TOOL]))
        assert [block.text for block in found.content] == [text] and found.stop_reason == "end_turn"
        async with client.messages.stream(**asked(tools=[TOOL])) as stream:
            final = await stream.get_final_message()
        assert [block.text for block in final.content] == [text] and final.stop_reason == "end_turn"


async def test_a_tool_use_without_input_has_an_empty_one() -> None:
    async with strict_client(tool_engine('<tool_call>{"name": "add", "arguments": null}</tool_call>')) as client:
        found = await client.messages.create(**asked(tools=[TOOL], extra_body={"stop_token_ids": [2]}))
        assert [block.input for block in found.content] == [{}] and found.stop_reason == "tool_use"


@pytest.mark.parametrize("fields", [{"tools": [TOOL], "tool_choice": {"type": "none"}}, {}])
async def test_who_takes_no_calls_gets_what_looks_like_one_as_text(fields: dict[str, Any]) -> None:
    async with strict_client(tool_engine(call("add", a=1), ends=False)) as client:
        found = await client.messages.create(**asked(**fields))
        assert [block.text for block in found.content] == [call("add", a=1)] and found.stop_reason == "end_turn"
        async with client.messages.stream(**asked(**fields)) as stream:
            final = await stream.get_final_message()
        assert [block.text for block in final.content] == [call("add", a=1)] and final.stop_reason == "end_turn"


async def test_a_history_of_blocks_becomes_a_prompt() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "Adding."},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "4"}]},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    async with served(echo_engine()) as client:
        found = (await client.post(URL, json=asked(messages=messages))).json()
        text = "user: 2 + 2?\nassistant: Adding.\ntool: 4\nuser: Well?\nassistant: "
        assert found["content"] == [{"type": "text", "text": text}]
        counted = await client.post(f"{URL}/count_tokens", json={"messages": messages})
        assert counted.json() == {"input_tokens": len(text)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": [1]}]}]},
            "messages[0].content[0].input",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"maximum_tokens": 3}, "maximum_tokens"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_is_wrong_is_a_400_by_name(fields: dict[str, Any], param: str) -> None:
    async with served(scripted_engine("Hi!")) as client:
        refused = await client.post(URL, json=asked() | fields)
        assert refused.status_code == 400, refused.text
        assert error(refused)["param"] == param, refused.text


async def test_errors_are_those_of_anthropic_s_client() -> None:
    engine = scripted_engine("Hello")
    async with strict_client(engine) as client:
        with pytest.raises(anthropic.BadRequestError) as bad:
            await client.messages.create(**asked(extra_body={"temperature": -1}))
        assert bad.value.body["type"] == "error" and bad.value.body["error"]["type"] == "invalid_request_error"
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**asked(model="other"))
        await engine.debug_call_func_on_all_workers("fail_next", RuntimeError("boom"))
        with pytest.raises(anthropic.APIError, match="step"):
            async for _ in await client.messages.create(**asked(), stream=True):
                pass
        assert (await client.messages.count_tokens(model=MODEL, messages=USER)).input_tokens == 23
