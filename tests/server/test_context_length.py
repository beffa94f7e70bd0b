"""A prompt that is too long is refused with the code that clients look for, by the field that it came in."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.serving import error, served

pytestmark = pytest.mark.loops("either")

LONG = "x" * 5000
MESSAGES = [{"role": "user", "content": LONG}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": LONG}, "prompt"),
        ("completions", {"prompt": [LONG]}, "prompt"),
        ("completions", {"prompt": ["short", LONG]}, "prompt"),
        ("completions", {"prompt": [[1], [1] * 5000]}, "prompt"),
        ("chat/completions", {"messages": MESSAGES}, "messages"),
        ("chat/completions", {"messages": MESSAGES, "max_completion_tokens": 3}, "messages"),
        ("messages", {"messages": MESSAGES, "max_tokens": 3}, "messages"),
        ("responses", {"input": LONG}, "input"),
        ("embeddings", {"input": LONG}, "input"),
        ("embeddings", {"input": ["short", LONG]}, "input"),
    ],
)
async def test_is_a_400_with_openai_s_code(path: str, body: dict[str, Any], param: str) -> None:
    streams: list[dict[str, Any]] = [{}] if path == "embeddings" else [{}, {"stream": True}]
    async with served() as client:
        for stream in streams:
            refused = await client.post(f"/v1/{path}", json=body | stream)
            assert refused.status_code == 400, refused.text
            found = error(refused)
            assert (found["code"], found["param"]) == ("context_length_exceeded", param), found
            assert found["type"] == "invalid_request_error" and "the prompt has 50" in found["message"]


async def test_what_else_is_wrong_with_a_prompt_has_another_code() -> None:
    async with served() as client:
        for body in ({"prompt": ""}, {"prompt": ["a", ""]}, {"prompt": [[1], [999]]}):
            found = error(await client.post("/v1/completions", json=body))
            assert (found["code"], found["param"]) == ("invalid_request", "prompt"), found


async def test_more_tokens_than_are_left_are_cut_to_those() -> None:
    async with served() as client:
        body = {"prompt": "x" * 4090, "max_tokens": 5000, "ignore_eos": True}
        found = (await client.post("/v1/completions", json=body)).json()
        assert found["usage"]["total_tokens"] == 4096 and found["choices"][0]["finish_reason"] == "length"
