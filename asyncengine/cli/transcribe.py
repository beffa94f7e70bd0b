"""``asyncengine transcribe``: what is said in audio files, to standard output, in their order."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncengine.cli.command import Failure, as_json, encodable
from asyncengine.cli.flags import AnsweringFlags, GenerationFlags
from asyncengine.errors import AsyncEngineError, InvalidRequestError

if TYPE_CHECKING:
    from asyncengine.generation import GenerationConfig
    from asyncengine.loop.engine import AsyncEngine
    from asyncengine.loop.prepare import RequestOptions
    from asyncengine.loop.transcript_stream import TranscriptStream
    from asyncengine.outputs import Transcript


_OF_WORDS = ("word", "start", "end", "probability")
_OF_SEGMENTS = ("start", "end", "text", "avg_logprob", "compression_ratio", "no_speech_prob", "temperature")


class Form(StrEnum):
    """How transcripts are written."""

    TEXT = "text"
    JSON = "json"
    WORDS = "words"
    SRT = "srt"
    VTT = "vtt"


def transcribe(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, or id in the local cache.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="WAV, FLAC, MP3, Ogg and others.")],
    language: Annotated[str | None, typer.Option(help="That is spoken; without, it is found out.")] = None,
    hint: Annotated[str | None, typer.Option(help="What it is about, or words that are in it.")] = None,
    translate: Annotated[bool, typer.Option("--translate", help="Into English.")] = False,
    form: Annotated[
        Form,
        typer.Option(
            "--format", help="json and words, which has their times, are an object per file; srt and vtt take one."
        ),
    ] = Form.TEXT,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="What looks wrong is written down anew, at higher temperatures.")
    ] = False,
    *,
    generation: GenerationFlags,
    flags: AnsweringFlags,
) -> int:
    """Write down what is said in each FILE, with a MODEL that transcribes, such as Whisper.

    Files are heard at the same time, and written in their order; what is said in a single one as it comes. Exit status
    1: some file failed.
    """
    if form in (Form.SRT, Form.VTT) and len(files) > 1:
        raise Failure(f"--format is {form.value}, and there are {len(files)} files; such a file is of one", 2)
    for path in files:
        if not path.is_file():
            raise Failure(f"{str(path)!r} is not a file", 2)
    config = generation.config()
    engine_config, options = flags.config(model, ctx.obj), flags.options()
    from asyncengine.cli.loading import loaded

    with loaded(engine_config, ctx.obj) as (engine, runner):
        return runner.run(Listening(engine, config, options, language, hint, translate, form, fallback).run(files))


@dataclass(frozen=True, slots=True)
class Listening:
    """How files are heard and written."""

    engine: AsyncEngine
    config: GenerationConfig
    options: RequestOptions
    language: str | None
    hint: str | None
    translate: bool
    form: Form
    fallback: bool

    async def run(self, files: list[Path]) -> int:
        """Hears all files; returns the exit status."""
        import asyncio

        if len(files) == 1 and self.form not in (Form.JSON, Form.WORDS):
            return await self._write_as_it_comes(files[0])
        loaded = self.engine.complete_engine_config
        assert loaded is not None and loaded.max_num_sequence is not None
        failed, at_once = False, asyncio.Semaphore(2 * loaded.max_num_sequence)
        gone: BrokenPipeError | None = None

        async def hear(path: Path) -> Transcript | AsyncEngineError:
            async with at_once:
                return await self._hear(path)

        async with asyncio.TaskGroup() as group:
            heard = [group.create_task(hear(path)) for path in files]
            for path, task in zip(files, heard, strict=True):
                try:
                    failed = not self._write(path, await task, len(files)) or failed
                except BrokenPipeError as error:  # nobody reads on
                    gone = error
                    break
            for task in heard:
                task.cancel()
        if gone is not None:
            raise gone
        return int(failed)

    async def _write_as_it_comes(self, path: Path) -> int:
        """Writes what is said in a single file; returns the exit status."""
        from asyncengine.subtitles import VTT_BEGIN, srt_cue, vtt_cue

        numbers, written = itertools.count(1), ""
        begin = VTT_BEGIN if self.form is Form.VTT else ""
        blank, begun = "\n" if begin else "", bool(begin)
        try:
            async with await self._transcript(path) as stream:
                print(begin, end="", flush=True)
                async for delta in stream:
                    written = delta.text if self.form is Form.TEXT else ""
                    for segment in delta.segments:
                        cue = srt_cue(next(numbers), segment) if self.form is Form.SRT else vtt_cue(segment)
                        written, blank = written + blank + cue, "\n"
                    print(encodable(written), end="", flush=True)
                    begun = begun or bool(written)
        except AsyncEngineError as error:
            if begun:
                print(flush=True)
            return self._failed(path, error)
        print(flush=True)
        return 0

    def _failed(self, path: Path, error: AsyncEngineError) -> int:
        if str(error).startswith("timestamps "):
            why = str(error).partition("; ")[2]
            allowed = "text, json, srt, vtt" if "times of words" in why else "text"
            error = InvalidRequestError(f"--format is {self.form.value}, and {why}; allowed: {allowed}")
        print(f"asyncengine: {path}: {error}", file=sys.stderr, flush=True)
        return 1

    def _write(self, path: Path, found: Transcript | AsyncEngineError, files: int) -> bool:
        """Writes what is said in one of so many files; says whether it could be heard."""
        if isinstance(found, AsyncEngineError):
            self._failed(path, found)
            return False
        written = self._written(path, found)
        print(encodable(f"{path}: {written}" if self.form is Form.TEXT and files > 1 else written), flush=True)
        return True

    async def _transcript(self, path: Path) -> TranscriptStream:
        """What is said in a file, which has not begun.

        Raises:
            InvalidRequestError: It cannot be read.
        """
        import asyncio

        from asyncengine.fallback import TranscriptionFallback

        try:
            audio = await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            raise InvalidRequestError(error.strerror or str(error)) from error
        return self.engine.transcribe(
            audio,
            self.config,
            self.options,
            language=self.language,
            hint=self.hint,
            task="translate" if self.translate else "transcribe",
            timestamps="word" if self.form is Form.WORDS else self.form is not Form.TEXT,
            fallback=TranscriptionFallback() if self.fallback else None,
        )

    async def _hear(self, path: Path) -> Transcript | AsyncEngineError:
        try:
            return await (await self._transcript(path))
        except AsyncEngineError as error:
            return error

    def _written(self, path: Path, found: Transcript) -> str:
        """Of one of several files, or as JSON."""
        if self.form is Form.TEXT:
            return found.text
        segments = [_fields(each, _OF_SEGMENTS) for each in found.segments]
        if self.form is Form.WORDS:
            for written, segment in zip(segments, found.segments, strict=True):
                written["words"] = [_fields(each, _OF_WORDS) for each in segment.words]
        about = {"file": str(path), "text": found.text, "language": found.language, "seconds": found.seconds}
        return as_json(about | {"segments": segments})


def _fields(value: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}
