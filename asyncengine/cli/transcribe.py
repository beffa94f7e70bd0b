"""``asyncengine transcribe``: what is said in audio files, to standard output, in their order."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asyncengine.cli.command import Failure, as_json, encodable
from asyncengine.cli.flags import AnsweringFlags, GenerationFlags
from asyncengine.errors import AsyncEngineError, InvalidRequestError

if TYPE_CHECKING:
    from asyncengine.generation import GenerationConfig
    from asyncengine.loop.engine import AsyncEngine
    from asyncengine.loop.prepare import RequestOptions
    from asyncengine.outputs import Transcript


class Form(StrEnum):
    """How transcripts are written."""

    TEXT = "text"
    JSON = "json"
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
        Form, typer.Option("--format", help="json is an object per file; srt and vtt take one.")
    ] = Form.TEXT,
    *,
    generation: GenerationFlags,
    flags: AnsweringFlags,
) -> int:
    """Write down what is said in each FILE, with a MODEL that transcribes, such as Whisper.

    Files are heard at the same time, and written in their order. Exit status 1: some file failed.
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
        return runner.run(Listening(engine, config, options, language, hint, translate, form).run(files))


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

    async def run(self, files: list[Path]) -> int:
        """Hears all files; returns the exit status."""
        import asyncio

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

    def _write(self, path: Path, found: Transcript | AsyncEngineError, files: int) -> bool:
        """Writes what is said in one of so many files; says whether it could be heard."""
        if isinstance(found, AsyncEngineError):
            print(f"asyncengine: {path}: {found}", file=sys.stderr, flush=True)
            return False
        written = self._written(path, found)
        print(encodable(f"{path}: {written}" if self.form is Form.TEXT and files > 1 else written), flush=True)
        return True

    async def _hear(self, path: Path) -> Transcript | AsyncEngineError:
        import asyncio

        try:
            return await self.engine.transcribe(
                await asyncio.to_thread(path.read_bytes),
                self.config,
                self.options,
                language=self.language,
                hint=self.hint,
                task="translate" if self.translate else "transcribe",
                timestamps=self.form is not Form.TEXT,
            )
        except OSError as error:
            return InvalidRequestError(error.strerror or str(error))
        except AsyncEngineError as error:
            if str(error).startswith("timestamps "):
                return InvalidRequestError(
                    f"--format is {self.form.value}, and the model knows no times; allowed: text"
                )
            return error

    def _written(self, path: Path, found: Transcript) -> str:
        from asyncengine import subtitles

        if self.form is Form.TEXT:
            return found.text
        if self.form is Form.SRT:
            return subtitles.srt(found.segments)
        if self.form is Form.VTT:
            return subtitles.vtt(found.segments)
        segments = [{"start": each.start, "end": each.end, "text": each.text} for each in found.segments]
        about = {"file": str(path), "text": found.text, "language": found.language, "seconds": found.seconds}
        return as_json(about | {"segments": segments})
