"""Checks of a server against what clients of OpenAI's API rely on. Each knows nothing of the others."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncengine.cli.remote import problem

if TYPE_CHECKING:
    import httpx

_FINISH = ("stop", "length", "tool_calls", "content_filter")
_ASK = [{"role": "user", "content": "Say something short."}]
_MOST = 16


class Differs(Exception):
    """The server answers, and not as OpenAI's does."""


class Missing(Exception):
    """The server does not have this."""


Check = Callable[["Server"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A check under its name.

    Attributes:
        name: What is checked.
        check: Returns if all is well; raises `Differs` or `Missing`.
        required: Whether a server without it is no server for OpenAI's clients.
    """

    name: str
    check: Check
    required: bool


class Server:
    """What is checked.

    Attributes:
        client: Connected to it.
        model: The name that is asked for.
    """

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self.client = client
        self.model = model

    async def get(self, path: str) -> httpx.Response:
        """Raises `Missing` on a 404."""
        return _there(await self.client.get(path))

    async def post(self, path: str, **fields: Any) -> httpx.Response:
        """Sends the fields, with the model's name; raises `Missing` where the route is not there."""
        return _there(await self.client.post(path, json={"model": self.model} | fields))

    async def chat(self, **fields: Any) -> dict[str, Any]:
        """A whole answer to a short question; greedy and short unless `fields` say otherwise."""
        asked = {"messages": _ASK, "max_tokens": _MOST, "temperature": 0} | fields
        return _good(await self.post("/v1/chat/completions", **asked))

    async def stream(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of an answer that is streamed as it should be."""
        response = await self.post(path, stream=True, max_tokens=_MOST, temperature=0, **fields)
        if response.status_code != 200:
            _good(response)
        kind = response.headers.get("content-type", "")
        expect(kind.startswith("text/event-stream"), f"content-type is {kind!r}")
        lines = [line[5:].strip() for line in response.text.splitlines() if line.startswith("data:")]
        expect(bool(lines) and lines[-1] == "[DONE]", "the last event is not [DONE]")
        return [_object(line) for line in lines[:-1]]


def expect(condition: bool, otherwise: str) -> None:
    """Raises `Differs` unless the condition holds."""
    if not condition:
        raise Differs(otherwise)


def _there(response: httpx.Response) -> httpx.Response:
    if response.status_code in (404, 405, 501) and not _is_error(response, "model"):
        raise Missing(f"{response.request.url.path} answers {response.status_code}")
    return response


def _is_error(response: httpx.Response, word: str) -> bool:
    """Whether an answer is an error in OpenAI's shape that speaks of something."""
    try:
        error = response.json()["error"]
        return word in json.dumps([error["code"], error["param"], error["message"]])
    except (ValueError, LookupError, TypeError):
        return False


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        raise Differs(f"no JSON: {text[:60]!r}") from None
    expect(isinstance(found, dict), f"no object: {text[:60]!r}")
    return dict(found)


def _good(response: httpx.Response) -> dict[str, Any]:
    if response.status_code in (400, 422):
        raise Missing(f"refused: {problem(response)}")
    expect(response.status_code == 200, f"status {response.status_code}: {problem(response)}")
    return _object(response.text)


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    expect(isinstance(choices, list) and bool(choices), "no choices")
    return dict(answer["choices"][0])


def _content(answer: dict[str, Any]) -> str:
    content = (_choice(answer).get("message") or {}).get("content")
    expect(isinstance(content, str), f"message.content is {content!r}")
    return str(content)


def _usage(usage: Any) -> None:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    expect(isinstance(usage, dict) and all(isinstance(usage.get(name), int) for name in names), f"usage is {usage!r}")
    expect(usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"], "usage does not add up")


def _error(response: httpx.Response, *statuses: int) -> None:
    expect(response.status_code in statuses, f"status {response.status_code}; expected {statuses[0]}")
    error = _object(response.text).get("error")
    expect(isinstance(error, dict), "no 'error' object")
    absent = {"message", "type", "param", "code"} - set(error or ())
    expect(not absent, f"the error has no {', '.join(sorted(absent))}")


async def models(server: Server) -> None:
    found = _good(await server.get("/v1/models"))
    expect(found.get("object") == "list", f"object is {found.get('object')!r}")
    expect(all(isinstance(m.get("id"), str) and m.get("object") == "model" for m in found["data"]), "a model has no id")


async def chat(server: Server) -> None:
    found = await server.chat()
    expect(isinstance(found.get("id"), str) and isinstance(found.get("created"), int), "no id, or no created")
    expect(found.get("object") == "chat.completion", f"object is {found.get('object')!r}")
    expect(_choice(found)["message"].get("role") == "assistant", "the role is not 'assistant'")
    _content(found)
    reason = _choice(found).get("finish_reason")
    expect(reason in _FINISH, f"finish_reason is {reason!r}")
    _usage(found.get("usage"))


async def chat_stream(server: Server) -> None:
    found = await server.stream("/v1/chat/completions", messages=_ASK)
    expect(all(event.get("object") == "chat.completion.chunk" for event in found), "an object is no chunk")
    expect(len({event.get("id") for event in found}) == 1, "the id changes")
    choices = [choice for event in found for choice in event["choices"]]
    expect(choices[0]["delta"].get("role") == "assistant", "the first delta has no role")
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    expect(len(reasons) == 1 and reasons[0] in _FINISH, f"finish_reason comes {len(reasons)} times")
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    expect(text == _content(await server.chat()), "the deltas are not the whole answer")


async def stream_usage(server: Server) -> None:
    found = await server.stream("/v1/chat/completions", messages=_ASK, stream_options={"include_usage": True})
    expect(found[-1].get("choices") == [], "the last event has choices")
    _usage(found[-1].get("usage"))
    expect(not any(event.get("usage") for event in found[:-1]), "an earlier event has usage")


async def max_tokens(server: Server) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        fields = {"max_tokens": 2} if name == "max_tokens" else {"max_completion_tokens": 2}
        asked = {"messages": _ASK, "temperature": 0} | fields
        found = _good(await server.post("/v1/chat/completions", **asked))
        expect(
            found["usage"]["completion_tokens"] <= 2, f"{name} = 2 gives {found['usage']['completion_tokens']} tokens"
        )
        whole = found["usage"]["completion_tokens"] < 2
        expect(whole or _choice(found)["finish_reason"] in _FINISH[:2], "finish_reason is neither stop nor length")


async def greedy(server: Server) -> None:
    expect(_content(await server.chat()) == _content(await server.chat()), "temperature 0 gives two answers")


async def seed(server: Server) -> None:
    fields = {"temperature": 1, "seed": 7}
    expect(_content(await server.chat(**fields)) == _content(await server.chat(**fields)), "one seed, two answers")


async def stop(server: Server) -> None:
    text = _content(await server.chat())
    if len(text) < 4:
        raise Missing("the answer is too short to stop in it")
    word = text[len(text) // 2 : len(text) // 2 + 2]
    found = await server.chat(stop=[word])
    expect(_content(found) == text[: text.index(word)], f"the answer does not end before {word!r}")
    expect(_choice(found)["finish_reason"] == "stop", f"finish_reason is {_choice(found)['finish_reason']!r}")


async def several(server: Server) -> None:
    found = await server.chat(n=2, temperature=1)
    indices = sorted(choice.get("index") for choice in found["choices"])
    expect(indices == [0, 1], f"n = 2 gives the indices {indices}")


async def logprobs(server: Server) -> None:
    found = await server.chat(logprobs=True, top_logprobs=2)
    content = (_choice(found).get("logprobs") or {}).get("content")
    expect(isinstance(content, list) and bool(content), "logprobs.content is empty")
    for entry in content or ():
        expect({"token", "logprob", "bytes", "top_logprobs"} <= entry.keys(), "an entry is not whole")
        expect(entry["logprob"] <= 0, f"a logprob is {entry['logprob']}")
        expect(len(entry["top_logprobs"]) <= 2, "more alternatives than were asked for")


async def parts(server: Server) -> None:
    whole = _content(await server.chat())
    asked = [{"role": "user", "content": [{"type": "text", "text": _ASK[0]["content"]}]}]
    expect(_content(await server.chat(messages=asked)) == whole, "text in parts is another question")


async def history(server: Server) -> None:
    turns = [{"role": "system", "content": "Be brief."}, *_ASK, {"role": "assistant", "content": "Yes."}, *_ASK]
    _content(await server.chat(messages=turns))


async def tools(server: Server) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "weather", "description": "The weather.", "parameters": parameters}
    found = await server.chat(tools=[{"type": "function", "function": function}])
    for call in _choice(found)["message"].get("tool_calls") or ():
        expect(isinstance(call.get("id"), str) and call.get("type") == "function", "a tool call is not whole")
        _object(call["function"]["arguments"])


async def json_schema(server: Server) -> None:
    schema = {
        "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    found = _object(_content(await server.chat(response_format=form, max_tokens=64)))
    expect(set(found) == {"ok"} and isinstance(found["ok"], bool), f"the answer is {found}")


async def unknown_model(server: Server) -> None:
    response = await server.client.post("/v1/chat/completions", json={"model": "no-such-model", "messages": _ASK})
    _error(response, 404, 400)


async def bad_value(server: Server) -> None:
    _error(await server.post("/v1/chat/completions", messages=_ASK, temperature=-1), 400, 422)


async def bad_body(server: Server) -> None:
    headers = {"content-type": "application/json"}
    _error(await server.client.post("/v1/chat/completions", content=b'{"messages": [', headers=headers), 400, 422)
    _error(await server.post("/v1/chat/completions"), 400, 422)


async def unknown_field(server: Server) -> None:
    response = await server.post("/v1/chat/completions", messages=_ASK, max_tokens=1, temprature=1)
    expect(response.status_code != 200, "an unknown field is passed over in silence")
    _error(response, 400, 422)


async def request_id(server: Server) -> None:
    response = await server.post("/v1/chat/completions", messages=_ASK, max_tokens=1)
    if "x-request-id" not in response.headers:
        raise Missing("no x-request-id")


async def completions(server: Server) -> None:
    found = _good(await server.post("/v1/completions", prompt="Once upon", max_tokens=4, temperature=0))
    expect(found.get("object") == "text_completion", f"object is {found.get('object')!r}")
    expect(isinstance(_choice(found).get("text"), str), "no text")
    _usage(found.get("usage"))
    streamed = await server.stream("/v1/completions", prompt="Once upon")
    expect(all(isinstance(choice["text"], str) for event in streamed for choice in event["choices"]), "no text")


async def echo(server: Server) -> None:
    found = _good(await server.post("/v1/completions", prompt="Once upon", max_tokens=1, echo=True))
    expect(_choice(found)["text"].startswith("Once upon"), "the text does not begin with the prompt")


async def embeddings(server: Server) -> None:
    found = _good(await server.post("/v1/embeddings", input="hello"))
    expect(all(isinstance(value, float) for value in found["data"][0]["embedding"]), "no embedding")


async def responses(server: Server) -> None:
    found = _good(await server.post("/v1/responses", input="Say something short.", max_output_tokens=_MOST))
    expect(found.get("object") == "response", f"object is {found.get('object')!r}")
    expect(any(item.get("type") == "message" for item in found["output"]), "no message in the output")


async def messages(server: Server) -> None:
    found = _good(await server.post("/v1/messages", messages=_ASK, max_tokens=_MOST))
    expect(found.get("type") == "message" and found.get("role") == "assistant", "no message")
    expect({"input_tokens", "output_tokens"} <= found["usage"].keys(), "no usage")


ENTRIES = tuple(
    Entry(name, check, required)
    for name, check, required in (
        ("models", models, True),
        ("chat", chat, True),
        ("chat, streamed", chat_stream, True),
        ("usage in a stream", stream_usage, False),
        ("max_tokens", max_tokens, True),
        ("temperature 0", greedy, False),
        ("seed", seed, False),
        ("stop", stop, False),
        ("n", several, False),
        ("logprobs", logprobs, False),
        ("content in parts", parts, False),
        ("history", history, True),
        ("tools", tools, False),
        ("json_schema", json_schema, False),
        ("unknown model", unknown_model, False),
        ("wrong value", bad_value, False),
        ("wrong body", bad_body, False),
        ("unknown field", unknown_field, False),
        ("x-request-id", request_id, False),
        ("completions", completions, False),
        ("echo", echo, False),
        ("embeddings", embeddings, False),
        ("responses", responses, False),
        ("messages", messages, False),
    )
)
"""In the order of the report."""
