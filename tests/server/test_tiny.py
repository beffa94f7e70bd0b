"""The embedded model behind the server: real weights, its tokenizer, its chat template."""

from __future__ import annotations

from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig
from tests.server.serving import error, events, served
from tests.server.tooling import TOOL

pytestmark = pytest.mark.loops("either")

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.mark.usefixtures("one_torch_thread")
async def test_the_embedded_model_answers_over_http_and_goes_on_with_a_prefilled_answer() -> None:
    async with served(AsyncEngine(EngineConfig("tiny", mode="local"))) as client:
        body: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 64}
        chat = (await client.post("/v1/chat/completions", json=body | {"logprobs": True, "top_logprobs": 2})).json()
        [choice] = chat["choices"]
        assert choice["message"]["content"] == ANSWER and choice["finish_reason"] == "stop"
        entries = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries).strip() == ANSWER
        assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] <= 0 for entry in entries)

        chunks = events((await client.post("/v1/chat/completions", json=body | {"stream": True})).text)
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == ANSWER

        tokens = (await client.post("/tokenize", json={"messages": QUESTION})).json()["tokens"]
        assert len(tokens) == chat["usage"]["prompt_tokens"]
        spelled = [{"role": "user", "content": f"{QUESTION[0]['content']}<|end|>"}]
        more = (await client.post("/tokenize", json={"messages": spelled})).json()["tokens"]
        assert len(more) == len(tokens) + 1, "text that spells a special token becomes that token"
        told = {"prompt": tokens, "temperature": 0, "max_tokens": 64}
        assert (await client.post("/v1/completions", json=told)).json()["choices"][0]["text"] == ANSWER
        message = {"messages": QUESTION, "temperature": 0, "max_tokens": 64}
        assert (await client.post("/v1/messages", json=message)).json()["content"][0]["text"] == ANSWER

        sampled = body | {"temperature": 1, "seed": 3, "n": 2}
        once, again = [(await client.post("/v1/chat/completions", json=sampled)).json()["choices"] for _ in range(2)]
        assert once == again

        tools = await client.post("/v1/chat/completions", json=body | {"tools": [TOOL]})
        assert tools.status_code == 400 and error(tools)["param"] == "tools"
        role = await client.post("/v1/chat/completions", json=body | {"messages": [{"role": "tool", "content": "x"}]})
        assert role.status_code == 400 and "roles" in error(role)["message"] and error(role)["param"] == "messages"

        begun = [*QUESTION, {"role": "assistant", "content": "The capital of"}]
        prefilled: dict[str, Any] = {"messages": begun, "temperature": 0, "max_tokens": 64}
        found = (await client.post("/v1/messages", json=prefilled)).json()
        assert "The capital of" + found["content"][0]["text"] == ANSWER
        goes_on = prefilled | {"continue_final_message": True, "add_generation_prompt": False}
        found = (await client.post("/v1/chat/completions", json=goes_on)).json()
        assert "The capital of" + found["choices"][0]["message"]["content"] == ANSWER
