"""What all commands share: flags in groups, and errors as one line and an exit status."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from asyncengine.cli.flags import FLAG_OF_FIELD
from asyncengine.errors import AsyncEngineError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class Failure(Exception):
    """Something that a command cannot do, in words for whoever runs it.

    Attributes:
        status: What the process exits with.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def given(ctx: typer.Context, name: str) -> bool:
    """Whether a parameter was given, and is not just its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def refuse(ctx: typer.Context, names: Iterable[str], because: str) -> None:
    """Refuses flags that would be passed over in silence.

    Raises:
        Failure: One of them was given.
    """
    for name in names:
        if given(ctx, name):
            raise Failure(f"--{name.replace('_', '-')} is given, {because}", 2)


def check_writable(flag: str, path: Path) -> None:
    """Refuses a file that could not be written in the end, before anything is done for it.

    Raises:
        Failure: There is no such directory, it is a directory itself, or it may not be written.
    """
    parent = path.parent
    if not parent.is_dir():
        reason = f"there is no directory {str(parent)!r}"
    elif path.is_dir():
        reason = "it is a directory; expected a file"
    elif not os.access(path if path.exists() else parent, os.W_OK):
        reason = "it may not be written"
    else:
        return
    raise Failure(f"{flag} is {str(path)!r}; {reason}", 2)


def read_utf8() -> None:
    """Has standard input read as UTF-8, whatever the terminal speaks; what is none becomes lone surrogates.

    No tokenizer takes those: the line that has them is refused, and no other.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def encodable(text: str) -> str:
    """A text with question marks where standard output has no such characters."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def as_json(entry: dict[str, Any]) -> str:
    """An object as JSON, with its characters as they are where standard output can take them."""
    text = json.dumps(entry, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(entry)
    return text


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function a command.

    A parameter whose type is a dataclass stands for the dataclass's fields: a flag is written once, however many
    commands have it. What the function returns is the exit status; errors of the engine and `Failure` are one line on
    standard error.
    """
    signature = inspect.signature(function, eval_str=True)
    hints = typing.get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if not dataclasses.is_dataclass(hints[name]):
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        group = groups[name] = typing.cast(type[Any], hints[name])
        fields = typing.get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=fields[field.name]
                )
            )

    @functools.wraps(function)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        try:
            status = function(**values)
        except Failure as error:
            raise _exit(str(error), error.status) from error
        except AsyncEngineError as error:
            raise _exit(_with_flags(str(error))) from error
        except KeyboardInterrupt as error:
            raise _exit("interrupted", INTERRUPTED) from error
        if status:
            raise typer.Exit(status)

    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = signature.replace(parameters=keyword_only, return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__
    return run


def _exit(message: str, status: int = 1) -> typer.Exit:
    sys.stdout.flush()
    typer.echo(f"asyncengine: {message}", err=True)
    return typer.Exit(status)


def _with_flags(message: str) -> str:
    """Names the flag wherever a message names the setting behind it."""
    return re.sub(
        r"\b(" + "|".join(FLAG_OF_FIELD) + r")\b", lambda found: f"{FLAG_OF_FIELD[found[1]]} ({found[1]})", message
    )
