"""What a client is told of speculative decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.server import create_app
from asyncengine.speculation.protocol import Drafter
from asyncengine.testing import ByteTokenizer, ScriptedLoader, ScriptedModel, echo
from tests.server.serving import MODEL, Later, chat, client_of, completion, echo_engine, events, served
from tests.speculation.drafters import Liar, Oracle

openai = Later("openai")

pytestmark = pytest.mark.loops("either")

DETAILS = "completion_tokens_details"
LAST = {"stream": True, "stream_options": {"include_usage": True}}


def drafting(make: Callable[[ScriptedModel], Drafter]) -> AsyncEngine:
    """Guesses three tokens at a time."""
    loader = ScriptedLoader(echo, tokenizer=ByteTokenizer(), make_drafter=make)
    return AsyncEngine(EngineConfig(MODEL, speculative_mode="ngram", spec_draft_length=3), loader=loader)


@pytest.mark.parametrize("more", [{}, LAST], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", chat("abcdefgh")), ("/v1/completions", completion("abcdefgh"))]
)
@pytest.mark.parametrize("make", [Oracle, Liar])
async def test_usage_says_how_many_guesses_were_right(make: Any, path: str, body: Any, more: Any) -> None:
    async with served(drafting(make)) as client:
        answer = await client.post(path, json=body | more)
        usage = (events(answer.text)[-1] if more else answer.json())["usage"]
        right, wrong = usage[DETAILS]["accepted_prediction_tokens"], usage[DETAILS]["rejected_prediction_tokens"]
        assert set(usage[DETAILS]) == {"accepted_prediction_tokens", "rejected_prediction_tokens"}
        assert right > 0 if make is Oracle else right == 0 < wrong
        assert right < usage["completion_tokens"]  # wrong guesses are no part of these


async def test_where_nothing_was_guessed_yet_it_says_so_and_without_speculation_nothing() -> None:
    async with served(drafting(Oracle)) as client:
        usage = (await client.post("/v1/completions", json=completion(max_tokens=1))).json()["usage"]
        assert usage[DETAILS] == {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    async with served(echo_engine()) as client:
        usage = (await client.post("/v1/completions", json=completion())).json()["usage"]
        assert DETAILS not in usage


async def test_openai_s_client_reads_it() -> None:
    async with drafting(Oracle) as engine, client_of(create_app(engine)) as http:
        client = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="none", http_client=http, _strict_response_validation=True
        )
        answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "abcdefgh"}])
        assert answer.usage is not None and answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.accepted_prediction_tokens
