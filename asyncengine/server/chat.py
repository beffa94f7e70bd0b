"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.errors import InvalidRequestError
from asyncengine.generation import GenerationConfig
from asyncengine.outputs import FinishReason, RequestOutput
from asyncengine.server.answer import Answer, new_id, now
from asyncengine.server.chunks import (
    Call,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    Function,
    Message,
    UsageRecord,
)
from asyncengine.server.conversation import conversation, template_arguments
from asyncengine.server.logprobs import chat_logprobs
from asyncengine.server.media_data import told_apart
from asyncengine.server.naming import fresh_id
from asyncengine.server.refusal import Refusal
from asyncengine.server.sampling import IGNORED, OTHERS, Sampling, generation_config, request_options
from asyncengine.server.service import Service, reply
from asyncengine.server.sse import DONE, EventStream, data, unless_gone
from asyncengine.server.tools import Tool, parses, parsing, tool_choice, turns
from asyncengine.server.turn import Piece, Reasoning, Text, ToolCall, Turn
from asyncengine.server.wire import Body, encode
from asyncengine.tokenizer import Tokenizer


class ChatBody(Sampling, kw_only=True):
    """What the route takes."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


_HERE = fresh_id()
"""Stands where text will; nothing else in a chunk is this string."""

BODY = Body(
    ChatBody,
    ignored=IGNORED | {"prediction", "reasoning_effort", "verbosity"},
    refused=OTHERS
    | {
        "audio": "answers are text",
        "function_call": "use tool_choice",
        "functions": "use tools",
        "modalities": "answers are text",
        "web_search_options": "there is no web search here",
        "best_of": "use n",
        "echo": "it is a field of /v1/completions",
        "prompt_logprobs": "it is a field of /v1/completions",
    },
    harmless={"modalities": (["text"],), "function_call": ("none",), "functions": ([],), "echo": (False,)},
)


class Chat:
    """One request for an assistant's turn, checked: of this route, and of others in its words.

    Args:
        service: Whose.
        body: What was asked for.
        label: Id of the HTTP request.
        prefix: Of the id.
    """

    def __init__(self, service: Service, body: ChatBody, label: str, prefix: str = "chatcmpl") -> None:
        self.service = service
        self.body = body
        served = service.check_serving(body.model)
        self.model = served.name
        self.tokenizer: Tokenizer = service.tokenizer()
        self.id = new_id(prefix)
        self.created = now()
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            message = "max_tokens and max_completion_tokens are both given; expected one of them"
            raise Refusal(400, message, "invalid_field", "max_completion_tokens")
        self.choice = tool_choice(body.tools, body.tool_choice, body.parallel_tool_calls, self.tokenizer)
        self.messages = conversation(body.messages, service.settings.media)
        body.messages = []  # images in it are large, and an answer takes its time
        changes: dict[str, Any] = {"logprobs": body.logprobs, "top_logprobs": body.top_logprobs}
        if body.max_completion_tokens is not None:
            changes["max_tokens"] = body.max_completion_tokens
        if parses(self.tokenizer):
            changes["skip_special_tokens"] = False
        self.config = generation_config(body, **changes)
        self.options = request_options(body, self.id, label, served.adapter)

    async def _constrained(self) -> GenerationConfig:
        """How to generate, with the grammar of the calls and, if one is wanted, of the answer without any."""
        known = parsing(self.tokenizer)
        layout = None if known is None else await self.service.call_layout(known)
        wanted = self.config.response_format
        assert not isinstance(wanted, Mapping)
        return self.config.replace(response_format=self.choice.grammar(self.tokenizer, layout, wanted))

    async def begin(self) -> tuple[Answer, list[Turn]]:
        """Adds the request to the engine."""
        body, tools, config = self.body, self.choice.shown, self.config
        arguments = template_arguments(body.chat_template_kwargs)
        if tools:
            arguments["tools"] = tools
        beside = bool(tools) and self.config.response_format is not None
        if self.choice.constrains or beside:
            config = await self._constrained()
        if body.continue_final_message:
            if body.add_generation_prompt and self.messages[-1]["role"] != "assistant":
                message = "continue_final_message is true and the last message is not the assistant's"
                raise Refusal(400, message, "invalid_field", "continue_final_message")
            arguments["continue_final_message"] = True
            arguments["add_generation_prompt"] = False
        elif not body.add_generation_prompt:
            arguments["add_generation_prompt"] = False
        sent, self.messages = self.messages, []
        try:
            given = await self.service.with_media(sent, config, self.options)
            with told_apart(sent):
                stream = await self.service.engine.chat(given, config, self.options, **arguments).__aenter__()
        except InvalidRequestError as error:
            if not self.choice.constrains or beside or not str(error).startswith("response_format"):
                raise
            raise Refusal(400, f"tools: {error}", "invalid_field", "tools") from error
        found = turns(stream, self.tokenizer, body.n, tools, body.parallel_tool_calls)
        return Answer((stream,), self.service), found

    async def whole(self) -> ChatCompletion:
        """The answer, once it is complete."""
        answer, found = await self.begin()
        choices = [_Choice() for _ in found]
        async with aclosing(answer.outputs()) as outputs:
            async for _, output in outputs:
                choices[output.index].add(output, found[output.index], self.tokenizer)
        made = [choice.choice(index, found[index]) for index, choice in enumerate(choices)]
        return ChatCompletion(self.id, self.created, self.model, made, answer.usage())

    async def events(self, answer: Answer, found: list[Turn]) -> AsyncGenerator[bytes, None]:
        """The answer as it comes."""
        options = self.body.stream_options
        include = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        usage: UsageRecord | msgspec.UnsetType | None = None if include else msgspec.UNSET
        prompt, generated = answer.prompt_tokens(), 0

        def chunk(choices: list[ChunkChoice]) -> bytes:
            nonlocal usage
            if continuous:
                usage = UsageRecord(prompt, generated, prompt + generated)
            return data(ChatChunk(self.id, self.created, self.model, choices, usage))

        yield chunk([ChunkChoice(index, Delta(role="assistant", content="")) for index in range(len(found))])
        # Nearly every event is text and nothing else: what lies around the text is made once.
        plain = not continuous and not found[0].parses
        around = [
            chunk([ChunkChoice(index, Delta(content=_HERE))]).partition(encode(_HERE)) for index in range(len(found))
        ]
        try:
            async with aclosing(answer.outputs()) as outputs:
                async for _, output in outputs:
                    if plain and output.finish_reason is None and output.logprobs is None:
                        if output.text:
                            head, _, tail = around[output.index]
                            yield head + encode(output.text) + tail
                        continue
                    generated += len(output.token_ids)
                    # Several pieces of one delta are chunks of their own: clients read a chunk's first choice alone.
                    choices = self._choices(output, found[output.index])
                    if choices:
                        yield b"".join(chunk([choice]) for choice in choices)
        except Exception as error:
            yield data(self.service.refusal(error).payload())
        else:
            if include:
                usage = answer.usage()
                yield data(ChatChunk(self.id, self.created, self.model, [], usage))
        yield DONE

    def _choices(self, output: RequestOutput, turn: Turn) -> list[ChunkChoice]:
        logprobs = chat_logprobs(output, self.tokenizer)
        ended = output.finish_reason
        pieces = turn.push(output.text)
        if ended is not None:
            pieces = pieces + turn.finish()
        found = [ChunkChoice(output.index, _delta(piece)) for piece in pieces]
        if not found and (ended is not None or (logprobs is not None and logprobs.content)):
            found.append(ChunkChoice(output.index, Delta()))
        if found:
            found[0].logprobs = logprobs
            if ended is not None:
                found[-1].finish_reason = finish_reason(ended, turn)
        return found


def finish_reason(ended: FinishReason, turn: Turn) -> str:
    """OpenAI's word for it."""
    return "tool_calls" if turn.calls and ended is FinishReason.STOP else str(ended)


def routes(service: Service) -> list[Route]:
    """The route."""

    async def create(request: Request) -> Response:
        body, headers = await service.read(request, BODY)
        request.state.names = {"prompt": "messages"}
        if body.max_completion_tokens is not None:
            request.state.names["max_tokens"] = "max_completion_tokens"
        chat = Chat(service, body, request.state.request_id)
        if body.stream:
            begun = await unless_gone(request.receive, chat.begin())
            if begun is None:
                return Response(status_code=499)
            return EventStream(chat.events(*begun), headers, service.settings.ping_seconds)
        completion = await unless_gone(request.receive, chat.whole())
        return reply(completion, 499 if completion is None else 200, headers)

    return [Route("/v1/chat/completions", create, methods=["POST"])]


def _delta(piece: Piece) -> Delta:
    if isinstance(piece, Text):
        return Delta(content=piece.text)
    if isinstance(piece, Reasoning):
        return Delta(reasoning_content=piece.text)
    return Delta(tool_calls=[_call(piece, index=piece.index)])


def _call(call: ToolCall, index: int | msgspec.UnsetType = msgspec.UNSET) -> Call:
    return Call(call.call_id, Function(call.name, call.arguments), "function", index)


class _Choice:
    """One branch, gathered."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[Call] = []
        self._logprobs: list[ChatLogprob] | None = None
        self._ended = FinishReason.STOP

    def add(self, output: RequestOutput, turn: Turn, tokenizer: Tokenizer) -> None:
        logprobs = chat_logprobs(output, tokenizer)
        if logprobs is not None:
            self._logprobs = (self._logprobs or []) + logprobs.content
        pieces = turn.push(output.text)
        if output.finish_reason is not None:
            self._ended = output.finish_reason
            pieces = pieces + turn.finish()
        for piece in pieces:
            if isinstance(piece, Text):
                self._content.append(piece.text)
            elif isinstance(piece, Reasoning):
                self._reasoning.append(piece.text)
            else:
                self._calls.append(_call(piece))

    def choice(self, index: int, turn: Turn) -> ChatChoice:
        content = "".join(self._content)
        message = Message(None if self._calls and not content else content)
        if self._reasoning:
            message.reasoning_content = "".join(self._reasoning)
        if self._calls:
            message.tool_calls = self._calls
        logprobs = None if self._logprobs is None else ChatLogprobs(self._logprobs)
        return ChatChoice(index, message, finish_reason(self._ended, turn), logprobs)
