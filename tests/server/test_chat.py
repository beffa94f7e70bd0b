from __future__ import annotations

from typing import Any

import pytest

from tests.server.serving import MODEL, USER, chat, echo_engine, error, events, scripted_engine, served, until
from tests.server.tooling import TOOL, call, think, tool_engine

pytestmark = pytest.mark.loops("either")

URL = "/v1/chat/completions"


async def test_an_answer_has_openai_s_shape() -> None:
    async with served(scripted_engine("Hi!")) as client:
        found = (await client.post(URL, json=chat())).json()
        assert found["object"] == "chat.completion" and found["model"] == MODEL
        assert found["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi!", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ]
        assert found["usage"]["completion_tokens"] == 4


@pytest.mark.loops("each")
async def test_a_stream_begins_with_the_role_and_ends_with_the_reason() -> None:
    async with served(scripted_engine("Grüße!", step_seconds=0.001)) as client:
        chunks = events((await client.post(URL, json=chat(stream=True, n=2))).text)
        assert {key for chunk in chunks for key in chunk} == {"id", "created", "model", "choices", "object"}
        assert [c["delta"] for c in chunks[0]["choices"]] == [{"role": "assistant", "content": ""}] * 2
        for index in range(2):
            choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert "".join(c["delta"].get("content", "") for c in choices) == "Grüße!"
            assert [c["finish_reason"] for c in choices][-1] == "stop"
            assert {c["finish_reason"] for c in choices[:-1]} == {None}


async def test_usage_in_streams() -> None:
    async with served(scripted_engine("Hi!", step_seconds=0.001)) as client:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = events((await client.post(URL, json=chat(stream=True, stream_options=options))).text)
        assert [chunk["usage"]["prompt_tokens"] for chunk in chunks] == [23] * len(chunks)
        assert chunks[0]["usage"]["completion_tokens"] == 0
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 4


async def test_logprobs_of_a_chat() -> None:
    async with served(scripted_engine("ä")) as client:
        found = (await client.post(URL, json=chat(logprobs=True, top_logprobs=1))).json()
        content = found["choices"][0]["logprobs"]["content"]
        assert [(entry["token"], entry["bytes"], entry["logprob"]) for entry in content] == [
            ("\ufffd", [0xC3], 0.0),
            ("\ufffd", [0xA4], -1.0),
        ]
        assert content[0]["top_logprobs"][0]["logprob"] == 0.0
        chunks = events((await client.post(URL, json=chat(stream=True, logprobs=True))).text)
        parts = [c["logprobs"]["content"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
        assert [entry["logprob"] for part in parts for entry in part] == [0.0, -1.0]


async def test_stop_strings_are_found_in_reasoning_and_in_the_arguments_of_calls() -> None:
    async with served(tool_engine(think("one two") + "three" + call("add", a=45))) as client:
        found: dict[str, Any] = {}
        for stop in ("two", "45"):
            body = chat(stop=stop, tools=[TOOL])
            [choice] = (await client.post(URL, json=body)).json()["choices"]
            assert choice["finish_reason"] == "stop"
            found[stop] = choice["message"]
        assert found["two"]["reasoning_content"] == "one " and not found["two"]["content"]
        assert found["45"]["content"].startswith("three") and "tool_calls" not in found["45"]


async def test_newer_and_older_names_of_the_limit_both_work_and_not_together() -> None:
    async with served(scripted_engine("Hello")) as client:
        for name in ("max_tokens", "max_completion_tokens"):
            found = (await client.post(URL, json=chat(**{name: 2}))).json()
            assert found["choices"][0]["message"]["content"] == "He"
            assert found["choices"][0]["finish_reason"] == "length"
        both = await client.post(URL, json=chat(max_tokens=1, max_completion_tokens=2))
        assert both.status_code == 400 and error(both)["param"] == "max_completion_tokens"


async def test_a_history_with_parts_tool_calls_and_a_developer_becomes_a_prompt() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "audio": None,
            "annotations": [],
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "4"},
        {"role": "user", "name": "Ann", "content": "Well?"},
    ]
    async with served(echo_engine()) as client:
        answer = await client.post(URL, json={"model": MODEL, "messages": messages})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == (
            "system: Be brief.\nuser: What is 2 + 2?\nassistant: \ntool: 4\nuser: Well?\nassistant: "
        )


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a", **fields}]}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ["hello"]}, "messages[0]"),
    (message(role="nobody"), "messages[0].role"),
    (message(role=None), "messages[0].role"),
    (message(content=None), "messages[0].content"),
    (message(content=3), "messages[0].content"),
    (message(content=[{"type": "input_audio", "input_audio": {}}]), "messages[0].content[0].input_audio"),
    (message(content=[{"type": "text"}]), "messages[0].content[0].text"),
    (message(content=["a"]), "messages[0].content[0].type"),
    (message(colour="red"), "messages[0].colour"),
    (message(role="assistant", tool_calls=[{"function": {}}]), "messages[0].tool_calls[0]"),
    (message(role="assistant", tool_calls="x"), "messages[0].tool_calls"),
    (
        message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        "messages[0].tool_calls[0].function.arguments",
    ),
    *(
        (
            message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": arguments}}]),
            "messages[0].tool_calls[0].function.arguments",
        )
        for arguments in ("[1]", "5", '"{}"', [1])
    ),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools[0].function.parameters",
    ),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
    ({"chat_template_kwargs": {"config": 1}}, "chat_template_kwargs.config"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"reasoning_efort": "low"}, "reasoning_efort"),
]


async def test_what_is_wrong_is_a_400_by_name() -> None:
    async with served(scripted_engine("Hi!")) as client:
        for fields, param in WRONG:
            refused = await client.post(URL, json=chat() | fields)
            assert refused.status_code == 400, (fields, refused.text)
            assert error(refused)["param"] == param, refused.text


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"tools": [], "tool_choice": "none"},
        {"functions": []},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"stop": None, "logit_bias": None, "max_tokens": None, "temperature": None},
        {"temperature": 1, "seed": 2**70, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_asks_for_nothing_special_is_honoured(fields: dict[str, Any]) -> None:
    async with served(scripted_engine("Hi!")) as client:
        answer = await client.post(URL, json=chat() | fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "Hi!"


async def test_the_model_may_be_left_out() -> None:
    async with served(scripted_engine("Hi!")) as client:
        answer = await client.post(URL, json={"messages": USER, "reasoning_effort": "low"})
        assert answer.json()["model"] == MODEL and answer.headers["x-ignored-fields"] == "reasoning_effort"


@pytest.mark.loops("each")
async def test_a_request_that_somebody_else_ends_is_an_error_and_not_half_an_answer() -> None:
    import asyncio

    engine = echo_engine()
    async with served(engine) as client:
        await engine.pause()
        calls = [asyncio.ensure_future(client.post(URL, json=chat(stream=stream))) for stream in (False, True)]
        await until(lambda: engine.metrics().num_requests_waiting >= 2)
        await engine.reset()
        whole, streamed = await asyncio.gather(*calls)
        assert whole.status_code == 503 and error(whole)["code"] == "request_aborted"
        assert events(streamed.text)[-1]["error"]["code"] == "request_aborted"
