"""``asyncengine serve``: a model behind OpenAI's and Anthropic's API."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from asyncengine.cli.command import Failure
from asyncengine.cli.flags import EngineFlags, Model
from asyncengine.cli.logs import LogFormat, log_to_stderr

if TYPE_CHECKING:
    from asyncengine.loop.engine import AsyncEngine
    from asyncengine.reranking import RerankPrompt

EXTRA = {"httptools", "httpx", "msgspec", "prometheus_client", "starlette", "uvicorn"}
"""What the extra ``server`` brings."""


def serve(
    ctx: typer.Context,
    model: Model = "tiny",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Asked for on every route but /health.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    max_queue_size: Annotated[int | None, typer.Option(help="Most requests that wait; more are a 429.")] = None,
    max_concurrency: Annotated[int | None, typer.Option(help="Most requests under way; more are a 429.")] = None,
    graph_capture: Annotated[
        Literal["idle", "load"], typer.Option(help="When most CUDA graphs are captured; load: before it is ready.")
    ] = "idle",
    allowed_media_domains: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Fetch images, audio and videos from there; may be given several times."),
    ] = None,
    rerank_prompt: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="How /score and /rerank ask: JSON with a RerankPrompt's fields, or 'qwen3'."),
    ] = None,
    prefix_cache_file: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Begin with the prompts that the last run computed; left there in the end."),
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Routes to reload, abort, trace. Needs --api-key.")] = False,
    log_format: Annotated[LogFormat, typer.Option(help="json: one object per line.")] = "text",
    otel: Annotated[bool, typer.Option("--otel", help="OpenTelemetry spans, to the provider of the process.")] = False,
    *,
    flags: EngineFlags,
) -> int:
    """Serve MODEL over HTTP until Ctrl-C.

    It listens at once and answers 503 while the model loads. The first Ctrl-C lets requests finish for five
    seconds, a second one ends them.
    """
    config = flags.config(model, ctx.obj, max_queue_size=max_queue_size, graph_capture=graph_capture)
    if admin and api_key is None:
        raise Failure("--admin needs --api-key: these routes can unload the model", 2)
    if prefix_cache_file is not None and not flags.enable_prefix_caching:
        raise Failure("--prefix-cache-file and --no-enable-prefix-caching: there is no prefix cache to be kept", 2)
    from asyncengine.cli.loading import quiet

    try:
        from asyncengine.server import serve as server
    except ModuleNotFoundError as error:
        raise missing("server", error) from error
    prepare = _spans() if otel else None
    quiet()
    log_to_stderr(log_format)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # what it would say has been said
    return server.serve(
        config,
        host=host,
        port=port,
        api_key=api_key,
        served_model_name=served_model_name,
        admin=admin,
        max_concurrency=max_concurrency,
        allowed_media_domains=allowed_media_domains or (),
        rerank_prompt=None if rerank_prompt is None else _prompt(rerank_prompt),
        prefix_cache_file=prefix_cache_file,
        loader=ctx.obj,
        prepare=prepare,
    )


def _prompt(given: str) -> RerankPrompt:
    """How documents are ranked, by the name of it or of a file.

    Raises:
        Failure: The file cannot be read.
        InvalidRequestError: It says something else.
    """
    from asyncengine.reranking import QWEN3_RERANKER, RerankPrompt

    if given == "qwen3":
        return QWEN3_RERANKER
    try:
        values = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failure(
            f"--rerank-prompt is {given!r}, which is no file of JSON: {error}; expected one, or 'qwen3'", 2
        ) from error
    if not isinstance(values, dict):
        raise Failure(f"--rerank-prompt is {given!r}, whose JSON is no object", 2)
    return RerankPrompt.from_dict(values)


def _spans() -> Callable[[AsyncEngine], object]:
    """What makes an engine's spans."""
    try:
        from asyncengine.otel import instrument
    except ModuleNotFoundError as error:
        raise missing("otel", error) from error
    return instrument


def missing(extra: str, error: ModuleNotFoundError) -> Failure:
    """What to install, for a module that an extra brings.

    Raises:
        ModuleNotFoundError: It is none of those.
    """
    name = (error.name or "").partition(".")[0]
    if name not in EXTRA | {"opentelemetry"}:
        raise error
    return Failure(f"{name} is not installed: pip install 'asyncengine[{extra}]'")
