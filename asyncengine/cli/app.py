"""`app`: the commands under one name, and `main`, the console script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from asyncengine._version import __version__
from asyncengine.cli import bench, chat, check, complete, environment, estimate, serve, top, trace
from asyncengine.cli.command import command

app = typer.Typer(
    name="asyncengine",
    help="An asyncio-native LLM serving core. MODEL is a checkpoint directory, the id of a model in the local "
    "Hugging Face cache, or 'tiny', which is part of the package. Nothing is ever downloaded.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help costs half as much
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

_COMMANDS: dict[str, Callable[..., Any]] = {
    "chat": chat.chat,
    "complete": complete.complete,
    "serve": serve.serve,
    "bench": bench.bench,
    "trace": trace.trace,
    "top": top.top,
    "check": check.check,
    "estimate": estimate.estimate,
    "env": environment.environment,
}
for name, function in _COMMANDS.items():
    app.command(name)(command(function))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"asyncengine {__version__}")
        raise typer.Exit


@app.callback()
def _asyncengine(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and end.")
    ] = False,
) -> None:
    pass


def main(loader: Any = None) -> None:
    """Runs the command line of this process and ends it.

    Args:
        loader: How models are loaded, as in `AsyncEngine`; None loads them with transformers.
    """
    app(obj=loader, prog_name="asyncengine")
