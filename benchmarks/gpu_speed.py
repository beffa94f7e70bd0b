"""What the device can do, and what the engine makes of it. The parts of `benchmarks.gpu` that need the engine.

Steps are watched from the outside: a probe around the model's `execute`, or `launch` and `collect`, notes begin, end
and size of each step, and, on a CUDA device, records an event once the step's plan is there and another one behind its
draw. "Idle" is the share of the time from the latter to the next step's former, in which the device has nothing to do;
what it waits for within a step does not count. A step that was launched behind another one begins where that one ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from asyncengine import AsyncEngine, GenerationConfig
from asyncengine.model.runner import TorchModel
from asyncengine.step.batch import StepBatch

READER_PROMPT = 8
"""Tokens of the prompts whose readers are counted."""


@dataclass(slots=True)
class Step:
    """One step as it was seen."""

    begun: float
    ended: float
    tokens: int
    decodes: int
    context: int
    events: tuple[Any, Any] | None = None


@dataclass(slots=True)
class Probe:
    """Watches all steps while it is on."""

    steps: list[Step] = field(default_factory=list)

    def decodes(self, count: int) -> list[list[Step]]:
        """Runs of steps, one right after the other, that decode `count` sequences and nothing else."""
        runs: list[list[Step]] = [[]]
        for step in self.steps:
            if step.decodes == step.tokens == count:
                runs[-1].append(step)
            elif runs[-1]:
                runs.append([])
        return [run for run in runs if len(run) > 1]


@contextlib.contextmanager
def probing(device: torch.device) -> Iterator[Probe]:
    """Puts a probe around every step in the process."""
    probe, plain_execute, plain_begin = Probe(), TorchModel.execute, TorchModel.begin_with
    plain_launch, plain_collect = TorchModel.launch, TorchModel.collect
    launched: dict[int, Step] = {}
    cuda = device.type == "cuda"
    events: list[Any] = []

    def begin_with(self: TorchModel, batch: StepBatch, sections: Any, *captured: bool) -> Any:
        plan = plain_begin(self, batch, sections, *captured)
        if cuda:
            # Behind the copies of the step's plan: until here the device had nothing to do.
            events[:] = [torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)]
            events[0].record()
        return plan

    def execute(self: TorchModel, batch: StepBatch) -> Any:
        begun = time.perf_counter()
        tokens = plain_execute(self, batch)
        probe.steps.append(noted(batch, begun))
        return tokens

    def noted(batch: StepBatch, begun: float) -> Step:
        if cuda:
            events[1].record()
        pair = (events[0], events[1]) if cuda else None
        context = int(batch.context_lens.sum())
        return Step(begun, time.perf_counter(), len(batch.token_ids), batch.num_decodes, context, pair)

    def launch(self: TorchModel, batch: StepBatch) -> Any:
        begun = time.perf_counter()
        flight = plain_launch(self, batch)
        launched[id(flight)] = noted(batch, begun)
        return flight

    def collect(self: TorchModel, flight: Any) -> Any:
        step = launched.pop(id(flight))
        tokens = plain_collect(self, flight)
        if probe.steps:
            step.begun = max(step.begun, probe.steps[-1].ended)
        step.ended = time.perf_counter()
        probe.steps.append(step)
        return tokens

    probed = {"execute": execute, "begin_with": begin_with, "launch": launch, "collect": collect}
    plain = {name: getattr(TorchModel, name) for name in probed}
    for name, function in probed.items():
        setattr(TorchModel, name, function)
    try:
        yield probe
    finally:
        for name, function in plain.items():
            setattr(TorchModel, name, function)


def ceilings(device: torch.device, megabytes: int, size: int, dtype: torch.dtype) -> dict[str, float]:
    """The device's own limits: bytes per second of a copy (read plus written), and of a matrix product."""
    source = torch.randn(megabytes << 18, device=device)  # 4 bytes each
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = _seconds(lambda: a @ b, device)
    read = _seconds(lambda: source.sum(), device)
    return {
        "copy_gb_per_s": round(2 * source.nbytes / copy / 1e9, 1),
        "read_gb_per_s": round(source.nbytes / read / 1e9, 1),
        "matmul_tflop_per_s": round(2 * size**3 / product / 1e12, 6),
    }


def _seconds(function: Any, device: torch.device, repeats: int = 20) -> float:
    """Median seconds of one call, on the device's own clock where it has one."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def prompts(count: int, tokens: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of one length."""
    return np.random.default_rng(seed).integers(1, vocab, (count, tokens)).tolist()  # type: ignore[no-any-return]


def greedy(tokens: int) -> GenerationConfig:
    """So many tokens, whatever they are, and no text of them."""
    return GenerationConfig(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def until_all_decode(count: int, prompt: int, chunk: int) -> int:
    """Steps at most until `count` prompts are computed, beside the decodes of those that came first."""
    return -(-count * prompt // max(1, chunk - count)) + 4


async def decode(
    engine: AsyncEngine,
    probe: Probe,
    device: torch.device,
    batch: int,
    context: int,
    steps: int,
    model: dict[str, Any],
) -> dict[str, float]:
    """Decoding `batch` sequences of about `context` tokens: the time of a step, and what share of bandwidth it reaches.

    Weights (without the embedding's table) and the keys and values of every sequence are read once per step.
    """
    probe.steps.clear()
    vocab = model["vocab"]
    tokens = until_all_decode(batch, context, model["chunk"]) + steps
    await engine.generate_many(prompts(batch, context, vocab, seed=batch), greedy(tokens))
    await engine.reset()
    run = max(probe.decodes(batch), key=len)[2:]
    spans = [after.begun - before.begun for before, after in itertools.pairwise(run)]
    seconds = statistics.median(spans)
    moved = model["weight_bytes"] + statistics.median(step.context for step in run) * model["kv_bytes_per_token"]
    result = {
        "steps": len(run),
        "ms_per_step": round(seconds * 1e3, 3),
        "tokens_per_s": round(batch / seconds, 1),
        "gb_per_s": round(moved / seconds / 1e9, 1),
        "share_of_copy_bandwidth": round(moved / seconds / 1e9 / model["copy_gb_per_s"], 3),
    } | gaps(run, device)
    prefill = [step for step in probe.steps if step.decodes == 0 and step.tokens >= model["chunk"]]
    if prefill:
        span = statistics.median(step.ended - step.begun for step in prefill)
        result["prefill_tokens_per_s"] = round(model["chunk"] / span, 1)
        flops = 2 * model["parameters"] * model["chunk"] / span / 1e12
        result["prefill_share_of_matmul_rate"] = round(flops / model["matmul_tflop_per_s"], 3)
    return result


def gaps(run: list[Step], device: torch.device) -> dict[str, float]:
    """Between steps that follow each other: host time, and the device's idle share."""
    between = sorted(after.begun - before.ended for before, after in itertools.pairwise(run))
    result = {
        "gap_p50_us": round(statistics.median(between) * 1e6, 1),
        "gap_p99_us": round(between[int(len(between) * 0.99)] * 1e6, 1),
    }
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        pairs = [step.events for step in run if step.events is not None]
        idle = sum(before[1].elapsed_time(after[0]) for before, after in itertools.pairwise(pairs))
        result["device_idle_share"] = round(idle / pairs[0][0].elapsed_time(pairs[-1][1]), 4)
    return result


async def first_token(
    engine: AsyncEngine, probe: Probe, vocab: int, load: int, repeats: int, prompt: int
) -> dict[str, Any]:
    """Milliseconds from giving a prompt to its first token: with an idle engine, and beside `load` decodes.

    "bare" is the model's own step for the same prompt.
    """
    background = []
    if load:
        streams = [await engine.add_request(p, greedy(100_000)) for p in prompts(load, prompt, vocab, seed=5)]
        background = [asyncio.create_task(_read(stream)) for stream in streams]
        await _first(engine, prompts(1, prompt, vocab, seed=6)[0])
    times, bare = [], []
    for i in range(repeats):
        probe.steps.clear()
        times.append(await _first(engine, prompts(1, prompt, vocab, seed=100 + i)[0]))
        bare.append(min(step.ended - step.begun for step in probe.steps if step.tokens >= prompt))
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    await engine.reset()
    ms, bare_ms = statistics.median(times) * 1e3, statistics.median(bare) * 1e3
    return {"load": load, "ttft_ms": round(ms, 2), "bare_ms": round(bare_ms, 2), "ratio": round(ms / bare_ms, 3)}


async def _first(engine: AsyncEngine, prompt: list[int]) -> float:
    begun = time.perf_counter()
    async for _ in engine.stream(prompt, greedy(1)):
        return time.perf_counter() - begun
    raise RuntimeError("a request ended without a token")


async def _read(stream: Any) -> None:
    async for _ in stream:
        pass


def workload(count: int, low: int, high: int, vocab: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens each is to generate: both uniform in low..high, seed 0."""
    generator = np.random.default_rng(0)
    inputs = generator.integers(low, high + 1, count)
    outputs = generator.integers(low, high + 1, count).tolist()
    return [generator.integers(1, vocab, size).tolist() for size in inputs], outputs


async def serve(engine: AsyncEngine, given: list[list[int]], outputs: list[int]) -> dict[str, float]:
    """Generated tokens per second of a whole workload, given all at once."""
    begun = time.perf_counter()
    results = await engine.generate_many(given, [greedy(tokens) for tokens in outputs])
    seconds = time.perf_counter() - begun
    assert [len(result.token_ids) for result in results] == outputs
    await engine.reset()
    return {"requests": len(given), "seconds": round(seconds, 2), "tokens_per_s": round(sum(outputs) / seconds, 1)}


async def readers(
    engine: AsyncEngine, probe: Probe, device: torch.device, requests: int, steps: int, vocab: int, read: bool
) -> dict[str, float]:
    """Gaps between steps that decode `requests` sequences, with a task per sequence that reads, or with nobody."""
    probe.steps.clear()
    await engine.pause()
    streams = [await engine.add_request(p, greedy(steps)) for p in prompts(requests, READER_PROMPT, vocab, seed=9)]
    tasks = [asyncio.create_task(_read(stream)) for stream in (streams if read else streams[:1])]
    await engine.resume()
    await asyncio.gather(*tasks)
    await engine.reset()
    run = max(probe.decodes(requests), key=len)[2:]
    span = (run[-1].begun - run[0].begun) / (len(run) - 1)
    return {"readers": requests if read else 0, "ms_per_step": round(span * 1e3, 3)} | gaps(run, device)
