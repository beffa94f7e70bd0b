"""Where the time of a decode step goes: weights, attention, launches, host, hand-over.

Rows (1, 16 and 64) decode with `--context` tokens behind them, on a random model, while an engine serves as many
readers, each a task of its own. In milliseconds:

* step: from one token to the next, on average;
* weights, products, attention: the model's part of that, by the engine's own clock. How it is divided is measured with
  the model alone: `weights` is what reading them once takes at the memory's bandwidth, `attention` what a step takes
  more with the context than without, and `products` the rest: arithmetic of many rows, norms, activations, the
  sampler, and whatever keeps reads from that bandwidth;
* host: what a core without threads takes from one model step to the next: schedule, fill, commit, and what goes to the
  readers;
* hand-over: what the engine takes more there: two threads, one interpreter's lock, and the readers.

"launches" are calls of torch's operators in one step: with the compiled step those of the sampler, with ``--decoder
transformers`` those of all modules. Their time is part of the products. The last line is one JSON object.

    python -m benchmarks.parts [--shapes S M] [--rows 1 16 64] [--context 128] [--dtype bfloat16] [--decoder auto]
        [--steps 40] [--tiny]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from benchmarks import scale, scheduler, shapes, step

PARTS = ("step", "weights", "products", "attention", "host", "hand-over")


def config_of(arguments: argparse.Namespace, path: Path) -> EngineConfig:
    rows = max(arguments.rows)
    length = arguments.context + 2 * arguments.steps + step.PAGE
    return EngineConfig(
        str(path), device="cpu", dtype=arguments.dtype, decoder_backend=arguments.decoder, max_num_sequence=rows,
        max_total_sequence_length=rows * length, kv_cache_page_size=step.PAGE, prefix_cache_mode="disable",
    )  # fmt: skip


def launches(model: Any, batch: Any) -> int:
    """Operators of torch that a step calls."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counted.calls += 1
            return function(*args, **(kwargs or {}))

    with Counted():
        model.execute(batch)
    return Counted.calls


def synchronous(arguments: argparse.Namespace, shape: str, path: Path, figures: dict[int, dict[str, float]]) -> None:
    """What a core without threads tells."""
    from asyncengine.model.loader import TransformersLoader

    core = scheduler.core_with(TransformersLoader(), config_of(arguments, path))
    assert core.loaded is not None
    model, vocabulary = core.loaded.model, core.loaded.vocab_size
    peak = step.bandwidth(1 << 22 if arguments.tiny else 1 << 27)
    weights = sum(each.nbytes for each in shapes.make(shape, arguments.dtype, "meta").parameters()) / peak
    draw = np.random.default_rng(0)
    for rows in arguments.rows:
        prompts = [draw.integers(1, vocabulary, arguments.context, dtype=np.int32) for _ in range(rows)]
        before = core.counters.generation_tokens
        scale.add(core, prompts, arguments.steps + 8)
        while core.counters.generation_tokens < before + rows or core.metrics().num_requests_running < rows:
            core.step()
        hosts = []
        for _ in range(arguments.steps // 2):
            modelled, begun = core.counters.model_seconds.total, time.perf_counter()
            core.step()
            core.outbox.flush()
            hosts.append(time.perf_counter() - begun - (core.counters.model_seconds.total - modelled))
        core.requests.abort_all()
        core.step()
        step.place_greedy(model, rows, vocabulary)
        batches = [step.batch_of(rows, 1, context, vocabulary) for context in (arguments.context, 0)]
        times = [[step.median_seconds(model, batch, 1) for batch in batches] for _ in range(arguments.steps // 4)]
        attending = statistics.median(with_context for with_context, _ in times)
        alone = attending - statistics.median(with_context - without for with_context, without in times)
        figures[rows] = {
            "weights": weights / attending,
            "products": (alone - weights) / attending,
            "attention": (attending - alone) / attending,
            "host": statistics.median(hosts) * 1e3,
            "launches": launches(model, batches[0]),
        }
    core.drop_model()


async def served(arguments: argparse.Namespace, path: Path, figures: dict[int, dict[str, float]]) -> None:
    """Times while an engine serves readers, the model's in the shares that are known by now."""
    generation = GenerationConfig(temperature=0, max_tokens=2 * arguments.steps, ignore_eos=True, detokenize=False)
    async with AsyncEngine(config_of(arguments, path)) as engine:

        async def read(number: int) -> list[tuple[float, float, int]]:
            """The time at each token, the model's so far, and its steps."""
            times: list[tuple[float, float, int]] = []
            async with engine.stream([1 + number] * arguments.context, generation) as stream:
                async for output in stream:
                    modelled = engine.metrics().counters.model_seconds if number == last else None
                    if modelled is not None:
                        times += [(time.perf_counter(), modelled.total, modelled.count)] * len(output.token_ids)
            return times

        for rows, found in figures.items():
            last = rows - 1  # when it begins, all others decode
            steps = 0
            while not steps:  # a loop that comes late takes all tokens at one moment
                times = (await asyncio.gather(*map(read, range(rows))))[-1]
                step_seconds, model_seconds, steps = np.subtract(times[arguments.steps], times[0])
            found["step"], model = step_seconds / steps * 1e3, model_seconds / steps * 1e3
            for part in ("weights", "products", "attention"):
                found[part] *= model
            found["hand-over"] = found["step"] - model - found["host"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(shapes.SHAPES), default=["S", "M"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--decoder", default="auto", choices=["auto", "compiled", "transformers"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, for the tests")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shapes, arguments.rows, arguments.steps = ["tiny"], [1, 2], 8
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results: dict[str, dict[int, dict[str, float]]] = {}
    for shape in arguments.shapes:
        figures = results[shape] = {}
        with tempfile.TemporaryDirectory() as directory:
            path = shapes.write(Path(directory), shape, arguments.dtype)
            synchronous(arguments, shape, path, figures)
            uvloop.run(served(arguments, path, figures))
        print(f"{shape:>4}" + "".join(f"{part:>12}" for part in (*PARTS, "launches")))
        for rows, found in figures.items():
            shown = "".join(f"{found[part]:12.2f}" for part in PARTS)
            print(f"{rows:>4}{shown}{found['launches']:12.0f}", flush=True)
    names = {"benchmark": "parts", "dtype": arguments.dtype, "decoder": arguments.decoder, "context": arguments.context}
    rounded = {
        shape: {rows: {part: round(value, 4) for part, value in found.items()} for rows, found in figures.items()}
        for shape, figures in results.items()
    }
    print(json.dumps({**names, "results": rounded}))


if __name__ == "__main__":
    main()
