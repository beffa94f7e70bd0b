"""``/v1/responses``: text, images and function calls in, text and function calls out.

Nothing is stored: the conversation is in the request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.outputs import FinishReason
from asyncengine.server.chat import Chat, ChatBody
from asyncengine.server.conversation import content_of
from asyncengine.server.refusal import Refusal
from asyncengine.server.response_items import Items
from asyncengine.server.sampling import DeadlineFields
from asyncengine.server.service import Service, reply
from asyncengine.server.settings import MediaLimits
from asyncengine.server.sse import EventStream, named, unless_gone
from asyncengine.server.wire import Body


class ResponsesBody(msgspec.Struct, kw_only=True):
    """What the route takes."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    text: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None

    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    allowed_token_ids: list[int] | None = None
    bad_words: list[str | list[int]] = []
    ignore_eos: bool = False
    min_tokens: int = 0
    priority: int = 0
    deadlines: DeadlineFields | None = None
    chat_template_kwargs: dict[str, Any] | None = None


BODY = Body(
    ResponsesBody,
    ignored=frozenset({
        "access_programs", "moderation", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "reasoning", "safety_identifier", "service_tier", "store", "user",
    }),
    refused={
        "background": "the answer is not kept",
        "background_options": "the answer is not kept",
        "context_management": "the context is what the request says",
        "conversation": "nothing is stored; send the conversation as input",
        "image": "answers are text",
        "include": "there is nothing more to include",
        "max_tool_calls": "there are no built-in tools",
        "previous_response_id": "nothing is stored; send the conversation as input",
        "prompt": "there are no stored prompts",
        "stream_options": "there is no obfuscation, and usage always comes",
        "top_logprobs": "use /v1/chat/completions",
        "truncation": "input that is too long is refused, not cut",
    },
    harmless={
        "background": (False,),
        "include": ([],),
        "stream_options": ({}, {"include_obfuscation": False}),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    },
)  # fmt: skip

_SAME = (
    "model", "temperature", "top_p", "stream", "parallel_tool_calls", "seed", "top_k", "min_p", "repetition_penalty",
    "stop", "stop_token_ids", "allowed_token_ids", "bad_words", "ignore_eos", "min_tokens", "priority", "deadlines",
    "chat_template_kwargs",
)  # fmt: skip
"""Fields that mean in a chat what they mean here."""

_NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "prompt": "input",
    "response_format": "text.format",
}


class Responding:
    """One request to the route, checked."""

    def __init__(self, service: Service, body: ResponsesBody, label: str) -> None:
        self.service = service
        self.body = body
        tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)]
        found: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
        self.chat = Chat(
            service,
            ChatBody(
                messages=_messages(body, service.settings.media),
                max_tokens=body.max_output_tokens,
                response_format=_response_format(body.text),
                tools=tools or None,
                tool_choice=_tool_choice(body.tool_choice, bool(tools)),
                **found,
            ),
            label,
            "resp",
        )
        body.input = []

    def response(self, items: Items | None, status: str, **more: Any) -> dict[str, Any]:
        """The response as it is now."""
        body, config = self.body, self.chat.config
        defaults = self.service.engine.default_generation_config
        return {
            "id": self.chat.id,
            "object": "response",
            "created_at": self.chat.created,
            "status": status,
            "model": self.chat.model,
            "output": [] if items is None else items.items,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": config.temperature if config.temperature is not None else defaults.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"strict": False, "parameters": {}, **tool} for tool in body.tools],
            "top_p": config.top_p if config.top_p is not None else defaults.top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }

    async def events(self) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Names and contents of the events; the last one has the whole response."""
        answer, [turn] = await self.chat.begin()
        items = Items()
        yield "response.created", {"response": self.response(None, "in_progress")}
        yield "response.in_progress", {"response": self.response(None, "in_progress")}
        ended = FinishReason.STOP
        async with aclosing(answer.outputs()) as outputs:
            async for _, output in outputs:
                for piece in turn.push(output.text):
                    for event in items.add(piece):
                        yield event
                ended = output.finish_reason or ended
        for piece in turn.finish():
            for event in items.add(piece):
                yield event
        cut = ended is FinishReason.LENGTH
        for event in items.finish("incomplete" if cut else "completed"):
            yield event
        usage = answer.usage()
        details = usage.prompt_tokens_details
        more: dict[str, Any] = {
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": 0 if details is None else details.cached_tokens,
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            }
        }
        if cut:
            more["incomplete_details"] = {"reason": "max_output_tokens"}
        status = "incomplete" if cut else "completed"
        yield f"response.{status}", {"response": self.response(items, status, **more)}

    async def whole(self) -> dict[str, Any]:
        """The answer, once it is complete."""
        response: dict[str, Any] = {}
        async with aclosing(self.events()) as events:
            async for _, content in events:
                response = content.get("response", response)
        return response

    async def begin(self) -> tuple[AsyncGenerator[tuple[str, dict[str, Any]], None], tuple[str, dict[str, Any]]]:
        """The events and the first of them: what is wrong with a request shows before that."""
        events = self.events()
        return events, await anext(events)

    async def streamed(
        self, events: AsyncGenerator[tuple[str, dict[str, Any]], None], first: tuple[str, dict[str, Any]]
    ) -> AsyncGenerator[bytes, None]:
        """The events as they go over the wire."""
        number = 0
        yield _numbered(first, number)
        async with aclosing(events):
            try:
                async for event in events:
                    number += 1
                    yield _numbered(event, number)
            except Exception as error:
                payload = self.service.refusal(error).payload()
                yield _numbered(("error", {**payload["error"], **payload}), number + 1)


def routes(service: Service) -> list[Route]:
    """The route."""

    async def create(request: Request) -> Response:
        request.state.names = _NAMES
        body, headers = await service.read(request, BODY)
        responding = Responding(service, body, request.state.request_id)
        if body.stream:
            begun = await unless_gone(request.receive, responding.begin())
            if begun is None:
                return Response(status_code=499)
            return EventStream(responding.streamed(*begun), headers, service.settings.ping_seconds)
        response = await unless_gone(request.receive, responding.whole())
        return reply(response, 499 if response is None else 200, headers)

    return [Route("/v1/responses", create, methods=["POST"])]


def _numbered(event: tuple[str, dict[str, Any]], number: int) -> bytes:
    name, content = event
    return named(name, {**content, "type": name, "sequence_number": number})


def _response_format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    chosen = (text or {}).get("format")
    if chosen is None:
        return None
    if not isinstance(chosen, dict):
        raise Refusal(400, f"text.format is {chosen!r:.80}; expected an object", "invalid_field", "text.format")
    if chosen.get("type") == "json_schema":  # here its fields lie flat
        return {"type": "json_schema", "json_schema": {k: v for k, v in chosen.items() if k != "type"}}
    return chosen


def _tool_choice(choice: str | dict[str, Any] | None, tools: bool) -> str | dict[str, Any] | None:
    if choice == "auto" and not tools:
        return None
    if isinstance(choice, dict) and choice.get("type") == "function":  # here the name lies flat
        return {"type": "function", "function": {k: v for k, v in choice.items() if k != "type"}}
    return choice


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        message = f"{where}.type is {tool.get('type')!r}; allowed: 'function'"
        raise Refusal(400, message, "unsupported_field", f"{where}.type")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type" and v is not None}}


def _messages(body: ResponsesBody, most: MediaLimits) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not body.input:
        raise Refusal(400, "input is []; expected text or at least one item", "invalid_field", "input")
    for index, item in enumerate(body.input):
        _add_item(messages, item, f"input[{index}]", most)
    return messages


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], where: str, most: MediaLimits) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        content = content_of(item.get("content"), f"{where}.content", most if role == "user" else None)
        messages.append({"role": role, "content": content})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        made = {"id": item.get("call_id"), "type": "function", "function": function}
        _assistant(messages).setdefault("tool_calls", []).append(made)
    elif kind == "function_call_output":
        output = content_of(item.get("output"), f"{where}.output", most)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind == "reasoning":
        texts = [str(part.get("text", "")) for part in item.get("content") or [] if isinstance(part, dict)]
        if texts:
            messages.append({"role": "assistant", "content": "", "reasoning_content": "".join(texts)})
    else:
        raise Refusal(400, f"{where}.type is {kind!r}, which cannot be read here", "unsupported_field", f"{where}.type")


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that a call belongs to: one turn is one message."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]
