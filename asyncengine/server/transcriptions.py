"""``/v1/audio/transcriptions``: what is said in a file, by a model that is trained to be asked for that."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asyncengine.errors import InvalidRequestError
from asyncengine.generation import GenerationConfig
from asyncengine.loop.prepare import RequestOptions
from asyncengine.outputs import Usage
from asyncengine.server.answer import new_id
from asyncengine.server.form import read_form
from asyncengine.server.reading import found
from asyncengine.server.refusal import Refusal
from asyncengine.server.service import Service, reply
from asyncengine.server.wire import Body

_NAMES = {"hint": "prompt", "language": "language", "prompt": "file"}


class TranscriptionBody(msgspec.Struct, kw_only=True):
    """What the route takes beside the file."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text"] = "json"
    temperature: float = 0.0


class TokenDetails(msgspec.Struct):
    """Of a prompt's tokens."""

    text_tokens: int
    audio_tokens: int


class TranscriptionUsage(msgspec.Struct):
    """Token counts."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_token_details: TokenDetails
    type: str = "tokens"


class Transcription(msgspec.Struct):
    """The answer."""

    text: str
    usage: TranscriptionUsage


BODY = Body(
    TranscriptionBody,
    ignored=frozenset({"user"}),
    refused={
        "stream": "a transcript comes whole",
        "chunking_strategy": "a file is heard whole, or refused where it is too long for the model",
        "include[]": "there are no log-probabilities of transcripts",
        "timestamp_granularities[]": "there are no timestamps",
    },
    harmless={"stream": ("false", "False"), "chunking_strategy": ("auto",)},
)


def routes(service: Service) -> list[Route]:
    """The route."""

    async def create(request: Request) -> Response:
        request.state.names = _NAMES
        fields, file = await read_form(request, service.settings, "file")
        body, headers = BODY.read({name: _number(name, value) for name, value in fields.items() if value})
        served = service.check_serving(body.model)
        if len(file) > (most := service.settings.max_audio_bytes):
            raise Refusal(
                400, f"file has {len(file)} bytes; allowed: max_audio_bytes = {most}", "invalid_field", "file"
            )
        config = GenerationConfig(temperature=body.temperature)
        options = RequestOptions(
            request_id=new_id("transcr"), label=request.state.request_id, when_full="raise", adapter=served.adapter
        )
        asked = service.engine.transcribe(file, config, options, language=body.language, hint=body.prompt)
        try:
            read = await found(service, request, asked)
        except InvalidRequestError as error:
            if not str(error).startswith("audio[0]: "):
                raise
            said = str(error).removeprefix("audio[0]: ")
            raise Refusal(400, f"file cannot be taken: {said}", "invalid_field", "file") from error
        if read is None:
            return Response(status_code=499)
        if body.response_format == "text":
            return PlainTextResponse(read.text, headers=headers)
        return reply(Transcription(read.text, _usage(read.usage)), headers=headers)

    return [Route("/v1/audio/transcriptions", create, methods=["POST"])]


def _number(name: str, value: str) -> str | float:
    """The value of a form's field; all of them are texts."""
    if name != "temperature":
        return value
    try:
        return float(value)
    except ValueError as error:
        raise Refusal(400, f"temperature is {value!r:.40}; expected a number", "invalid_field", name) from error


def _usage(usage: Usage) -> TranscriptionUsage:
    details = TokenDetails(usage.prompt_tokens - usage.audio_tokens, usage.audio_tokens)
    return TranscriptionUsage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, details)
