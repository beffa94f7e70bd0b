"""Anthropic's ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.outputs import FinishReason, RequestOutput
from asyncengine.server.answer import Answer
from asyncengine.server.chat import Chat, ChatBody
from asyncengine.server.conversation import conversation
from asyncengine.server.media_data import told_apart
from asyncengine.server.message_blocks import Blocks, messages_of, tools_of
from asyncengine.server.refusal import Refusal
from asyncengine.server.sampling import DeadlineFields
from asyncengine.server.service import Service, reply
from asyncengine.server.sse import EventStream, named, unless_gone
from asyncengine.server.turn import Turn
from asyncengine.server.wire import Body


class MessagesBody(msgspec.Struct, kw_only=True):
    """What the route takes."""

    messages: list[dict[str, Any]]
    max_tokens: int
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] = []
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: dict[str, Any] | None = None

    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_tokens: int = 0
    priority: int = 0
    deadlines: DeadlineFields | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CountBody(msgspec.Struct, kw_only=True):
    """What ``count_tokens`` takes."""

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: dict[str, Any] | None = None


IGNORED = frozenset({
    "cache_control", "diagnostics", "inference_geo", "metadata", "service_tier", "speed", "thinking", "user_profile_id",
    "workspace_id",
})  # fmt: skip
REFUSED = {
    "container": "there are no containers here",
    "context_management": "the context is what the request says",
    "mcp_servers": "there are no built-in tools",
    "output_config": "answers are not constrained",
    "output_format": "answers are not constrained",
    "prefill": "end the messages with the assistant's beginning instead",
}
BODY = Body(MessagesBody, ignored=IGNORED, refused=REFUSED)
COUNT = Body(CountBody, ignored=IGNORED, refused=REFUSED)

NAMES = {"stop_strs": "stop_sequences", "prompt": "messages"}

_SAME = (
    "model", "max_tokens", "stream", "temperature", "top_p", "top_k", "seed", "min_p", "repetition_penalty",
    "stop_token_ids", "ignore_eos", "min_tokens", "priority", "deadlines", "chat_template_kwargs",
)  # fmt: skip
"""Fields that mean in a chat what they mean here."""


class Messaging:
    """One request to the route, checked."""

    def __init__(self, service: Service, body: MessagesBody, label: str) -> None:
        self.service = service
        choice = body.tool_choice or {}
        kind = choice.get("type", "auto")
        wanted: dict[str, Any] = {"auto": None, "none": "none", "any": "required"}
        wanted["tool"] = {"type": "function", "function": {"name": choice.get("name")}}
        if kind not in wanted:
            message = f"tool_choice.type is {kind!r:.80}; allowed: {', '.join(map(repr, wanted))}"
            raise Refusal(400, message, "unsupported_field", "tool_choice")
        found: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
        messages = messages_of(body.messages, body.system, service.settings.media)
        body.messages = []
        prefilled = messages[-1]["role"] == "assistant"
        self.chat = Chat(
            service,
            ChatBody(
                messages=messages,
                stop=body.stop_sequences,
                tools=tools_of(body.tools) or None,
                tool_choice=wanted[kind],
                parallel_tool_calls=not choice.get("disable_parallel_tool_use", False),
                add_generation_prompt=not prefilled,
                continue_final_message=prefilled,
                **found,
            ),
            label,
            "msg",
        )

    async def whole(self) -> dict[str, Any]:
        """The answer, once it is complete."""
        answer, [turn] = await self.chat.begin()
        blocks, last = Blocks(), None
        async with aclosing(answer.outputs()) as outputs:
            async for _, output in outputs:
                for piece in turn.push(output.text):
                    list(blocks.add(piece))
                last = output
        for piece in turn.finish():
            list(blocks.add(piece))
        list(blocks.close())
        return self._message(blocks.blocks, _usage(answer), **_end(last, turn))

    async def events(self, answer: Answer, turn: Turn) -> AsyncGenerator[bytes, None]:
        """The answer as it comes."""
        counts = {"input_tokens": answer.prompt_tokens(), "output_tokens": 0}
        yield _event("message_start", message=self._message([], counts, stop_reason=None, stop_sequence=None))
        blocks, last = Blocks(), None
        try:
            async with aclosing(answer.outputs()) as outputs:
                async for _, output in outputs:
                    for piece in turn.push(output.text):
                        for name, content in blocks.add(piece):
                            yield _event(name, **content)
                    last = output
            for piece in turn.finish():
                for name, content in blocks.add(piece):
                    yield _event(name, **content)
            for name, content in blocks.close():
                yield _event(name, **content)
        except Exception as error:
            yield named("error", self.service.refusal(error).payload())
            return
        yield _event("message_delta", delta=_end(last, turn), usage=_usage(answer))
        yield _event("message_stop")

    def _message(self, blocks: list[dict[str, Any]], usage: dict[str, int], **end: Any) -> dict[str, Any]:
        return {
            "id": self.chat.id,
            "type": "message",
            "role": "assistant",
            "model": self.chat.model,
            "content": blocks,
            "usage": usage,
            **end,
        }


def routes(service: Service) -> list[Route]:
    """The routes."""

    async def create(request: Request) -> Response:
        request.state.names = NAMES
        body, headers = await service.read(request, BODY)
        messaging = Messaging(service, body, request.state.request_id)
        if body.stream:
            begun = await unless_gone(request.receive, messaging.chat.begin())
            if begun is None:
                return Response(status_code=499)
            answer, [turn] = begun
            return EventStream(messaging.events(answer, turn), headers, service.settings.ping_seconds)
        message = await unless_gone(request.receive, messaging.whole())
        return reply(message, 499 if message is None else 200, headers)

    async def count(request: Request) -> Response:
        request.state.names = NAMES
        body, headers = await service.read(request, COUNT)
        service.check_serving(body.model)
        service.tokenizer()  # without one there are no tokens to count
        most = service.settings.media
        messages = conversation(messages_of(body.messages, body.system, most), most)
        tools = tools_of(body.tools)

        async def counted() -> dict[str, Any]:
            given = await service.with_media(messages)
            with told_apart(messages):
                ids = await service.engine.tokenize_chat(given, **({"tools": tools} if tools else {}))
            return {"input_tokens": len(ids)}

        answer = await unless_gone(request.receive, counted())
        return reply(answer, 499 if answer is None else 200, headers)

    return [
        Route("/v1/messages", create, methods=["POST"]),
        Route("/v1/messages/count_tokens", count, methods=["POST"]),
    ]


def _event(name: str, **content: Any) -> bytes:
    return named(name, {"type": name, **content})


def _usage(answer: Answer) -> dict[str, int]:
    usage = answer.usage()
    cached = 0 if usage.prompt_tokens_details is None else usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _end(last: RequestOutput | None, turn: Turn) -> dict[str, Any]:
    """Anthropic's words for how it ended."""
    assert last is not None
    stop = last.stop_reason if isinstance(last.stop_reason, str) else None
    if last.finish_reason is FinishReason.LENGTH:
        reason = "max_tokens"
    elif turn.calls:
        reason = "tool_use"
    else:
        reason = "end_turn" if stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": stop}
