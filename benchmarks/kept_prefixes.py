"""A long prompt in a new process: computed, or taken over from a file.

A random checkpoint of a published shape answers a prompt with one token. Figures, medians:

* computed: seconds until the token is there, with an empty prefix cache.
* taken over: seconds for `load_prefix_cache` and the same token; the file was just written, so that the system has it
  in memory.
* saved: seconds for `save_prefix_cache`; `MB` is the file.

The last line is one JSON object.

    python -m benchmarks.kept_prefixes [--shape M] [--dtype bfloat16] [--tokens 2048] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import torch

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from benchmarks import shapes

FIRST = GenerationConfig(temperature=0, max_tokens=1, ignore_eos=True)


async def seconds(awaitable: Awaitable[Any]) -> float:
    begun = time.perf_counter()
    await awaitable
    return time.perf_counter() - begun


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    path, file = shapes.write(folder / "model", arguments.shape, arguments.dtype), folder / "prefixes"
    prompt = [5 + (place * place) % 1000 for place in range(arguments.tokens)]
    taken: dict[str, list[float]] = {"computed": [], "saved": [], "taken over": []}
    config = EngineConfig(str(path), dtype=arguments.dtype, max_single_sequence_length=2 * arguments.tokens)
    async with AsyncEngine(config) as engine:
        await engine.generate(prompt[:64], FIRST)
        await engine.save_prefix_cache(file)  # the weights are read for the first time
        for _ in range(arguments.rounds):
            await engine.reset()
            taken["computed"].append(await seconds(engine.generate(prompt, FIRST)))
            taken["saved"].append(await seconds(engine.save_prefix_cache(file)))
            await engine.reset()
            loading = await seconds(engine.load_prefix_cache(file))
            taken["taken over"].append(loading + await seconds(engine.generate(prompt, FIRST)))
    figures = {name: statistics.median(each) for name, each in taken.items()} | {"MB": file.stat().st_size / 1e6}
    print(", ".join(f"{name} {figure:.3f}" for name, figure in figures.items()))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="M")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(arguments, Path(folder)))
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "kept_prefixes", **vars(arguments), **about, "results": figures}))


if __name__ == "__main__":
    main()
