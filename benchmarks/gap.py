"""Gap between steps: what the step thread does between two model steps, alone and beside N readers.

256 requests decode on a model whose step takes 8 ms without the GIL, as one on a GPU does. The gap is the time from
the end of one model step to the beginning of the next: bookkeeping, publishing, scheduling, and waiting for the GIL.
It is measured with nobody reading, and with one task per request reading every token; in alternation. "kept" is the
steps per second with readers over those without. The last line is one JSON object.

    python -m benchmarks.gap [--requests 256] [--step-ms 8] [--steps 250] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics

import uvloop

from asyncengine import GenerationConfig
from asyncengine.loop import delivery
from benchmarks.zero_cost import zero_cost_engine


async def run(requests: int, step_seconds: float, steps: int, read: bool) -> tuple[list[float], float]:
    """Gaps in seconds, and steps per second."""
    engine, model = zero_cost_engine(step_seconds)
    async with engine:
        config = GenerationConfig(max_tokens=steps + 50, detokenize=False, ignore_eos=True)
        await engine.pause()
        streams = [await engine.add_request([1, 2, 3], config) for _ in range(requests)]

        async def reader(stream) -> None:  # type: ignore[no-untyped-def]
            async for _ in stream:
                pass

        tasks = [asyncio.create_task(reader(stream)) for stream in streams] if read else []
        await engine.resume()
        done = asyncio.create_task(reader(streams[0])) if not read else tasks[0]
        await done
        begun, ended = model.begun[25 : steps + 25], model.ended[25 : steps + 25]
        await asyncio.gather(*tasks)
    gaps = [b - a for a, b in zip(ended[:-1], begun[1:], strict=True)]
    return gaps, (len(begun) - 1) / (begun[-1] - begun[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    delivery.use_compiled()
    rows: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    for _ in range(arguments.rounds):
        for read in (False, True):
            gaps, rate = uvloop.run(run(arguments.requests, arguments.step_ms / 1e3, arguments.steps, read))
            gaps.sort()
            rows[read].append((statistics.median(gaps) * 1e6, gaps[int(len(gaps) * 0.99)] * 1e6, rate))
    results = {}
    for read, name in ((False, "idle"), (True, "readers")):
        p50, p99, rate = (statistics.median(column) for column in zip(*rows[read], strict=True))
        results[name] = {"gap_p50_us": round(p50, 1), "gap_p99_us": round(p99, 1), "steps_per_second": round(rate, 2)}
        print(f"{name:>8}: gap p50 {p50:7.1f} µs, p99 {p99:7.1f} µs, {rate:.2f} steps/s")
    kept = statistics.median(b[2] / a[2] for a, b in zip(rows[False], rows[True], strict=True))
    print(f"kept with {arguments.requests} readers: {kept:.3f}")
    print(json.dumps({"benchmark": "gap", "requests": arguments.requests, "kept": round(kept, 4), "results": results}))


if __name__ == "__main__":
    main()
