"""``/v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.detokenizer import BEFORE
from asyncengine.loop.encoding import Prompt, TextPrompt
from asyncengine.loop.stream import RequestStream
from asyncengine.outputs import FinishReason, RequestOutput
from asyncengine.server.answer import Answer, new_id, now
from asyncengine.server.chunks import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptLogprobs,
    UsageRecord,
)
from asyncengine.server.infilling import around_gap
from asyncengine.server.logprobs import CompletionTokens, joined, prompt_logprobs
from asyncengine.server.prompts import prompts_of
from asyncengine.server.refusal import Refusal
from asyncengine.server.sampling import IGNORED, OTHERS, Sampling, generation_config, request_options
from asyncengine.server.service import Service, reply
from asyncengine.server.sse import DONE, EventStream, data, unless_gone
from asyncengine.server.wire import Body
from asyncengine.source import SourcePrompt

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionBody(Sampling, kw_only=True):
    """What the route takes."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    decoder: str | list[int] = ""
    src_lang: str | None = None
    tgt_lang: str | None = None


BODY = Body(
    CompletionBody,
    ignored=IGNORED,
    refused=OTHERS
    | {
        "messages": "it is a field of /v1/chat/completions",
        "tools": "it is a field of /v1/chat/completions",
        "top_logprobs": "here, logprobs is the number",
        "max_completion_tokens": "it is a field of /v1/chat/completions; use max_tokens",
    },
)


class Completing:
    """One request to the route, checked."""

    def __init__(self, service: Service, body: CompletionBody, label: str) -> None:
        self.service = service
        self.body = body
        served = service.check_serving(body.model)
        self.model = served.name
        self.id = new_id("cmpl")
        self.created = now()
        self.tokenizer = service.tokenizer()
        if body.best_of is not None and body.best_of != body.n:
            message = f"best_of is {body.best_of}; allowed: n = {body.n}: branches are not ranked"
            raise Refusal(400, message, "unsupported_field", "best_of")
        changes: dict[str, Any] = {"logprobs": body.logprobs is not None, "top_logprobs": body.logprobs or 0}
        echoes = body.echo and body.logprobs is not None
        if echoes or body.prompt_logprobs is not None:
            wanted = (body.prompt_logprobs, body.logprobs if echoes else None)
            numbers = [number for number in wanted if number is not None]
            changes["prompt_logprobs"] = max(numbers) if min(numbers) >= 0 else min(numbers)  # which is refused
        if body.max_tokens is None:
            changes["max_tokens"] = max(DEFAULT_MAX_TOKENS, body.min_tokens)
        self.config = generation_config(body, **changes)
        self.options = request_options(body, self.id, label, served.adapter)
        self.prompts = prompts_of(body.prompt, "prompt")
        if body.suffix:
            if body.echo:
                raise Refusal(400, "echo beside suffix: there is no text to repeat", "unsupported_field", "echo")
            self.prompts = around_gap(self.prompts, body.suffix, self.tokenizer)
        self._asked: list[Prompt] = list(self.prompts)
        if body.decoder or body.src_lang is not None or body.tgt_lang is not None:
            self._asked = [SourcePrompt(each, body.decoder, body.src_lang, body.tgt_lang) for each in self.prompts]

    async def begin(self) -> Answer:
        """Adds the requests to the engine."""
        engine = self.service.engine
        if len(self.prompts) == 1:
            return Answer((await engine.add_request(self._asked[0], self.config, self.options),), self.service)
        many = engine.generate_many(self._asked, self.config, self.options)
        await many.__aenter__()
        return Answer(many.streams, self.service, many)

    async def whole(self) -> Completion:
        """The answer, once it is complete."""
        answer = await self.begin()
        choices = self._choices(answer)
        async with aclosing(answer.outputs()) as outputs:
            async for prompt, output in outputs:
                choices[prompt * self.body.n + output.index].add(output)
        made = [choice.choice() for choice in choices]
        return Completion(self.id, self.created, self.model, made, answer.usage())

    async def events(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        """The answer as it comes."""
        options = self.body.stream_options
        include = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        usage: UsageRecord | msgspec.UnsetType | None = None if include else msgspec.UNSET
        prompt_tokens, generated = answer.prompt_tokens(), 0
        choices = self._choices(answer)
        try:
            async with aclosing(answer.outputs()) as outputs:
                async for prompt, output in outputs:
                    generated += len(output.token_ids)
                    if continuous:
                        usage = UsageRecord(prompt_tokens, generated, prompt_tokens + generated)
                    choice = choices[prompt * self.body.n + output.index].delta(output)
                    if choice is not None:
                        yield data(Completion(self.id, self.created, self.model, [choice], usage))
        except Exception as error:
            yield data(self.service.refusal(error).payload())
        else:
            if include:
                yield data(Completion(self.id, self.created, self.model, [], answer.usage()))
        yield DONE

    def _choices(self, answer: Answer) -> list[_Choice]:
        return [
            _Choice(index * self.body.n + branch, echo, _Scores(self, answer.streams[index], prompt, echo))
            for index, prompt in enumerate(self.prompts)
            for echo in [self._echo(prompt)]
            for branch in range(self.body.n)
        ]

    def _echo(self, prompt: TextPrompt) -> str:
        if not self.body.echo:
            return ""
        if isinstance(prompt, str):
            return prompt
        return self.tokenizer.decode(list(prompt), self.body.skip_special_tokens)


def routes(service: Service) -> list[Route]:
    """The route."""

    async def create(request: Request) -> Response:
        body, headers = await service.read(request, BODY)
        request.state.names = {"top_logprobs": "logprobs", "prompts": "prompt"}
        completing = Completing(service, body, request.state.request_id)
        if body.stream:
            answer = await unless_gone(request.receive, completing.begin())
            if answer is None:
                return Response(status_code=499)
            return EventStream(completing.events(answer), headers, service.settings.ping_seconds)
        completion = await unless_gone(request.receive, completing.whole())
        return reply(completion, 499 if completion is None else 200, headers)

    return [Route("/v1/completions", create, methods=["POST"])]


class _Scores:
    """Log-probabilities of one branch: of the prompt, as soon as the branch begins, and of what follows."""

    def __init__(self, asked: Completing, stream: RequestStream, prompt: TextPrompt, echo: str) -> None:
        body, tokenizer = asked.body, asked.tokenizer
        self._echoes = body.echo and body.logprobs is not None
        before = stream.prompt_token_ids[-BEFORE:].tolist()
        self._tokens = CompletionTokens(
            tokenizer, body.logprobs or 0, self._echoes, body.skip_special_tokens, echo, before
        )
        self._written = isinstance(prompt, str)
        self._top = body.prompt_logprobs
        self._tokenizer = tokenizer
        self._stream = stream
        self._begun = False

    def of(self, output: RequestOutput) -> tuple[CompletionLogprobs | None, PromptLogprobs | msgspec.UnsetType]:
        """What a delta adds."""
        prompt, logprobs = self._stream.prompt_token_ids, self._stream.prompt_logprobs
        if self._begun or logprobs is None or len(logprobs) < len(prompt):  # fewer, if it was ended before
            return self._tokens.of(output), msgspec.UNSET
        self._begun = True
        ids = prompt.tolist()
        before = self._tokens.prompt(ids, logprobs, self._written) if self._echoes else None
        found = joined(before, self._tokens.of(output))
        return found, msgspec.UNSET if self._top is None else prompt_logprobs(ids, logprobs, self._top, self._tokenizer)


class _Choice:
    """One branch of one prompt."""

    def __init__(self, index: int, echo: str, scores: _Scores) -> None:
        self._index = index
        self._echo = echo
        self._scores = scores
        self._texts: list[str] = []
        self._logprobs: CompletionLogprobs | None = None
        self._prompt: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
        self._ended: FinishReason | None = None

    def delta(self, output: RequestOutput) -> CompletionChoice | None:
        """What a chunk adds; None if it is nothing yet."""
        text, self._echo = self._echo + output.text, ""
        logprobs, prompt = self._scores.of(output)
        if not text and output.finish_reason is None and not (logprobs is not None and logprobs.tokens):
            return None
        ended = None if output.finish_reason is None else str(output.finish_reason)
        return CompletionChoice(self._index, text, ended, logprobs, prompt)

    def add(self, output: RequestOutput) -> None:
        """Gathers a delta."""
        self._texts.append(output.text)
        self._ended = output.finish_reason or self._ended
        new, prompt = self._scores.of(output)
        self._logprobs = joined(self._logprobs, new)
        self._prompt = self._prompt if prompt is msgspec.UNSET else prompt

    def choice(self) -> CompletionChoice:
        """All that was gathered."""
        text = self._echo + "".join(self._texts)
        return CompletionChoice(self._index, text, str(self._ended), self._logprobs, self._prompt)
