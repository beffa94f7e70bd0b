"""``asyncengine chat``: a conversation in the terminal, or one question per line of a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncengine.cli.command import Failure, read_utf8
from asyncengine.cli.flags import AnsweringFlags, GenerationFlags, Model

if TYPE_CHECKING:
    import asyncio

    from asyncengine.generation import GenerationConfig
    from asyncengine.loop.engine import AsyncEngine
    from asyncengine.loop.prepare import RequestOptions

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def chat(
    ctx: typer.Context,
    model: Model = "tiny",
    system: Annotated[str | None, typer.Option(help="What the model is told before anything else.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="An image, before the first question; may be given several times."),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Audio, before the first question; may be given several times."),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A video, before the first question; may be given several times."),
    ] = None,
    *,
    generation: GenerationFlags,
    flags: AnsweringFlags,
) -> int:
    """Talk to MODEL.

    In a terminal: /reset forgets the conversation, /exit leaves, Ctrl-C stops the answer and not the program. From
    a pipe, every line is a question, and the conversation goes on from line to line.
    """
    config = generation.config()
    media = [{"type": "image", "image": _read(path, "--image")} for path in image or ()]
    media += [{"type": "audio", "audio": _read(path, "--audio")} for path in audio or ()]
    media += [{"type": "video", "video": _read(path, "--video")} for path in video or ()]
    engine_config, options = flags.config(model, ctx.obj), flags.options()
    from asyncengine.cli.loading import loaded

    with loaded(engine_config, ctx.obj) as (engine, runner):
        talk = Conversation(engine, runner, config, options, system, media)
        talk.check_media()
        return talk.run(sys.stdin.isatty())


class Conversation:
    """What has been said so far, and how it goes on.

    Args:
        engine: With a model.
        runner: On which the engine is used.
        config: How answers are generated.
        options: How requests are handled.
        system: What the model is told before anything else.
        media: Parts of a message, images, audio and videos, which go before the first question.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        runner: asyncio.Runner,
        config: GenerationConfig,
        options: RequestOptions,
        system: str | None,
        media: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._engine = engine
        self._runner = runner
        self._config = config
        self._options = options
        self._begin: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._begin)
        self._media = media

    def check_media(self) -> None:
        """Has the images, the audio and the videos read, before anybody asks about them.

        Raises:
            InvalidRequestError: One is not what it should be, or the model takes none.
        """
        if self._media:
            self._runner.run(self._engine.tokenize_chat([*self._begin, self._said("?")]))

    def run(self, interactive: bool) -> int:
        """Asks and answers until the questions end; returns the exit status."""
        failed = False
        if interactive:
            print(_HELP)
        for question in _typed() if interactive else _piped():
            match question.strip():
                case "":
                    pass
                case "/exit" | "/quit":
                    break
                case "/reset":
                    self._messages = list(self._begin)
                    if interactive:
                        print("The conversation begins anew.")
                case "/help":
                    print(_HELP)
                case word if interactive and word.startswith("/") and " " not in word:
                    print(f"There is no {word}. {_HELP}")
                case _:
                    failed = not self._ask(question) or failed
        return int(failed and not interactive)

    def _ask(self, question: str) -> bool:
        """Prints the answer as it comes; one that fails leaves no trace in the conversation."""
        from asyncengine.errors import AsyncEngineError

        self._messages.append(self._said(question))
        pieces: list[str] = []
        try:
            self._runner.run(self._answer(pieces))
        except KeyboardInterrupt:  # the task was cancelled, which has ended the request
            print(" [stopped]", flush=True)
        except AsyncEngineError as error:
            self._messages.pop()
            print(f"asyncengine: {error}", file=sys.stderr, flush=True)
            return False
        if any(pieces):
            self._messages.append({"role": "assistant", "content": "".join(pieces)})
        else:
            self._messages.pop()
        return True

    def _said(self, question: str) -> dict[str, Any]:
        """What the user says next; the first time, with the images, the audio and the videos."""
        if self._media and len(self._messages) == len(self._begin):
            return {"role": "user", "content": [*self._media, {"type": "text", "text": question}]}
        return {"role": "user", "content": question}

    async def _answer(self, pieces: list[str]) -> None:
        cut = False
        async with self._engine.chat(self._messages, self._config, self._options) as stream:
            async for output in stream:
                pieces.append(output.text)
                print(output.text, end="", flush=True)
                cut = output.finish_reason == "length"
        print(" [cut off: the limit is reached]" if cut else "", flush=True)


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Failure(f"{flag} is {str(path)!r}; {error.strerror or error}", 2) from error


def _typed() -> Iterator[str]:
    """Lines that somebody types, with editing and history where Python has them."""
    try:
        import readline  # noqa: F401  # gives `input` its editing
    except ImportError:
        pass
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{_HELP}")


def _piped() -> Iterator[str]:
    read_utf8()
    for line in sys.stdin:
        yield line.rstrip("\n")
