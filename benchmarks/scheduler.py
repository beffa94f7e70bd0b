"""Host cost of a step: microseconds of schedule and bookkeeping per running request per step, decoding.

The core is driven synchronously, without threads, over a model that costs nothing; events go to a mailbox that drops
them. Counted is everything that the step thread does for a step besides the model: schedule, batch, advance, commit,
stop conditions, events, metrics. "decode" is the median over steps that only decode, with `--waiting` requests in
line. "turnover" is the median over steps in each of which one request ends and the next one in line starts, so that
the waiting queue is worked at. Both ought not to depend on how many wait. The last line is one JSON object.

    python -m benchmarks.scheduler [--running 1 16 64 256 512] [--waiting 0 1000 100000] [--steps 300] [--ahead]
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
from asyncengine.step.model import Loader
from benchmarks.zero_cost import ZeroCostLoader


class Nowhere:
    """A mailbox that drops what it gets."""

    def post(self, events: list[Event]) -> bool:
        return True


def loaded_core(max_num_sequence: int, max_length: int = 8192, run_ahead: bool = False) -> Core:
    """A core with a zero-cost model."""
    return core_with(ZeroCostLoader(0.0, max_num_sequence, max_length, run_ahead), EngineConfig("zero-cost"))


def core_with(loader: Loader, config: EngineConfig) -> Core:
    """A core with a model; what fails to load is raised."""
    done: list[Instruction] = []

    def start_job(job: int, function: Callable[[], Any]) -> None:
        done.append(JobDone(job, function()))

    core = Core(loader, start_job)
    core.handle([Reload(config)])
    while done:
        core.handle([done.pop()])
    assert core.loaded is not None
    return core


def filled_core(running: int, waiting: int, tokens: Callable[[int], int], run_ahead: bool = False) -> Core:
    """A core with so many requests that decode and so many that wait; `tokens` says how many each generates."""
    core = loaded_core(running, run_ahead=run_ahead)
    assert core.view is not None
    rng = np.random.default_rng(0)
    prompts = rng.integers(4, 1000, (running + waiting, 32), dtype=np.int32)
    params = {}
    requests = []
    for number, prompt in enumerate(prompts):
        count = tokens(number)
        if count not in params:
            params[count] = resolve(
                GenerationConfig(max_tokens=count), GenerationConfig(), vocab_size=1000, eos_token_ids=(3,),
                max_tokens=8000, seed=0,
            )  # fmt: skip
        requests.append(NewRequest(number, f"r{number}", prompt, params[count]))
    core.handle([AddRequests(tuple(requests), core.view.epoch, Nowhere())])
    while core.metrics().num_requests_running < running:
        core.step()
    return core


def step_seconds(core: Core, steps: int) -> list[float]:
    """Of so many steps, after a few to warm up."""
    times = []
    for _ in range(steps + 20):
        begun = time.perf_counter()
        core.step()
        core.outbox.flush()
        times.append(time.perf_counter() - begun)
    return times[20:]


def decode(running: int, steps: int, waiting: int, run_ahead: bool = False) -> float:
    """Median seconds of a step in which all decode and none ends."""
    return statistics.median(step_seconds(filled_core(running, waiting, lambda _: steps + 50, run_ahead), steps))


def turnover(running: int, steps: int, waiting: int, run_ahead: bool = False) -> float:
    """Median seconds of a step in which one request ends and one starts; the ends are spread over the steps."""
    # The first ones end one by one; whoever comes after runs for as many steps as there are slots.
    core = filled_core(
        running, waiting + steps + 40, lambda number: 25 + number if number < running else running + 1, run_ahead
    )
    return statistics.median(step_seconds(core, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, nargs="+", default=[1, 16, 64, 256, 512])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 1000, 100_000])
    parser.add_argument("--ahead", action="store_true", help="launch steps ahead")
    arguments = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'running':>8} {'waiting':>8} {'decode µs/request':>18} {'decode µs/step':>15} {'turnover µs/step':>17}")
    for running in arguments.running:
        for waiting in arguments.waiting:
            decoding = decode(running, arguments.steps, waiting, arguments.ahead) * 1e6
            turning = turnover(running, arguments.steps, waiting, arguments.ahead) * 1e6
            results.setdefault(str(running), {})[str(waiting)] = {
                "decode_us_per_request": round(decoding / running, 3),
                "decode_us": round(decoding, 1),
                "turnover_us": round(turning, 1),
            }
            print(f"{running:>8} {waiting:>8} {decoding / running:>18.2f} {decoding:>15.1f} {turning:>17.1f}")
    print(json.dumps({"benchmark": "scheduler", "results": results}))


if __name__ == "__main__":
    main()
