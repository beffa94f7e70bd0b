"""``asyncengine trace``: what the engine did, step by step, as a timeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncengine.cli.command import Failure, check_writable, refuse
from asyncengine.cli.flags import ENGINE_FLAGS, GENERATION_FLAGS, EngineFlags, GenerationFlags, Model
from asyncengine.cli.remote import ApiKey, root
from asyncengine.cli.timeline import files

if TYPE_CHECKING:
    import httpx

    from asyncengine.cli.workload import Workload
    from asyncengine.generation import GenerationConfig


def trace(
    ctx: typer.Context,
    model: Model = "tiny",
    url: Annotated[str | None, typer.Option(help="A server with --admin to read the trace of instead.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="With --url: record for so long first.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="So many requests at a time.")] = 8,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many requests.")] = 16,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words in a prompt.")] = 32,
    out: Annotated[Path, typer.Option(help="Where to write, without .json and .html.")] = Path("trace"),
    api_key: ApiKey = None,
    *,
    generation: GenerationFlags,
    flags: EngineFlags,
) -> int:
    """Record a timeline: of MODEL answering some prompts in this process, or with --url of a server.

    Writes OUT.json, which Perfetto (ui.perfetto.dev) and Chrome open, and OUT.html, a page that needs nothing else.
    """
    if not out.name:
        raise Failure(f"--out is {str(out)!r}; expected the name of a file, without .json and .html", 2)
    for path in files(out):
        check_writable("--out", path)
    if url is None:
        refuse(ctx, ["api_key", "seconds"], "without --url")
        from asyncengine.cli.workload import Workload

        config = generation.config()
        if config.max_tokens is None:
            config = config.replace(max_tokens=32)
        workload = Workload(num_prompts, prompt_words, concurrency, None, generation.seed or 0)
        recorded, title = _in_process(model, flags, ctx.obj, workload, config), f"{model}, in process"
    else:
        unused = ("model", "concurrency", "num_prompts", "prompt_words")
        root(url)
        refuse(ctx, (*unused, *GENERATION_FLAGS, *ENGINE_FLAGS), "and --url: the server's own requests are recorded")
        recorded, title = _from_server(url, api_key, seconds)
    return _write(recorded, title, out, seconds)


def _write(recorded: dict[str, Any], title: str, out: Path, seconds: float | None) -> int:
    from asyncengine.cli.timeline import write

    events = [event for event in recorded.get("traceEvents", ()) if event.get("ph") != "M"]
    if not events:
        raise Failure(
            "the server has recorded nothing; --seconds 10 records for ten seconds"
            if seconds is None
            else f"nothing was recorded: the server had no requests for {seconds:g} seconds"
        )
    requests = {event["id"] for event in events if event.get("cat") == "request"}
    steps = sum(event["name"] == "step" for event in events)
    data, view = write(recorded, title, out)
    print(f"{len(requests)} requests, {steps} steps: {data} (Perfetto), {view} (any browser)")
    return 0


def _in_process(
    model: str, flags: EngineFlags, loader: Any, workload: Workload, config: GenerationConfig
) -> dict[str, Any]:
    import json

    engine_config = flags.config(model, loader)
    from asyncengine.cli.loading import loaded
    from asyncengine.cli.progress import bar
    from asyncengine.cli.targets import EngineTarget
    from asyncengine.loop.prepare import RequestOptions

    with loaded(engine_config, loader) as (engine, runner):
        engine.trace.start()
        with bar("recording", workload.num_prompts) as advance:
            samples = runner.run(workload.run(EngineTarget(engine, config, "chat", RequestOptions()), advance))
        engine.trace.stop()
        errors = [sample.error for sample in samples if sample.error is not None]
        if errors:
            raise Failure(f"{len(errors)} of {len(samples)} requests failed: {errors[0]}")
        recorded: dict[str, Any] = json.loads(engine.trace.to_json())
        return recorded


def _from_server(url: str, api_key: str | None, seconds: float | None) -> tuple[dict[str, Any], str]:
    import asyncio

    from asyncengine.cli import remote
    from asyncengine.cli.loading import runner

    async def run() -> tuple[dict[str, Any], str]:
        async with remote.connected(url, api_key) as client:
            if seconds is not None:
                await _told(client, "clear")
                await _told(client, "start")
                try:
                    await asyncio.sleep(seconds)
                finally:
                    await _told(client, "stop")
            response = await client.get("/admin/trace")
            _check(response)
            return read_trace(response), remote.root(url)

    with runner() as running:
        return running.run(run())


async def _told(client: httpx.AsyncClient, action: str) -> None:
    _check(await client.post("/admin/trace", json={"action": action}))


def read_trace(response: httpx.Response) -> dict[str, Any]:
    """What a server has recorded.

    Raises:
        Failure: The answer is no trace.
    """
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("traceEvents"), list):
        raise Failure("/admin/trace answers with something that is no trace: it is another kind of server")
    return found


def _check(response: httpx.Response) -> None:
    from asyncengine.cli.remote import problem

    if response.status_code == 404:
        raise Failure("the server has no /admin/trace; start it with --admin and --api-key")
    if response.status_code != 200:
        raise Failure(f"/admin/trace answers {response.status_code}: {problem(response)}")
