"""``/v1/audio/transcriptions`` and ``translations``: what is said in a file, by models that are trained to be asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asyncengine import subtitles
from asyncengine.errors import InvalidRequestError
from asyncengine.fallback import TranscriptionFallback
from asyncengine.generation import GenerationConfig
from asyncengine.loop.prepare import RequestOptions
from asyncengine.loop.transcript_stream import TranscriptStream
from asyncengine.outputs import FinishReason, Transcript, TranscriptSegment, Usage
from asyncengine.server.answer import new_id
from asyncengine.server.form import read_form
from asyncengine.server.reading import found
from asyncengine.server.refusal import Refusal
from asyncengine.server.service import Service, reply
from asyncengine.server.sse import DONE, EventStream, data
from asyncengine.server.wire import Body
from asyncengine.transcription import Timestamps, TranscriptionTask

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
    stream: bool = False
    fallback: bool = False


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
    temperature: float | None
    compression_ratio: float | None
    seek: int
    avg_logprob: float | None
    no_speech_prob: float | None


class Word(msgspec.Struct):
    """A word of the text, without space around it."""

    word: str
    start: float
    end: float


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
    usage: DurationUsage | None
    segments: list[Segment] | msgspec.UnsetType = msgspec.UNSET
    words: list[Word] | msgspec.UnsetType = msgspec.UNSET


class TextDelta(msgspec.Struct):
    """What has come of an answer that is streamed."""

    delta: str
    type: str = "transcript.text.delta"


class TextDone(msgspec.Struct):
    """The end of an answer that is streamed."""

    text: str
    usage: TranscriptionUsage
    type: str = "transcript.text.done"


_REFUSED = {
    "chunking_strategy": "how a long file is cut is the engine's",
    "include[]": "there are no log-probabilities of transcripts",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {"chunking_strategy": ("auto",)}
_STREAMED = ("json", "text")
_TRUTHS = {"true": True, "false": False}
BODY = Body(TranscriptionBody, ignored=frozenset({"user"}), refused=_REFUSED, harmless=_HARMLESS)
TRANSLATION = Body(TranslationBody, ignored=frozenset({"user"}), refused=_REFUSED, harmless=_HARMLESS)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a form asks for."""

    task: TranscriptionTask
    body: TranslationBody
    headers: dict[str, str]

    @property
    def granularities(self) -> list[str]:
        """Of which parts of the text there are times in `verbose_json`."""
        return getattr(self.body, "timestamp_granularities", []) or ["segment"]

    @property
    def timestamps(self) -> Timestamps:
        """Which times that has."""
        return "word" if "word" in self.granularities else self.body.response_format in ("verbose_json", "srt", "vtt")


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
    asked = _Asked(task, *shape.read({name: _read(name, value) for name, value in fields.items() if value}))
    body = asked.body
    if isinstance(body, TranscriptionBody):
        _check_times(body)
    if body.stream and body.response_format not in _STREAMED:
        message = f"stream is true, and response_format is {body.response_format!r}; allowed: 'json', 'text'"
        raise Refusal(400, message, "invalid_field", "response_format")
    served = service.check_serving(body.model)
    if len(file) > (most := service.settings.max_audio_bytes):
        raise Refusal(400, f"file has {len(file)} bytes; allowed: max_audio_bytes = {most}", "invalid_field", "file")
    try:
        # A temperature of 0 is OpenAI's word for one that may rise.
        temperature = (body.temperature or None) if body.fallback else body.temperature or 0.0
        transcript = service.engine.transcribe(
            file,
            GenerationConfig(temperature=temperature),
            RequestOptions(
                request_id=new_id("transcr"),
                label=request.state.request_id,
                when_full="raise",
                adapter=served.adapter,
            ),
            language=getattr(body, "language", None),
            hint=body.prompt,
            task=task,
            timestamps=asked.timestamps,
            fallback=TranscriptionFallback() if body.fallback else None,
        )
        if body.stream:
            begun = await found(service, request, transcript.__aenter__())
            if begun is None:
                return Response(status_code=499)
            return EventStream(_events(service, begun), asked.headers, service.settings.ping_seconds)
        read = await found(service, request, transcript)
    except InvalidRequestError as error:
        raise _refusal(error, body) from error
    return Response(status_code=499) if read is None else _written(_whole(service, read), asked)


async def _events(service: Service, stream: TranscriptStream) -> AsyncGenerator[bytes, None]:
    """A transcript as it comes. Leaving ends it."""
    try:
        async with stream:
            async for delta in stream:
                if delta.text:
                    yield data(TextDelta(delta.text))
            read = _whole(service, await stream)
        yield data(TextDone(read.text, _usage(read.usage)))
    except Exception as error:
        yield data(service.refusal(error).payload())
    yield DONE


def _refusal(error: InvalidRequestError, body: TranslationBody) -> Exception:
    """What a client is told of what the engine does not take, in the words of its form."""
    name, _, said = str(error).partition(" ")
    if name == "timestamps" and "no times of words: " in said:
        why = said.partition("no times of words: ")[2]
        message = f"{_TIMES} has 'word', and the model knows no times of words: {why}; allowed: 'segment'"
        return Refusal(400, message, "invalid_field", _TIMES)
    if name == "audio[0]:":
        return Refusal(400, f"file cannot be taken: {said}", "invalid_field", "file")
    if name == "timestamps":
        message = f"response_format is {body.response_format!r}, and the model knows no times; allowed: 'json', 'text'"
        return Refusal(400, message, "invalid_field", "response_format")
    return error


def _whole(service: Service, read: Transcript) -> Transcript:
    """A transcript of which nothing was aborted.

    Raises:
        Refusal: Something was.
    """
    if read.finish_reason is FinishReason.ABORT:
        retry = {"retry-after": str(service.settings.retry_after_seconds)}
        raise Refusal(503, "the request was aborted before its end", "request_aborted", None, retry)
    return read


def _check_times(body: TranscriptionBody) -> None:
    """Refuses times that nobody knows, or that there is no place for in the answer."""
    times, form = body.timestamp_granularities, body.response_format
    message = ""
    if strange := [each for each in times if each not in ("segment", "word")]:
        message = f"{_TIMES} has {strange[0]!r:.40}; allowed: 'segment', 'word'"
    elif times and form != "verbose_json":
        message = f"{_TIMES} needs the response_format 'verbose_json'; it is {form!r}"
    if message:
        raise Refusal(400, message, "invalid_field", _TIMES)


def _written(read: Transcript, asked: _Asked) -> Response:
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
    usage = None if read.seconds is None else DurationUsage(read.seconds)
    verbose = VerboseTranscription(asked.task, read.language, read.seconds, read.text, usage)
    if "segment" in asked.granularities:
        verbose.segments = [_segment(number, segment) for number, segment in enumerate(read.segments)]
    if "word" in asked.granularities:
        said = ((word.word.strip(), word) for word in read.words)
        verbose.words = [Word(text, round(word.start, 3), round(word.end, 3)) for text, word in said if text]
    return reply(verbose, headers=headers)


def _segment(number: int, segment: TranscriptSegment) -> Segment:
    return Segment(
        number,
        round(segment.start, 3),
        round(segment.end, 3),
        segment.text,
        list(segment.token_ids),
        segment.temperature,
        segment.compression_ratio,
        segment.seek,
        segment.avg_logprob,
        segment.no_speech_prob,
    )


def _read(name: str, value: Any) -> Any:
    """The value of a form's field; all of them are texts."""
    if name in ("stream", "fallback"):
        if (found := _TRUTHS.get(str(value).lower())) is None:
            raise Refusal(400, f"{name} is {value!r:.40}; allowed: 'true', 'false'", "invalid_field", name)
        return found
    if name != "temperature":
        return value
    try:
        return float(value)
    except ValueError as error:
        raise Refusal(400, f"temperature is {value!r:.40}; expected a number", "invalid_field", name) from error


def _usage(usage: Usage) -> TranscriptionUsage:
    details = TokenDetails(usage.prompt_tokens - usage.audio_tokens, usage.audio_tokens)
    return TranscriptionUsage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, details)
