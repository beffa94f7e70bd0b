"""`application`: the commands under one name, and `main`, the console script."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from asyncengine._version import __version__
from asyncengine.cli.command import command

COMMANDS = {
    "chat": "chat",
    "complete": "complete",
    "transcribe": "transcribe",
    "serve": "serve",
    "bench": "bench",
    "trace": "trace",
    "top": "top",
    "check": "check",
    "estimate": "estimate",
    "env": "environment",
}
"""The commands, and what their functions and the modules of those are called."""

_SETTINGS: dict[str, Any] = {
    "rich_markup_mode": None,  # plain help costs half as much
    "pretty_exceptions_enable": False,
}
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def application() -> typer.Typer:
    """All commands."""
    app = typer.Typer(
        name="asyncengine",
        help="An asyncio-native LLM serving core. MODEL is a checkpoint directory, the id of a model in the local "
        "Hugging Face cache, or 'tiny', which is part of the package. Nothing is ever downloaded.",
        no_args_is_help=True,
        context_settings=_CONTEXT,
        **_SETTINGS,
    )
    for name in COMMANDS:
        app.command(name)(command(_function(name)))
    app.callback()(_asyncengine)
    return app


def main(loader: Any = None) -> None:
    """Runs the command line of this process and ends it.

    Args:
        loader: How models are loaded, as in `AsyncEngine`; None loads them with transformers.
    """
    wanted, prog = sys.argv[1:], "asyncengine"
    if wanted and wanted[0] in COMMANDS and "_ASYNCENGINE_COMPLETE" not in os.environ:
        # Alone, a command needs neither the others nor what typer imports to read the options before it.
        app = typer.Typer(add_completion=False, **_SETTINGS)
        app.command(wanted[0], context_settings=_CONTEXT)(command(_function(wanted[0])))
        app(wanted[1:], obj=loader, prog_name=f"{prog} {wanted[0]}")
    else:
        application()(wanted, obj=loader, prog_name=prog)


def _function(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(f"asyncengine.cli.{COMMANDS[name]}"), COMMANDS[name])
    return function


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"asyncengine {__version__}")
        raise typer.Exit


def _asyncengine(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and end.")
    ] = False,
) -> None:
    pass
