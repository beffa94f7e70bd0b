"""From an engine to a model that is loaded, and to its first token, beside reading the checkpoint's file.

For each round and each state of the file a process of its own takes these times, in seconds:

* ``read``: reading the checkpoint's weights from beginning to end, as plain as can be;
* ``imports``: torch, transformers and the engine;
* ``load``: ``await engine.reload(config)``;
* ``first token``: of the first request, 16 tokens long.

The checkpoint is random, with a tokenizer of its vocabulary. ``warm`` has its weights in the page cache, ``cold`` has
not: before `read` and before `load` the kernel is asked to forget them, which needs no privileges. Both find compiled
code, and what an earlier load kept of the checkpoint, in their cache. ``first`` is one process more at the beginning,
whose cache is empty, and ``unknown`` (warm) are processes that find the compiled code alone, as for a checkpoint that
this machine has never loaded.

Given are medians, and the median of ``load`` over ``read``. The last line is one JSON object.

    python -m benchmarks.startup [--shape M] [--dtype bfloat16] [--rounds 3] [--no-tokenizer]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import shapes

STATES = ("warm", "cold", "unknown")


def child(path: Path, dtype: str, cold: bool) -> dict[str, float]:
    """What one process takes."""
    weights = path / "model.safetensors"
    if cold:
        _forget(weights)
    times = {}
    begun = time.perf_counter()
    with weights.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass
    times["read"] = time.perf_counter() - begun

    begun = time.perf_counter()
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from asyncengine import AsyncEngine, EngineConfig, GenerationConfig

    times["imports"] = time.perf_counter() - begun
    if cold:
        _forget(weights)

    async def serve() -> None:
        begun = time.perf_counter()
        engine = AsyncEngine()
        await engine.reload(EngineConfig(str(path), device="cpu", dtype=dtype, max_total_sequence_length=4096))
        times["load"] = time.perf_counter() - begun
        begun = time.perf_counter()
        await engine.generate(list(range(1, 17)), GenerationConfig(max_tokens=1, detokenize=False))
        times["first token"] = time.perf_counter() - begun
        await engine.shutdown()

    asyncio.run(serve())
    return times


def _forget(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="M")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-tokenizer", dest="tokenizer", action="store_false")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(child(arguments.child, arguments.dtype, arguments.cold)))
        return
    with tempfile.TemporaryDirectory() as directory:
        path = shapes.write(Path(directory) / "checkpoint", arguments.shape, arguments.dtype)
        if arguments.tokenizer:
            shapes.write_tokenizer(path, shapes.SHAPES[arguments.shape]["vocab_size"])
        cache = Path(directory) / "cache"

        def run(cold: bool = False) -> dict[str, float]:
            command = [sys.executable, "-m", "benchmarks.startup", "--child", str(path), "--dtype", arguments.dtype]
            environment = os.environ | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
            environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process compiles all that it imports
            done = subprocess.run(
                [*command, *["--cold"] * cold], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            return times

        first = run()
        rounds: dict[str, list[dict[str, float]]] = {state: [] for state in STATES}
        for _ in range(arguments.rounds):
            for kept in ("findings", "tokenizers"):
                shutil.rmtree(cache / "asyncengine" / kept, ignore_errors=True)
            rounds["unknown"].append(run())
            rounds["warm"].append(run())
            rounds["cold"].append(run(cold=True))
        megabytes = (path / "model.safetensors").stat().st_size / 1e6
    print(f"{'seconds':>12}" + "".join(f"{name:>13}" for name in (*first, "load / read")))
    results = {}
    for state, found in {"first": [first], **rounds}.items():
        medians = {name: statistics.median(times[name] for times in found) for name in first}
        medians["load over read"] = statistics.median(times["load"] / times["read"] for times in found)
        print(f"{state:>12}" + "".join(f"{value:13.2f}" for value in medians.values()))
        results[state] = {name.replace(" ", "_"): round(value, 3) for name, value in medians.items()}
    names = {"benchmark": "startup", "shape": arguments.shape, "dtype": arguments.dtype}
    print(json.dumps({**names, "megabytes": round(megabytes), "results": results}))


if __name__ == "__main__":
    main()
