"""Added latency: from the end of a model step until a reader has its token.

N requests decode on a model whose step takes 8 ms without the GIL; one task per request reads. For every token that
is a delta of its own, the latency is the time from the moment the model returned to the moment the reader's
``async for`` body begins: bookkeeping, hand-over, the event loop, and the readers that come first. The last line is
one JSON object.

    python -m benchmarks.latency [--readers 1 16 128 256 1024] [--step-ms 8] [--steps 200]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

import uvloop

from asyncengine import GenerationConfig
from asyncengine.loop import delivery
from benchmarks.zero_cost import zero_cost_engine


async def run(readers: int, step_seconds: float, steps: int) -> list[float]:
    """Latencies in seconds, sorted."""
    engine, model = zero_cost_engine(step_seconds)
    latencies: list[float] = []
    async with engine:
        config = GenerationConfig(max_tokens=steps, detokenize=False, ignore_eos=True)
        await engine.pause()
        streams = [await engine.add_request([1, 2, 3], config) for _ in range(readers)]

        async def reader(stream) -> None:  # type: ignore[no-untyped-def]
            count = 0
            async for output in stream:
                now = time.perf_counter()
                count += len(output.token_ids)
                if len(output.token_ids) == 1:
                    latencies.append(now - model.ended[count - 1])

        tasks = [asyncio.create_task(reader(stream)) for stream in streams]
        await asyncio.sleep(0)
        await engine.resume()
        await asyncio.gather(*tasks)
    return sorted(latencies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 16, 128, 256, 1024])
    parser.add_argument("--step-ms", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    delivery.use_compiled()
    results = {}
    print(f"{'readers':>8} {'p50 µs':>9} {'p99 µs':>9}")
    for readers in arguments.readers:
        latencies = uvloop.run(run(readers, arguments.step_ms / 1e3, arguments.steps))
        p50, p99 = latencies[len(latencies) // 2] * 1e6, latencies[int(len(latencies) * 0.99)] * 1e6
        results[readers] = {"p50_us": round(p50, 1), "p99_us": round(p99, 1)}
        print(f"{readers:>8} {p50:>9.1f} {p99:>9.1f}")
    print(json.dumps({"benchmark": "latency", "results": results}))


if __name__ == "__main__":
    main()
