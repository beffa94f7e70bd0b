"""``asyncengine complete``: prompts from standard input, answers to standard output, in order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncengine.cli.command import as_json, read_utf8
from asyncengine.cli.flags import AnsweringFlags, GenerationFlags, Model
from asyncengine.errors import AsyncEngineError, InvalidRequestError

if TYPE_CHECKING:
    from asyncengine.generation import GenerationConfig
    from asyncengine.loop.engine import AsyncEngine
    from asyncengine.loop.prepare import RequestOptions
    from asyncengine.outputs import RequestResult
    from asyncengine.source import SourcePrompt

_OF_SOURCES = ("decoder", "src_lang", "tgt_lang")
"""Fields of a line that are about the source."""


def complete(
    ctx: typer.Context,
    model: Model = "tiny",
    jsonl: Annotated[bool, typer.Option("--jsonl", help="A JSON object per line, in and out.")] = False,
    src_lang: Annotated[str | None, typer.Option(help="Language of the lines, for models that translate.")] = None,
    tgt_lang: Annotated[str | None, typer.Option(help="Language of the answers, for models that translate.")] = None,
    *,
    generation: GenerationFlags,
    flags: AnsweringFlags,
) -> int:
    """Complete every line of standard input with MODEL; answers go to standard output, in order.

    With --jsonl a line is {"prompt": "..."} or {"messages": [...]}, and may have an "id", which comes back, and
    fields of GenerationConfig for itself alone; an answer has "text", "finish_reason" and "usage", or "error".
    Without it, a line is a prompt, and an answer is printed as it is. For a model that translates or summarises, a
    prompt is the text that it reads, and a line of JSON may also have "src_lang", "tgt_lang" and "decoder". Exit
    status 1: some line failed.
    """
    config = generation.config()
    engine_config, options = flags.config(model, ctx.obj), flags.options()
    lines = _read_lines()
    if not lines:
        return 0
    from asyncengine.cli.loading import loaded

    with loaded(engine_config, ctx.obj) as (engine, runner):
        languages = {"src_lang": src_lang, "tgt_lang": tgt_lang}
        return runner.run(Completion(engine, config, options, jsonl, languages).run(lines))


@dataclass(frozen=True, slots=True)
class Line:
    """A line of standard input that is not blank; the first has number 1."""

    number: int
    text: str


def _read_lines() -> list[Line]:
    """All of standard input; nothing but an end of line ends a line, so that JSON may hold any character."""
    if sys.stdin.isatty():
        print("Prompts, one per line; Ctrl-D ends them.", file=sys.stderr, flush=True)
    read_utf8()
    texts = sys.stdin.read().removeprefix("\ufeff").split("\n")
    return [Line(number, text) for number, text in enumerate(texts, 1) if text.strip()]


@dataclass(frozen=True, slots=True)
class Ask:
    """One line: a prompt or a conversation, and how it is answered."""

    prompt: str | list[int] | SourcePrompt | None
    messages: list[dict[str, Any]] | None
    config: GenerationConfig


class Completion:
    """Many prompts, so many at a time as fit into two batches.

    Args:
        engine: With a model.
        config: How answers are generated where a line does not say.
        options: How requests are handled.
        jsonl: Whether lines are JSON.
        languages: Those of `SourcePrompt`, where a line does not say.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        config: GenerationConfig,
        options: RequestOptions,
        jsonl: bool,
        languages: Mapping[str, Any],
    ) -> None:
        self._engine = engine
        self._config = config
        self._options = options
        self._jsonl = jsonl
        self._languages = languages

    async def run(self, lines: list[Line]) -> int:
        """Answers all lines; returns the exit status."""
        import asyncio

        from asyncengine.cli.progress import bar

        loaded = self._engine.complete_engine_config
        assert loaded is not None and loaded.max_num_sequence is not None
        waiting: Iterator[tuple[int, Line]] = iter(enumerate(lines))
        answers: dict[int, RequestResult | AsyncEngineError] = {}
        written, failed = 0, False
        gone: list[BrokenPipeError] = []
        with bar("completing", len(lines)) as advance:

            async def work() -> None:
                nonlocal written, failed
                for index, line in waiting:
                    answers[index] = await self._answer(line.text)
                    while written in answers and not gone:
                        try:
                            failed = not self._write(written, lines[written], answers.pop(written)) or failed
                        except BrokenPipeError as error:
                            gone.append(error)
                        written += 1
                    if gone:
                        return
                    advance()

            async with asyncio.TaskGroup() as group:
                for _ in range(min(2 * loaded.max_num_sequence, len(lines))):
                    group.create_task(work())
        if gone:  # nobody reads on
            raise gone[0]
        return int(failed)

    async def _answer(self, line: str) -> RequestResult | AsyncEngineError:
        try:
            ask = self._read(line)
            if ask.messages is not None:
                return await self._engine.chat(ask.messages, ask.config, self._options)
            assert ask.prompt is not None
            return await self._engine.generate(ask.prompt, ask.config, self._options)
        except AsyncEngineError as error:
            return error

    def _read(self, line: str) -> Ask:
        if not self._jsonl:
            return Ask(self._prompt(line, {}), None, self._config)
        fields = _object(line)
        given = {name: fields.pop(name) for name in _OF_SOURCES if name in fields}
        prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
        fields.pop("id", None)
        if (prompt is None) == (messages is None):
            raise InvalidRequestError("expected one of 'prompt' and 'messages'")
        if given and messages is not None:
            raise InvalidRequestError(f"{next(iter(given))!r} beside 'messages': it goes with 'prompt'")
        asked = None if messages is not None else self._prompt(prompt, given)
        return Ask(asked, messages, self._config.replace(**fields))

    def _prompt(self, prompt: Any, given: Mapping[str, Any]) -> Any:
        """A line's prompt, with what is said of its languages and of how its answer begins."""
        said = {name: value for name, value in self._languages.items() if value is not None} | dict(given)
        if not said:
            return prompt
        from asyncengine.source import SourcePrompt

        return SourcePrompt(prompt, **said)

    def _write(self, index: int, line: Line, answer: RequestResult | AsyncEngineError) -> bool:
        """Writes an answer; says whether it is one."""
        good = not isinstance(answer, AsyncEngineError)
        if self._jsonl:
            print(as_json(_entry(index, line.text, answer)), flush=True)
        elif isinstance(answer, AsyncEngineError):
            print(flush=True)
            print(f"asyncengine: line {line.number}: {answer}", file=sys.stderr, flush=True)
        else:
            print(answer.text, flush=True)
        return good


def _object(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the line is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"the line is a JSON {type(fields).__name__}; expected an object")
    return fields


def _entry(index: int, line: str, answer: RequestResult | AsyncEngineError) -> dict[str, Any]:
    entry: dict[str, Any] = {"index": index}
    try:
        entry |= {"id": _object(line)["id"]}
    except (InvalidRequestError, KeyError):
        pass
    if isinstance(answer, AsyncEngineError):
        return entry | {"error": {"type": type(answer).__name__, "message": str(answer)}}
    texts = [branch.text for branch in answer.outputs]
    usage = {"prompt_tokens": answer.usage.prompt_tokens, "completion_tokens": answer.usage.completion_tokens}
    entry |= {"text": texts[0], "finish_reason": answer.finish_reason.value, "usage": usage}
    return entry | ({"texts": texts} if len(texts) > 1 else {})
