"""``asyncengine check``: it passes our own server, and notices what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from asyncengine.cli.check import Finding, _finding
from asyncengine.cli.conformance import ENTRIES, Server
from tests.cli.programs import run

pytestmark = pytest.mark.loops("either")

Answer = dict[str, Any]
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "hello you"}, "finish_reason": "stop"}
CHAT = {"id": "c", "object": "chat.completion", "created": 1, "choices": [CHOICE], "usage": USAGE}
ERROR = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}


def chunk(content: str | None = None, finish: str | None = None, **fields: Any) -> Answer:
    delta = {"role": "assistant", "content": content} if content is not None else {}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "choices": [choice]} | fields


def stream(*events: Answer, end: str = "data: [DONE]\n\n", kind: str = "text/event-stream") -> httpx.Response:
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end
    return httpx.Response(200, text=text, headers={"content-type": kind})


async def verdict(name: str, handle: Callable[[Answer], httpx.Response]) -> Finding:
    (entry,) = (entry for entry in ENTRIES if entry.name == name)

    def answer(request: httpx.Request) -> httpx.Response:
        try:
            body = json.loads(request.content or b"{}")
        except ValueError:
            body = {}
        return handle(body)

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://there") as client:
        return await _finding(entry, Server(client, "m"))


def test_our_own_server_differs_in_nothing(guarded: str) -> None:
    done = run("check", guarded, "--api-key", "secret")
    assert done.status == 0, done.out
    assert " differs " not in done.out
    assert done.out.splitlines()[-1] == f"{len(ENTRIES) - 2} ok, 0 differs, 2 missing"
    found = [json.loads(line) for line in run("check", guarded, "--api-key", "secret", "--jsonl").out.splitlines()]
    assert [entry["check"] for entry in found if entry["verdict"] == "missing"] == [
        "tools", "json_schema",
    ]  # fmt: skip
    wrong = run("check", guarded)
    assert wrong.status == 1 and "/v1/models answers 401" in wrong.err
    wrong = run("check", guarded, "--api-key", "secret", "--model", "other")
    assert wrong.status == 1 and "status 404" in wrong.out


WRONG: dict[str, tuple[str, str, Callable[[Answer], httpx.Response]]] = {
    "no id": ("chat", "no id", lambda body: httpx.Response(200, json=CHAT | {"id": None})),
    "content is null": (
        "chat",
        "message.content is None",
        lambda body: httpx.Response(200, json=CHAT | {"choices": [CHOICE | {"message": {"role": "assistant"}}]}),
    ),
    "a reason of its own": (
        "chat",
        "finish_reason is 'eos'",
        lambda body: httpx.Response(200, json=CHAT | {"choices": [CHOICE | {"finish_reason": "eos"}]}),
    ),
    "a wrong sum": (
        "chat",
        "does not add up",
        lambda body: httpx.Response(200, json=CHAT | {"usage": USAGE | {"total_tokens": 9}}),
    ),
    "no JSON": ("chat", "no JSON", lambda body: httpx.Response(200, text="<html>")),
    "another shape": ("chat", "another shape", lambda body: httpx.Response(200, json=CHAT | {"choices": ["a"]})),
    "a fault": ("chat", "status 500", lambda body: httpx.Response(500, text="oops")),
    "no end": ("chat, streamed", "not [DONE]", lambda body: stream(chunk("hello you"), chunk(finish="stop"), end="")),
    "no event stream": (
        "chat, streamed",
        "content-type is 'text/plain'",
        lambda body: stream(chunk("hello you", "stop"), kind="text/plain"),
    ),
    "a part is lost": (
        "chat, streamed",
        "not the whole answer",
        lambda body: (
            stream(chunk("hello"), chunk(finish="stop")) if "stream" in body else httpx.Response(200, json=CHAT)
        ),
    ),
    "two ends": (
        "chat, streamed",
        "finish_reason comes 2 times",
        lambda body: stream(chunk("hello", "stop"), chunk(finish="stop")),
    ),
    "no usage at the end": (
        "usage in a stream",
        "the last event has choices",
        lambda body: stream(chunk("hello"), chunk(finish="stop")),
    ),
    "too many tokens": (
        "max_tokens",
        "max_tokens = 2 gives 3 tokens",
        lambda body: httpx.Response(200, json=CHAT | {"usage": USAGE | {"completion_tokens": 3}}),
    ),
    "stop is not heard": ("stop", "does not end before", lambda body: httpx.Response(200, json=CHAT)),
    "n is not heard": ("n", "n = 2 gives the indices [0]", lambda body: httpx.Response(200, json=CHAT)),
    "no logprobs": ("logprobs", "logprobs.content is empty", lambda body: httpx.Response(200, json=CHAT)),
    "no schema": ("json_schema", "no JSON", lambda body: httpx.Response(200, json=CHAT)),
    "any model": ("unknown model", "status 200; expected 404", lambda body: httpx.Response(200, json=CHAT)),
    "another error": ("wrong value", "no 'error' object", lambda body: httpx.Response(400, json={"detail": "no"})),
    "half an error": (
        "wrong value",
        "has no code, param, type",
        lambda body: httpx.Response(400, json={"error": {"message": "no"}}),
    ),
    "silence": ("unknown field", "passed over in silence", lambda body: httpx.Response(200, json=CHAT)),
    "no echo": (
        "echo",
        "does not begin with the prompt",
        lambda body: httpx.Response(200, json={"choices": [{"text": " a time"}]}),
    ),
}


@pytest.mark.parametrize(("name", "detail", "handle"), WRONG.values(), ids=WRONG)
async def test_what_is_wrong_differs(name: str, detail: str, handle: Callable[[Answer], httpx.Response]) -> None:
    finding = await verdict(name, handle)
    assert finding.verdict == "differs" and finding.bad
    assert detail in finding.detail


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("embeddings", httpx.Response(404, text="not found")),
        ("tools", httpx.Response(400, json=ERROR)),
        ("x-request-id", httpx.Response(200, json=CHAT)),
    ],
)
async def test_what_is_not_there_is_missing_and_no_fault(name: str, response: httpx.Response) -> None:
    finding = await verdict(name, lambda body: response)
    assert finding.verdict == "missing" and not finding.bad


async def test_without_the_basics_it_is_a_fault() -> None:
    finding = await verdict("chat", lambda body: httpx.Response(404, text="not found"))
    assert finding.verdict == "missing" and finding.bad


@pytest.mark.parametrize(
    ("name", "answer"), [("chat", CHAT), ("history", CHAT), ("temperature 0", CHAT), ("seed", CHAT)]
)
async def test_what_is_right_is_ok(name: str, answer: Answer) -> None:
    assert (await verdict(name, lambda body: httpx.Response(200, json=answer))).verdict == "ok"


async def test_greedy_answers_that_change_differ() -> None:
    texts = iter(("one", "two"))

    def changing(body: Answer) -> httpx.Response:
        message = {"role": "assistant", "content": next(texts)}
        return httpx.Response(200, json=CHAT | {"choices": [CHOICE | {"message": message}]})

    assert (await verdict("temperature 0", changing)).verdict == "differs"
