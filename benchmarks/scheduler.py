"""Host cost of a step: microseconds of schedule and bookkeeping per running request per step, decoding.

The core is driven synchronously, without threads, over a model that costs nothing; events go to a mailbox that drops
them. Counted is everything that the step thread does for a step besides the model: schedule, batch, advance, commit,
stop conditions, events, metrics. The last line is one JSON object.

    python -m benchmarks.scheduler [--running 1 16 64 256 512] [--steps 300] [--waiting 0]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from asyncengine.config import EngineConfig
from asyncengine.events import Event
from asyncengine.generation import GenerationConfig, resolve
from asyncengine.instructions import AddRequests, Instruction, JobDone, NewRequest, Reload
from asyncengine.step.core import Core
from benchmarks.zero_cost import ZeroCostLoader


class Nowhere:
    """A mailbox that drops what it gets."""

    def post(self, events: list[Event]) -> bool:
        return True


def loaded_core(max_num_sequence: int) -> Core:
    """A core with a zero-cost model."""
    done: list[Instruction] = []

    def start_job(job: int, function: Callable[[], Any]) -> None:
        done.append(JobDone(job, function()))

    core = Core(ZeroCostLoader(max_num_sequence=max_num_sequence), start_job)
    core.handle([Reload(EngineConfig("zero-cost"))])
    while done:
        core.handle([done.pop()])
    return core


def measure(running: int, steps: int, waiting: int) -> float:
    """Median microseconds per running request per step."""
    core = loaded_core(running)
    assert core.view is not None
    params = resolve(
        GenerationConfig(max_tokens=steps + 50), GenerationConfig(), vocab_size=1000, eos_token_ids=(3,),
        max_tokens=8000, seed=0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    requests = tuple(
        NewRequest(number, f"r{number}", rng.integers(4, 1000, 32, dtype=np.int32), params)
        for number in range(running + waiting)
    )
    core.handle([AddRequests(requests, core.view.epoch, Nowhere())])
    while core.metrics().num_requests_running < running:
        core.step()
    for _ in range(20):
        core.step()
        core.outbox.flush()
    times = []
    for _ in range(steps):
        begun = time.perf_counter()
        core.step()
        core.outbox.flush()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6 / running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, nargs="+", default=[1, 16, 64, 256, 512])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--waiting", type=int, default=0)
    arguments = parser.parse_args()
    results = {}
    print(f"{'running':>8} {'µs/request/step':>16} {'µs/step':>10}")
    for running in arguments.running:
        microseconds = measure(running, arguments.steps, arguments.waiting)
        results[running] = round(microseconds, 3)
        print(f"{running:>8} {microseconds:>16.2f} {microseconds * running:>10.1f}")
    print(json.dumps({"benchmark": "scheduler", "unit": "µs per running request per step", "results": results}))


if __name__ == "__main__":
    main()
