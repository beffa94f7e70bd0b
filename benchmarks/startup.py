"""From nothing to the first token: a process that imports, loads a random checkpoint and generates, beside reading it.

For each round a process of its own takes these times, in seconds:

* ``read``: reading the checkpoint's file from beginning to end, as plain as can be;
* ``imports``: torch, transformers and the engine;
* ``load``: ``await engine.reload(config)``, with a cache of compiled code that is already there;
* ``first token``: of the first request, 16 tokens long.

``build`` is what ``load`` takes longer in a first process whose cache of compiled code is empty; it is measured once.
The file is in the page cache in all of them, or in none with ``--cold`` (the kernel is asked to forget the file, which
needs no privileges). Given is the median, and ``load`` over ``read``. The last line is one JSON object.

    python -m benchmarks.startup [--shape M] [--dtype bfloat16] [--rounds 3] [--cold]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import shapes


def child(path: Path, dtype: str, cold: bool) -> dict[str, float]:
    """What one process takes."""
    weights = path / "model.safetensors"
    if cold:
        _forget(weights)
    times = {}
    begun = time.perf_counter()
    with weights.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
    times["read"] = time.perf_counter() - begun
    if cold:
        _forget(weights)

    begun = time.perf_counter()
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from asyncengine import AsyncEngine, EngineConfig, GenerationConfig

    times["imports"] = time.perf_counter() - begun

    async def serve() -> None:
        engine = AsyncEngine()
        begun = time.perf_counter()
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
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(child(arguments.child, arguments.dtype, arguments.cold)))
        return
    with tempfile.TemporaryDirectory() as directory:
        path = shapes.write(Path(directory) / "checkpoint", arguments.shape, arguments.dtype)
        command = [sys.executable, "-m", "benchmarks.startup", "--child", str(path), "--dtype", arguments.dtype]
        command += ["--cold"] * arguments.cold
        cache = os.environ | {"XDG_CACHE_HOME": str(Path(directory) / "cache"), "HF_HUB_OFFLINE": "1"}
        rounds = []
        for _ in range(1 + arguments.rounds):
            done = subprocess.run(command, env=cache, stdout=subprocess.PIPE, text=True, check=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
        megabytes = (path / "model.safetensors").stat().st_size / 1e6
    first, rest = rounds[0], rounds[1:]
    results = {name: statistics.median(times[name] for times in rest) for name in first}
    results["build"] = first["load"] - results["load"]
    ratio = statistics.median(times["load"] / times["read"] for times in rest)
    for name, seconds in results.items():
        print(f"{name:>12}: {seconds:7.2f} s")
    print(f"load over read: {ratio:.2f}, {megabytes:.0f} MB")
    rounded = {name.replace(" ", "_") + "_s": round(seconds, 3) for name, seconds in results.items()}
    names = {"benchmark": "startup", "shape": arguments.shape, "dtype": arguments.dtype, "cold": arguments.cold}
    print(json.dumps({**names, "megabytes": round(megabytes), "results": rounded, "load_over_read": round(ratio, 3)}))


if __name__ == "__main__":
    main()
