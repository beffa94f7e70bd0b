"""Gap between steps: what the step thread does between two model steps, alone, beside readers and beside other work.

N requests decode on a model whose step takes 8 ms without the GIL, as one on a GPU does. The gap is the time from the
end of one model step to the beginning of the next: bookkeeping, publishing, scheduling, and waiting for the GIL. It is
measured one step by one and ("ahead") with steps that are launched ahead, where it is how long the device idles; and,
in alternation:

* idle: with nobody reading;
* readers: with one task per request that reads every token;
* application: with nobody reading, while a task on the loop computes in pure Python for `--burn` of its time. It
  begins to compute after exponentially distributed times, `--period` on average. With `--fixed` it begins every
  `--period`; then step and application may lock: a step that waited for the end of one computation ends during the
  next, and so on, wherever the step takes about as long as the period.

"kept" is the steps per second over those of idle of the same way, the median of the rounds' ratios; "of the device"
over what the device can do without any gap. With `--freeze` the program has called `gc.freeze()` before, so that
Python's full collections, 60 ms and more each, have nothing to look through. The last line is one JSON object.

    python -m benchmarks.gap [--requests 256 1024] [--step-ms 8] [--steps 250] [--rounds 5] [--burn 0.2]
        [--period 0.01] [--fixed] [--ways "one by one" ahead] [--freeze]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import time

import uvloop

from asyncengine import GenerationConfig
from asyncengine.loop import delivery
from benchmarks.zero_cost import zero_cost_engine

CONDITIONS = ("idle", "readers", "application")
WAYS = ("one by one", "ahead")


async def burn(share: float, period: float, fixed: bool) -> None:
    """Computes for a share of the loop's time."""
    times = random.Random(0)
    due = time.perf_counter()
    while True:
        seconds = period if fixed else times.expovariate(1 / period)
        until = time.perf_counter() + share * seconds
        while time.perf_counter() < until:
            pass
        due += seconds
        await asyncio.sleep(max(due - time.perf_counter(), 0.0))


async def run(
    requests: int, condition: str, run_ahead: bool, arguments: argparse.Namespace
) -> tuple[list[float], float]:
    """Gaps in seconds, and steps per second."""
    steps = arguments.steps
    engine, model = zero_cost_engine(arguments.step_ms / 1e3, run_ahead)
    async with engine:
        config = GenerationConfig(max_tokens=steps + 50, detokenize=False, ignore_eos=True)
        await engine.pause()
        streams = [await engine.add_request([1, 2, 3], config) for _ in range(requests)]

        async def reader(stream) -> None:  # type: ignore[no-untyped-def]
            async for _ in stream:
                pass

        computes = burn(arguments.burn, arguments.period, arguments.fixed) if condition == "application" else None
        application = asyncio.create_task(computes) if computes else None
        tasks = [asyncio.create_task(reader(stream)) for stream in streams] if condition == "readers" else []
        await engine.resume()
        await (tasks[0] if tasks else streams[0])
        begun, ended = model.begun[25 : steps + 25], model.ended[25 : steps + 25]
        await asyncio.gather(*tasks)
        if application is not None:
            application.cancel()
    gaps = [b - a for a, b in zip(ended[:-1], begun[1:], strict=True)]
    return gaps, (len(begun) - 1) / (begun[-1] - begun[0])


def measure(arguments: argparse.Namespace, requests: int) -> dict[str, dict[str, dict[str, float]]]:
    """All conditions in all ways, in alternation."""
    cases = [(way, condition) for condition in CONDITIONS for way in arguments.ways]
    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {case: [] for case in cases}
    seconds = arguments.step_ms / 1e3
    for _ in range(arguments.rounds):
        for way, condition in cases:
            gaps, rate = uvloop.run(run(requests, condition, way == "ahead", arguments))
            gaps.sort()
            rows[way, condition].append((statistics.median(gaps) * 1e6, gaps[int(len(gaps) * 0.99)] * 1e6, rate))
    results: dict[str, dict[str, dict[str, float]]] = {}
    for (way, condition), found in rows.items():
        p50, p99, rate = (statistics.median(column) for column in zip(*found, strict=True))
        kept = statistics.median(b[2] / a[2] for a, b in zip(rows[way, "idle"], found, strict=True))
        results.setdefault(way, {})[condition] = {
            "gap_p50_us": round(p50, 1), "gap_p99_us": round(p99, 1), "steps_per_second": round(rate, 2),
            "kept": round(kept, 4), "of_the_device": round(rate * seconds, 4),
        }  # fmt: skip
        print(
            f"{requests:>5} {condition:>11} {way:>10}: gap p50 {p50:7.1f} µs, p99 {p99:7.1f} µs, {rate:.2f} steps/s, "
            f"{kept:.3f}, {rate * seconds:.3f} of the device"
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--step-ms", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burn", type=float, default=0.2, help="share of the loop's time")
    parser.add_argument("--period", type=float, default=0.01, help="seconds from one computation to the next")
    parser.add_argument("--fixed", action="store_true", help="not a random time but always the period")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--freeze", action="store_true", help="call gc.freeze() first")
    arguments = parser.parse_args()
    if arguments.freeze:
        gc.freeze()
    delivery.use_compiled()
    results = {str(requests): measure(arguments, requests) for requests in arguments.requests}
    print(json.dumps({"benchmark": "gap", "step_ms": arguments.step_ms, "burn": arguments.burn, "results": results}))


if __name__ == "__main__":
    main()
