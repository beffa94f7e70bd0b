"""``/v1/audio/transcriptions`` and ``translations``: what is said in a file, by models that are trained to be asked."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asyncengine import subtitles
from asyncengine.errors import InvalidRequestError
from asyncengine.generation import GenerationConfig
from asyncengine.loop.prepare import RequestOptions
from asyncengine.outputs import FinishReason, Transcript, TranscriptSegment, Usage
from asyncengine.server.answer import new_id
from asyncengine.server.form import read_form
from asyncengine.server.reading import found
from asyncengine.server.refusal import Refusal
from asyncengine.server.service import Service, reply
from asyncengine.server.wire import Body
from asyncengine.transcription import TranscriptionTask

_TIMES = "timestamp_granularities[]"
_NAMES = {
    "hint": "prompt", "language": "language", "prompt": "file", "task": "model",
}  # fmt: skip


class TranslationBody(msgspec.Struct, kw_only=True):
    """What the routes take beside the file."""

    model: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    temperature: float | None = None


class TranscriptionBody(TranslationBody, kw_only=True):
    """What is taken beside that where nothing is translated."""

    language: str | None = None
    timestamp_granularities: list[str] = msgspec.field(name=_TIMES, default_factory=list)


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


class Segment(msgspec.Struct):
    """A part of the text."""

    id: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    compression_ratio: float
    seek: int = 0
    avg_logprob: float | None = None
    no_speech_prob: float | None = None


class DurationUsage(msgspec.Struct):
    """How long the audio is."""

    seconds: float
    type: str = "duration"


class VerboseTranscription(msgspec.Struct):
    """The answer with times."""

    task: str
    language: str | None
    duration: float | None
    text: str
    segments: list[Segment]
    usage: DurationUsage | None


_REFUSED = {
    "stream": "a transcript comes whole",
    "chunking_strategy": "how a long file is cut is the engine's",
    "include[]": "there are no log-probabilities of transcripts",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {"stream": ("false", "False"), "chunking_strategy": ("auto",)}
BODY = Body(TranscriptionBody, ignored=frozenset({"user"}), refused=_REFUSED, harmless=_HARMLESS)
TRANSLATION = Body(TranslationBody, ignored=frozenset({"user"}), refused=_REFUSED, harmless=_HARMLESS)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a form asks for."""

    task: TranscriptionTask
    body: TranslationBody
    headers: dict[str, str]

    @property
    def timestamps(self) -> bool:
        """Whether that has times."""
        return self.body.response_format in ("verbose_json", "srt", "vtt")


def routes(service: Service) -> list[Route]:
    """The routes."""

    async def transcribe(request: Request) -> Response:
        return await _answer(service, request, "transcribe", BODY)

    async def translate(request: Request) -> Response:
        return await _answer(service, request, "translate", TRANSLATION)

    return [
        Route("/v1/audio/transcriptions", transcribe, methods=["POST"]),
        Route("/v1/audio/translations", translate, methods=["POST"]),
    ]


async def _answer(service: Service, request: Request, task: TranscriptionTask, shape: Body[Any]) -> Response:
    request.state.names = _NAMES
    fields, file = await read_form(request, service.settings, "file")
    asked = _Asked(task, *shape.read({name: _number(name, value) for name, value in fields.items() if value}))
    body = asked.body
    if isinstance(body, TranscriptionBody):
        _check_times(body)
    served = service.check_serving(body.model)
    if len(file) > (most := service.settings.max_audio_bytes):
        raise Refusal(400, f"file has {len(file)} bytes; allowed: max_audio_bytes = {most}", "invalid_field", "file")
    temperature = 0.0 if body.temperature is None else body.temperature
    transcribing = service.engine.transcribe(
        file,
        GenerationConfig(temperature=temperature),
        RequestOptions(
            request_id=new_id("transcr"), label=request.state.request_id, when_full="raise", adapter=served.adapter
        ),
        language=getattr(body, "language", None),
        hint=body.prompt,
        task=task,
        timestamps=asked.timestamps,
    )
    try:
        read = await found(service, request, transcribing)
    except InvalidRequestError as error:
        name, _, said = str(error).partition(" ")
        if name == "audio[0]:":
            raise Refusal(400, f"file cannot be taken: {said}", "invalid_field", "file") from error
        if name == "timestamps":
            message = (
                f"response_format is {body.response_format!r}, and the model knows no times; allowed: 'json', 'text'"
            )
            raise Refusal(400, message, "invalid_field", "response_format") from error
        raise
    if read is None:
        return Response(status_code=499)
    if read.finish_reason is FinishReason.ABORT:
        retry = {"retry-after": str(service.settings.retry_after_seconds)}
        raise Refusal(503, "the request was aborted before its end", "request_aborted", None, retry)
    return _written(read, asked, temperature)


def _check_times(body: TranscriptionBody) -> None:
    """Refuses times that nobody knows, or that there is no place for in the answer."""
    times, form = body.timestamp_granularities, body.response_format
    message = ""
    if strange := [each for each in times if each != "segment"]:
        message = f"{_TIMES} has {strange[0]!r:.40}; allowed: 'segment'"
    elif times and form != "verbose_json":
        message = f"{_TIMES} needs the response_format 'verbose_json'; it is {form!r}"
    if message:
        raise Refusal(400, message, "invalid_field", _TIMES)


def _written(read: Transcript, asked: _Asked, temperature: float) -> Response:
    """A transcript in the form in which it was asked for."""
    form, headers = asked.body.response_format, asked.headers
    if form == "text":
        return PlainTextResponse(read.text, headers=headers)
    if form == "srt":
        return PlainTextResponse(subtitles.srt(read.segments), headers=headers)
    if form == "vtt":
        return PlainTextResponse(subtitles.vtt(read.segments), headers=headers, media_type="text/vtt")
    if form == "json":
        return reply(Transcription(read.text, _usage(read.usage)), headers=headers)
    segments = [_segment(number, segment, temperature) for number, segment in enumerate(read.segments)]
    usage = None if read.seconds is None else DurationUsage(read.seconds)
    verbose = VerboseTranscription(asked.task, read.language, read.seconds, read.text, segments, usage)
    return reply(verbose, headers=headers)


def _segment(number: int, segment: TranscriptSegment, temperature: float) -> Segment:
    """With the ratio that tells text which repeats itself: openai-whisper distrusts more than 2.4."""
    data = segment.text.encode()
    ratio = len(data) / len(zlib.compress(data))
    return Segment(
        number,
        round(segment.start, 3),
        round(segment.end, 3),
        segment.text,
        list(segment.token_ids),
        temperature,
        ratio,
        avg_logprob=segment.logprob,
    )


def _number(name: str, value: Any) -> Any:
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
