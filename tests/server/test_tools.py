"""Tools over HTTP: the template shows them, the parser finds the calls."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from asyncengine import RequestOutput
from asyncengine.server.answer import Answer
from tests.server.serving import MODEL, chat, events, served
from tests.server.tooling import TOOL, call, think, tool_engine

pytestmark = pytest.mark.loops("either")

URL = "/v1/chat/completions"


async def test_a_tool_call_comes_whole_and_streamed() -> None:
    async with served(tool_engine(think("easy") + "Adding." + call("add", a=2))) as client:
        body = chat(tools=[TOOL], tool_choice="auto", stop_token_ids=[2])
        [choice] = (await client.post(URL, json=body)).json()["choices"]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert message["content"] == "Adding." and message["reasoning_content"] == "easy"
        [made] = message["tool_calls"]
        assert made["type"] == "function" and made["id"].startswith("call_") and "index" not in made
        assert made["function"] == {"name": "add", "arguments": '{"a": 2}'}

        chunks = events((await client.post(URL, json=body | {"stream": True})).text)
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert "".join(delta.get("content", "") for delta in deltas) == "Adding."
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "easy"
        [streamed] = [made for delta in deltas for made in delta.get("tool_calls", [])]
        assert streamed["index"] == 0 and json.loads(streamed["function"]["arguments"]) == {"a": 2}
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_delta_of_several_pieces_is_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy loop finds many tokens at once. Clients read the first choice of a chunk and no other."""
    outputs = Answer.outputs

    async def merged(self: Answer) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        parts = [output async for _, output in outputs(self)]
        ids = [token for part in parts for token in part.token_ids]
        yield 0, parts[-1]._replace(text="".join(part.text for part in parts), token_ids=ids)

    monkeypatch.setattr(Answer, "outputs", merged)
    async with served(tool_engine(think("easy") + "Adding." + call("add", a=2))) as client:
        body = chat(tools=[TOOL], tool_choice="auto", stop_token_ids=[2], stream=True)
        chunks = events((await client.post(URL, json=body)).text)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    firsts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(first["delta"].get("content", "") for first in firsts) == "Adding."
    assert [made["function"]["name"] for first in firsts for made in first["delta"].get("tool_calls", [])] == ["add"]
    assert [first["finish_reason"] for first in firsts if first["finish_reason"]] == ["tool_calls"]
    assert firsts[-1]["finish_reason"] == "tool_calls"


async def test_tools_are_shown_to_the_model_unless_no_call_is_wanted() -> None:
    engine = tool_engine("ok")
    async with served(engine) as client:
        history: list[dict[str, Any]] = [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
            },
        ]
        body = {"messages": history, "tools": [TOOL]}
        tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
        text = (await client.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
        assert "tool add;" in text and call("add", a=1) in text
        for choice, shown in (("auto", True), ("none", False), (None, True)):
            answer = await client.post(URL, json=body | {"tool_choice": choice, "model": MODEL})
            assert answer.status_code == 200, answer.text
            with_tools = answer.json()["usage"]["prompt_tokens"] == len(tokens)
            assert with_tools is shown


@pytest.mark.parametrize("fields", [{"tools": [TOOL], "tool_choice": "none"}, {"tools": []}, {}])
async def test_who_takes_no_calls_gets_what_looks_like_one_as_content(fields: dict[str, Any]) -> None:
    async with served(tool_engine(think("hm") + "a " + call("add", a=1), ends=False)) as client:
        [choice] = (await client.post(URL, json=chat(**fields))).json()["choices"]
        assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
        assert choice["message"]["content"] == "a " + call("add", a=1)
        assert choice["message"]["reasoning_content"] == "hm"
        chunks = events((await client.post(URL, json=chat(**fields, stream=True))).text)
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert "".join(delta.get("content", "") for delta in deltas) == "a " + call("add", a=1)
        assert not any("tool_calls" in delta for delta in deltas)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_an_unreadable_call_is_content_whole_and_streamed_and_may_be_sent_back() -> None:
    bad = '<tool_call>{"name": "add", "arguments": "{bad"}</tool_call>'
    async with served(tool_engine(f"a {bad} b{call('add', a=1)}", ends=False)) as client:
        body = chat(tools=[TOOL])
        [choice] = (await client.post(URL, json=body)).json()["choices"]
        message = choice["message"]
        assert message["content"] == f"a {bad} b" and choice["finish_reason"] == "tool_calls"
        assert [made["function"]["arguments"] for made in message["tool_calls"]] == ['{"a": 1}']
        chunks = events((await client.post(URL, json=body | {"stream": True})).text)
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert "".join(delta.get("content", "") for delta in deltas) == f"a {bad} b"
        body["messages"] += [message, {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "1"}]
        assert (await client.post(URL, json=body)).status_code == 200


async def test_one_call_is_enough_where_one_is_wanted() -> None:
    async with served(tool_engine(call("add", a=1) + call("add", a=2))) as client:
        body = chat(tools=[TOOL], parallel_tool_calls=False, stop_token_ids=[2])
        [choice] = (await client.post(URL, json=body)).json()["choices"]
        assert len(choice["message"]["tool_calls"]) == 1 and choice["message"]["content"] is None


async def test_openai_reads_tool_calls() -> None:
    import openai

    from asyncengine.server import create_app
    from tests.server.serving import USER, listening

    engine = tool_engine(call("add", a=2))
    async with engine, listening(create_app(engine)) as url:
        options: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "-", "_strict_response_validation": True}
        async with openai.AsyncOpenAI(**options) as client:
            arguments: Any = {"model": MODEL, "messages": USER, "tools": [TOOL], "extra_body": {"stop_token_ids": [2]}}
            whole = await client.chat.completions.create(**arguments)
            assert whole.choices[0].message.tool_calls[0].function.name == "add"
            async with client.chat.completions.stream(**arguments) as stream:
                final = await stream.get_final_completion()
            assert final.choices[0].message.tool_calls[0].function.arguments == '{"a": 2}'
            assert final.choices[0].finish_reason == "tool_calls"
