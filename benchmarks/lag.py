"""How late the event loop is while the engine decodes, loads, builds its kernels and reloads, and which call does it.

A timer is set anew every millisecond; its lag is how much later than due it comes. p50, p99 and max are of these lags.
"any" is stricter: the 99th percentile, over all milliseconds of the phase, of how long something that falls due in that
millisecond would have waited; so a call that holds the interpreter's lock for 300 ms counts 300 times and not once.

Phases, each after the imports of torch and transformers:

* idle ("serve"): a model is loaded, nothing is asked;
* decode N ("serve"): N requests decode on a real model, with one task per request that reads every token;
* load: a random checkpoint (`--load-shape`, 2.5 GB, with a tokenizer of its vocabulary) is loaded into an engine;
* reload ("load"): the same again while the first serves one request;
* build: the C++ code is compiled, into a cache that is empty, and a small model is loaded.

``--blame MS`` names what held the loop up: while a timer is more than MS late, a thread that needs no lock writes down
where all Python threads are; printed are the innermost frames of the others, by how often they were seen. For diagnosis
only: it costs some tens of microseconds per timer, and because it looks at frames while they change, the process may
crash if MS is so small that it often looks.

    python -m benchmarks.lag [--shape S] [--load-shape 1B] [--readers 16 256] [--seconds 5]
        [--only serve load build] [--blame MS] [--tiny]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Any

import uvloop

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from benchmarks import shapes

PERIOD = 0.001
PHASES = ("serve", "load", "build")


class LagMeter:
    """Lags of a timer that is set anew every millisecond.

    Args:
        blame: Seconds of lag from which on it is written down who runs; None does not.
    """

    def __init__(self, blame: float | None = None) -> None:
        self.lags: list[float] = []
        self._blame = blame
        self._seen: IO[str] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[LagMeter]:
        """Measures while the block runs."""
        with tempfile.TemporaryFile("w+") if self._blame else contextlib.nullcontext() as self._seen:
            task = asyncio.create_task(self._run())
            await asyncio.sleep(0)
            try:
                yield self
            finally:
                await asyncio.sleep(2 * PERIOD)  # what was held up last has its lag, too
                task.cancel()
                await asyncio.wait([task])
                if self._seen is not None:
                    faulthandler.cancel_dump_traceback_later()
                    self._seen.seek(0)
                    self.blamed = Counter(innermost(self._seen.read()))

    async def _run(self) -> None:
        while True:
            if self._seen is not None and self._blame is not None:
                faulthandler.dump_traceback_later(PERIOD + self._blame, repeat=True, file=self._seen)
            due = time.perf_counter() + PERIOD
            await asyncio.sleep(PERIOD)
            self.lags.append(max(time.perf_counter() - due, 0.0))

    def figures(self) -> dict[str, float]:
        """In milliseconds."""
        lags = sorted(self.lags)
        return {
            "p50_ms": round(lags[len(lags) // 2] * 1e3, 3),
            "p99_ms": round(lags[int(len(lags) * 0.99)] * 1e3, 3),
            "any_p99_ms": round(waited(lags, 0.99) * 1e3, 3),
            "max_ms": round(lags[-1] * 1e3, 3),
            "timers": len(lags),
        }


def waited(lags: list[float], share: float) -> float:
    """The lag that `share` of all moments do not exceed: a lag of L is waited for by what falls due in L + a period."""
    moments = sorted(lag - at * PERIOD for lag in lags for at in range(int(lag / PERIOD) + 1))
    return moments[min(int(len(moments) * share), len(moments) - 1)]


def innermost(dumps: str) -> Iterator[str]:
    """The innermost frames of the threads that do not run the event loop, one per thread and dump."""
    for stack in re.split(r"\n(?=Thread |Current thread )", dumps):
        frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', stack)
        names = [f"{'/'.join(Path(file).parts[-2:])}:{line} {function}" for file, line, function in frames]
        waits = ("threading.py", "instruction_queue.py", "thread_pool_executor")
        if names and not any(wait in names[0] for wait in waits) and "_run_once" not in stack and "lag.py" not in stack:
            yield " < ".join(names[:3])


def config(path: Path, arguments: argparse.Namespace, **settings: Any) -> EngineConfig:
    return EngineConfig(str(path), device="cpu", dtype="bfloat16", decoder_backend=arguments.decoder, **settings)


async def decode(engine: AsyncEngine, seconds: float, readers: int, meter: LagMeter) -> None:
    """Measured is from the moment when all readers have had a token."""
    begun = 0
    all_begun = asyncio.Event()

    async def read(number: int) -> None:
        nonlocal begun
        first = True
        prompt = [(7 * number + at) % 500 + 1 for at in range(16)]
        async for _ in engine.stream(prompt, GenerationConfig(max_tokens=2000, temperature=0, ignore_eos=True)):
            if first:
                begun, first = begun + 1, False
                if begun == readers:
                    all_begun.set()

    tasks = [asyncio.create_task(read(number)) for number in range(readers)]
    await all_begun.wait()
    async with meter.running():
        await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def phases(arguments: argparse.Namespace, directory: Path) -> dict[str, LagMeter]:
    """All phases, each with an engine in its own state."""
    meters: dict[str, LagMeter] = {}

    def meter(name: str) -> LagMeter:
        meters[name] = LagMeter(None if arguments.blame is None else arguments.blame / 1e3)
        return meters[name]

    most = max(arguments.readers)
    served = config(directory / "served", arguments, max_num_sequence=most, max_total_sequence_length=most * 512)
    if "serve" in arguments.only:
        async with AsyncEngine(served) as engine:
            async with meter("idle").running():
                await asyncio.sleep(arguments.seconds)
            for readers in arguments.readers:
                await decode(engine, arguments.seconds, readers, meter(f"decode {readers}"))
                await engine.reset()
    engine = AsyncEngine()
    if "load" in arguments.only:
        large = config(directory / "large", arguments, max_total_sequence_length=4096)
        async with meter("load").running():
            await engine.reload(large)
        reader = asyncio.create_task(_read_on(engine))
        async with meter("reload").running():
            await engine.reload(large, in_flight="carry")
        reader.cancel()
        await asyncio.wait([reader])
        await engine.unload()
    if "build" in arguments.only:
        with empty_cache(directory / "cache"):
            async with meter("build").running():
                await engine.reload(served)
    await engine.shutdown()
    return meters


async def _read_on(engine: AsyncEngine) -> None:
    async for _ in engine.stream([1, 2, 3], GenerationConfig(max_tokens=3000, temperature=0, ignore_eos=True)):
        pass


@contextlib.contextmanager
def empty_cache(directory: Path) -> Iterator[None]:
    """The kernels' cache is this directory."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="S")
    parser.add_argument("--load-shape", choices=list(shapes.SHAPES), default="1B")
    parser.add_argument("--decoder", default="auto", choices=["auto", "compiled", "transformers"])
    parser.add_argument("--readers", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--seconds", type=float, default=5.0, help="of the idle and of each decoding phase")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), help="phases")
    parser.add_argument("--blame", type=float, metavar="MS")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, for the tests")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shape = arguments.load_shape = "tiny"
        arguments.readers, arguments.seconds = [2, 4], 0.1
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch  # noqa: F401  # a program imports them when it starts
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        served, large = Path(directory) / "served", Path(directory) / "large"
        shapes.write(served, arguments.shape, "bfloat16")
        if "load" in arguments.only:
            shapes.write(large, arguments.load_shape, "bfloat16")
            shapes.write_tokenizer(large, shapes.SHAPES[arguments.load_shape]["vocab_size"])
        meters = uvloop.run(phases(arguments, Path(directory)))
    results = {name: meter.figures() for name, meter in meters.items()}
    print(f"{'ms':>12}{'p50':>9}{'p99':>9}{'any p99':>9}{'max':>9}")
    for name, found in results.items():
        print(f"{name:>12}" + "".join(f"{found[f'{of}_ms']:9.2f}" for of in ("p50", "p99", "any_p99", "max")))
    if arguments.blame is not None:
        for name, meter in meters.items():
            for frames, count in meter.blamed.most_common(12):
                print(f"{name}: {count} x {frames}")
    shapes_used = {"shape": arguments.shape, "load_shape": arguments.load_shape}
    print(json.dumps({"benchmark": "lag", **shapes_used, "results": results}))


if __name__ == "__main__":
    main()
