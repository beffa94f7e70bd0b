"""What a step costs on the host, in counts that are the same on every machine: a guard against slow regressions."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from asyncengine import EngineConfig
from asyncengine.generation import GenerationConfig, resolve
from asyncengine.instructions import AddRequests, NewRequest
from asyncengine.step.core import Core
from benchmarks.scheduler import Nowhere, loaded_core

ROOT = Path(__file__).parents[1]


def decoding(running: int, waiting: int = 0, run_ahead: bool = False) -> Core:
    """A core with so many requests that decode, over a model that costs nothing."""
    core = loaded_core(running, run_ahead=run_ahead)
    assert core.view is not None
    config = GenerationConfig(max_tokens=4000)
    params = resolve(config, GenerationConfig(), vocab_size=1000, eos_token_ids=(3,), max_tokens=8000, seed=0)
    prompt = np.arange(4, 20, dtype=np.int32)
    new = tuple(NewRequest(number, f"r{number}", prompt, params) for number in range(running + waiting))
    core.handle([AddRequests(new, core.view.epoch, Nowhere())])
    while core.metrics().num_requests_running < running:
        core.step()
    for _ in range(20):  # past the prefix cache's first pages, and whatever is derived once
        step(core)
    return core


def step(core: Core) -> None:
    core.step()
    core.outbox.flush()


def python_calls(function: Callable[[], object]) -> int:
    """Calls of functions that are written in Python."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def calls_of_a_step(core: Core) -> int:
    return min(python_calls(lambda: step(core)) for _ in range(5))  # some steps allocate blocks as well


@pytest.mark.parametrize("running", [1, 64, 256])
def test_a_decode_step_is_a_few_python_calls_however_many_requests_decode(running: int) -> None:
    assert calls_of_a_step(decoding(running)) <= 62
    assert calls_of_a_step(decoding(running, run_ahead=True)) <= 70


def test_requests_that_wait_cost_a_step_nothing() -> None:
    assert calls_of_a_step(decoding(16, waiting=5000)) == calls_of_a_step(decoding(16))


@pytest.mark.parametrize("running", [1, 256])
def test_the_trace_adds_two_spans_to_a_step(running: int) -> None:
    core = decoding(running)
    off = calls_of_a_step(core)
    core.trace.start()
    on = calls_of_a_step(core)
    assert len(core.trace) == 2 * 5
    assert on == off + 2


def admission_seconds(count: int) -> float:
    """Of the step thread's time, per request, to take so many requests that come in one instruction."""
    core = loaded_core(4)
    assert core.view is not None
    params = resolve(GenerationConfig(), GenerationConfig(), vocab_size=9, eos_token_ids=(3,), max_tokens=9, seed=0)
    prompt = np.arange(4, 8, dtype=np.int32)
    new = tuple(NewRequest(number, f"r{number}", prompt, params) for number in range(count))
    gc.disable()  # it looks at all of them again and again, which is another matter
    try:
        begun = time.thread_time()
        core.handle([AddRequests(new, core.view.epoch, Nowhere())])
        return (time.thread_time() - begun) / count
    finally:
        gc.enable()


def test_to_admit_a_request_costs_the_same_however_many_come_at_once() -> None:
    few = min(admission_seconds(2000) for _ in range(3))
    assert admission_seconds(60_000) < 4 * few  # it was 10 times as much when the first in line was searched for


def leaves_nothing(run_ahead: bool) -> None:
    """For a process of its own: other threads of a test session leave garbage, too."""
    core = decoding(256, run_ahead=run_ahead)
    gc.collect()
    gc.disable()
    blocks = sys.getallocatedblocks()
    for _ in range(100):
        step(core)
    garbage = gc.collect()
    model = core.loaded.model  # type: ignore[union-attr]
    model.begun.clear()  # type: ignore[attr-defined]  # the model of the benchmark notes its times
    model.ended.clear()  # type: ignore[attr-defined]
    print(garbage, sys.getallocatedblocks() - blocks)


def test_a_decode_step_leaves_no_cyclic_garbage_and_keeps_nothing() -> None:
    program = "from tests.test_step_cost import leaves_nothing; leaves_nothing(False); leaves_nothing(True)"
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    for line in out.splitlines():
        garbage, kept = map(int, line.split())
        assert garbage == 0
        assert kept < 100  # less than one object a step: blocks of the KV cache
    assert len(out.splitlines()) == 2


def hand_overs(running: int, steps: int) -> None:
    """For a process of its own: prints how often another thread, which always wants it, got the interpreter's lock."""
    core, count = decoding(running), 0
    pause = ctypes.CDLL(None).usleep

    def other() -> None:
        nonlocal count
        while True:
            pause(1)
            count += 1

    sys.setswitchinterval(1000)  # so that it gets the lock only where it is given up
    threading.Thread(target=other, daemon=True).start()
    while count < 10:
        time.sleep(0.01)
    got = 0
    for _ in range(steps):
        looks_up_blocks = not core.scheduler.residents.decodes().placed  # type: ignore[union-attr]
        before = count
        step(core)
        got += 0 if looks_up_blocks else count - before
    print(got, flush=True)
    os._exit(0)


@pytest.mark.parametrize("running", [pytest.param(128, marks=pytest.mark.long), 1024])
def test_a_decode_step_keeps_the_lock_beside_its_model(running: int) -> None:
    """Beside a busy loop, whoever gives it up waits for it."""
    command = [sys.executable, "-c", f"from tests.test_step_cost import hand_overs; hand_overs({running}, 400)"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert int(out) == 0


@pytest.mark.parametrize("rows", [1, 8])
def test_a_compiled_step_launches_next_to_nothing(rows: int, tmp_path: Path) -> None:
    """One call for the model; the rest is the draw."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    from asyncengine.model.loader import TransformersLoader
    from benchmarks import shapes
    from benchmarks import step as step_benchmark

    class Launches(TorchDispatchMode):  # type: ignore[misc]
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return function(*args, **(kwargs or {}))

    path = shapes.write(tmp_path, "tiny", "float32")
    loader = TransformersLoader()
    config = EngineConfig(
        str(path), device="cpu", decoder_backend="compiled", max_total_sequence_length=1024, kv_cache_page_size=32
    )
    model = loader.load(loader.check(config, None)).model
    batch = step_benchmark.batch_of(rows, 1, 16, 512)
    model.execute(batch)
    with torch.inference_mode(), Launches() as launches:
        model.execute(batch)
    model.close()
    assert launches.count <= 25
