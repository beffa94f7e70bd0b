"""``asyncengine bench``: latencies and throughput of the engine in this process, or of any server."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from asyncengine.cli.command import Failure, check_writable, given, refuse
from asyncengine.cli.flags import ENGINE_FLAGS, AnsweringFlags, GenerationFlags, Model
from asyncengine.cli.remote import ApiKey, root

if TYPE_CHECKING:
    from asyncengine.cli.targets import Endpoint
    from asyncengine.cli.workload import Sample, Target, Workload
    from asyncengine.generation import GenerationConfig

_TOKENS = 64
"""Tokens of an answer where nothing else is asked for."""


def bench(
    ctx: typer.Context,
    model: Model = "tiny",
    url: Annotated[str | None, typer.Option(help="A server to measure instead; MODEL is then its name there.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Closed loop: so many requests at a time.")] = 8,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests per second, Poisson arrivals.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many requests.")] = 64,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words in a prompt.")] = 32,
    endpoint: Annotated[Literal["chat", "completions"], typer.Option(help="What is asked.")] = "chat",
    plot: Annotated[Path | None, typer.Option(help="Where to write a plot, as SVG.")] = None,
    api_key: ApiKey = None,
    *,
    generation: GenerationFlags,
    flags: AnsweringFlags,
) -> int:
    """Measure MODEL in this process, or with --url any server that speaks OpenAI's API.

    Time to first token, between tokens, and to the end, from when a request arrives: in an open loop that is when
    its turn comes, however late the client is. Every answer has --max-tokens tokens (64) where the server lets it.
    Behind a URL an event counts as one token. The last line is one JSON object. Exit status 1: a request failed.
    """
    if rate is not None and not 0 < rate < math.inf:
        raise Failure(f"--rate is {rate}; expected requests per second > 0", 2)
    if plot is not None:
        check_writable("--plot", plot)
    if rate is not None:
        refuse(ctx, ["concurrency"], "and --rate: a loop is closed or open")
    if url is None:
        refuse(ctx, ["api_key"], "without --url")
    else:
        root(url)
        refuse(ctx, (*ENGINE_FLAGS, "adapter"), "and --url: it is for an engine in this process")
    from asyncengine.cli.workload import Workload

    config = generation.config()
    if config.max_tokens is None:
        config = config.replace(max_tokens=_TOKENS)
    seed = 0 if generation.seed is None else generation.seed
    workload = Workload(num_prompts, prompt_words, concurrency, rate, seed)
    if url is None:
        run = _in_process(model, flags, ctx.obj, workload, config, endpoint)
    else:
        run = _over_http(url, api_key, model if given(ctx, "model") else None, workload, config, endpoint)
    return _report(run, workload, plot)


class Run:
    """What was measured, and what came of it."""

    def __init__(
        self, target: str, model: str, samples: list[Sample], cpu_seconds: float, adapter: str | None = None
    ) -> None:
        self.target = target
        self.model = model
        self.samples = samples
        self.cpu_seconds = cpu_seconds
        self.adapter = adapter


def _in_process(
    model: str, flags: AnsweringFlags, loader: Any, workload: Workload, config: GenerationConfig, endpoint: Endpoint
) -> Run:
    engine_config, options = flags.config(model, loader, graph_capture="load"), flags.options()
    from asyncengine.cli.loading import loaded
    from asyncengine.cli.targets import EngineTarget
    from asyncengine.cli.workload import Sample

    with loaded(engine_config, loader) as (engine, runner):
        target = EngineTarget(engine, config, endpoint, options)
        runner.run(target.ask(workload.prompts()[0], Sample(0.0)))  # not counted
        samples, cpu = runner.run(_measured(target, workload))
    return Run("in process", model, samples, cpu, flags.adapter)


def _over_http(
    url: str, api_key: str | None, model: str | None, workload: Workload, config: GenerationConfig, endpoint: Endpoint
) -> Run:
    from asyncengine.cli import remote
    from asyncengine.cli.loading import runner
    from asyncengine.cli.targets import HttpTarget

    async def run() -> Run:
        async with remote.connected(url, api_key) as client:
            name = await remote.model_name(client) if model is None else model
            target = HttpTarget(client, name, config, endpoint)
            await target.settle(workload.prompts()[0])
            samples, cpu = await _measured(target, workload)
            return Run(remote.root(url), name, samples, cpu)

    with runner() as running:
        return running.run(run())


async def _measured(target: Target, workload: Workload) -> tuple[list[Sample], float]:
    from asyncengine.cli.progress import bar

    with bar("measuring", workload.num_prompts) as advance:
        before = time.process_time()
        samples = await workload.run(target, advance)
        return samples, time.process_time() - before


def _report(run: Run, workload: Workload, plot: Path | None) -> int:
    from asyncengine.cli.figures import Figures
    from asyncengine.cli.plot import draw

    figures = Figures.of(run.samples)
    how = f"{workload.concurrency} at a time" if workload.rate is None else f"{workload.rate:g} per second"
    name = run.model if run.adapter is None else f"{run.model} with {run.adapter}"
    print(f"{name}, {run.target}, {how}")
    for line in figures.table():
        print(line)
    if figures.errors:
        print(f"first error: {figures.errors[0]}")
    if plot is not None:
        plot.write_text(draw(figures, f"{name}, {run.target}, {how}"), encoding="utf-8")
        print(f"plot: {plot}")
    print(
        json.dumps(
            {"model": run.model}
            | ({} if run.adapter is None else {"adapter": run.adapter})
            | {"target": run.target, "loop": "closed" if workload.rate is None else "open"}
            | ({"concurrency": workload.concurrency} if workload.rate is None else {"rate": workload.rate})
            | {"prompt_words": workload.prompt_words, "seed": workload.seed}
            | figures.json()
            | {"client_cpu_seconds": round(run.cpu_seconds, 3)}
        )
    )
    return int(bool(figures.errors))
