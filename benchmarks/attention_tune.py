"""Finds tile sizes of the Triton attention kernel for the CUDA device that is there, and stores them.

For each size of head and dtype, one thing after the other is varied and the fastest kept: the keys that are multiplied
at a time and the length of a split; rows, warps and stages of short tiles (timed on decodes: 64 sequences of 1,024
tokens, and one of 8,192); the same of long tiles (timed on a prefill of 2,048 tokens). A candidate that does not
compile, does not fit or computes something else is passed over. A time is the median of 20 launches by events.

With --compile nothing is timed: every candidate is compiled for Hopper without a GPU, and what spills registers is
listed (it would lose). The last line is one JSON object.

    python -m benchmarks.attention_tune [--write] [--heads 64 128 256] [--dtypes bfloat16 fp8_e4m3] [--seconds 400]
    python -m benchmarks.attention_tune --compile [--heads 128] [--dtypes bfloat16]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from asyncengine.model.attention import tuned_tiles
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.attention.triton import TritonAttention
from asyncengine.model.attention.triton_tiles import Launch, Tiles, tiles_for
from asyncengine.step.batch import StepBatch

DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "fp8_e4m3": torch.float8_e4m3fn,
}  # fmt: skip
PAGE = 16
DECODES = ((64, 1024), (1, 8192))
PREFILL = 2048
Times = tuple[float, float]
"""Seconds of the decodes, and of the prefill."""


def cuts(start: Tiles) -> Iterator[Tiles]:
    """The same launches with other numbers of keys."""
    for keys, split in itertools.product((32, 64, 128), (256, 512)):
        yield dataclasses.replace(start, keys=keys, split=split)


def launches(rows: tuple[int, ...]) -> Iterator[Launch]:
    """Every way to launch one kind of tile."""
    for row, warps, stages, registers in itertools.product(rows, (4, 8), (2, 3, 4), (None, 248)):
        if registers is None or warps == 4:  # 8 warps of 248 registers leave room for one program
            yield Launch(row, warps, stages, registers)


def candidates(start: Tiles) -> list[list[Callable[[Tiles], Tiles]]]:
    """What is tried, in rounds: each changes one thing of the best so far."""

    def other(cut: Tiles) -> Callable[[Tiles], Tiles]:
        return lambda best: dataclasses.replace(best, keys=cut.keys, split=cut.split)

    def short(launch: Launch) -> Callable[[Tiles], Tiles]:
        return lambda best: dataclasses.replace(best, short=launch)

    def long(launch: Launch) -> Callable[[Tiles], Tiles]:
        return lambda best: dataclasses.replace(best, long=launch)

    return [
        [other(cut) for cut in cuts(start)],
        [short(launch) for launch in launches((16, 32))],
        [long(launch) for launch in launches((32, 64, 128))],
    ]


def tune(
    start: Tiles,
    measure: Callable[[Tiles], Times | None],
    until: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Tiles, Times | None, int]:
    """Looks for something faster than `start`.

    Args:
        start: Where to begin.
        measure: Times tiles; None where they do not work.
        until: When to stop.
        clock: Tells the time.

    Returns:
        The fastest, its times (None if not even the start works), and how many were measured.
    """
    first = measure(start)
    tried: dict[Tiles, Times | None] = {start: first}
    best, times = start, first
    for choices in candidates(start):
        round_best, round_times = best, times
        for change in choices:
            tiles = change(best)
            if tiles in tried:
                continue
            if clock() >= until:
                return round_best, round_times, len(tried)
            tried[tiles] = found = measure(tiles)
            if found is not None and (round_times is None or _cost(found, first) < _cost(round_times, first)):
                round_best, round_times = tiles, found
        best, times = round_best, round_times
    return best, times, len(tried)


def _cost(times: Times, first: Times | None) -> float:
    """Both kinds count alike, whatever they take."""
    scale = first or (1.0, 1.0)
    return times[0] / scale[0] + times[1] / scale[1]


def step(new: list[int], contexts: list[int]) -> StepBatch:
    """Rows that lie in blocks of their own."""
    lengths = [a + b for a, b in zip(new, contexts, strict=True)]
    blocks = [-(-length // PAGE) for length in lengths]
    order = np.random.default_rng(0).permutation(sum(blocks))
    tables = np.zeros((len(new), max(blocks)), np.int32)
    for row, (end, count) in enumerate(zip(np.cumsum(blocks), blocks, strict=True)):
        tables[row, :count] = order[end - count : end]
    positions = np.concatenate([np.arange(context, length) for context, length in zip(contexts, lengths, strict=True)])
    rows = np.repeat(np.arange(len(new)), new)
    nothing = np.zeros(0, np.int64)
    return StepBatch(
        token_ids=np.zeros(sum(new), np.int32),
        positions=positions.astype(np.int32),
        query_start=np.cumsum([0, *new]).astype(np.int32),
        context_lens=np.array(contexts, np.int32),
        block_tables=tables,
        slot_mapping=tables[rows, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE,
        sample_index=nothing,
        sample_slots=nothing,
        sample_positions=nothing,
        copies=nothing.reshape(0, 2),
        num_decodes=sum(count == 1 for count in new),
    )


class Workload:
    """Decodes and a prefill over one layer, and what they should give."""

    def __init__(self, spec: LayerSpec, kv_dtype: torch.dtype, device: torch.device) -> None:
        self._spec, self._kv_dtype, self._device = spec, kv_dtype, device
        dtype = torch.bfloat16 if kv_dtype is torch.float8_e4m3fn else kv_dtype
        self._steps = [step([1] * count, [context - 1] * count) for count, context in DECODES] + [step([PREFILL], [0])]
        self._blocks = max(int(batch.block_tables.max()) + 1 for batch in self._steps)
        self._inputs = []
        generator = torch.Generator(device).manual_seed(0)
        for batch in self._steps:
            shapes = [
                (spec.num_heads, spec.key_dim),
                (spec.num_kv_heads, spec.key_dim),
                (spec.num_kv_heads, spec.value_dim),
            ]
            tokens = len(batch.token_ids)
            self._inputs.append(
                [torch.randn(tokens, *shape, generator=generator, device=device).to(dtype) for shape in shapes]
            )
        self._expected = self._run(TorchAttention(), repeats=0)[1]

    def __call__(self, tiles: Tiles) -> Times | None:
        """Times them; None where they do not work."""
        key = (self._kv_dtype.itemsize, self._spec.key_dim, self._spec.value_dim)
        try:
            seconds, outputs = self._run(TritonAttention(tuned={key: tiles}), repeats=20)
        except Exception as error:
            print(f"  {tiles}: {str(error).splitlines()[0] if str(error) else error!r}", flush=True)
            return None
        for found, wanted in zip(outputs, self._expected, strict=True):
            error = (found.float() - wanted.float()).norm() / wanted.float().norm()
            if not error < 2e-2:
                print(f"  {tiles}: computes something else: {float(error):.2g}", flush=True)
                return None
        return sum(seconds[:-1]), seconds[-1]

    def _run(self, backend: Any, repeats: int) -> tuple[list[float], list[torch.Tensor]]:
        spec, seconds, outputs = self._spec, [], []
        cache = backend.allocate(spec, self._blocks, PAGE, self._kv_dtype, self._device)
        generator = torch.Generator(self._device).manual_seed(1)
        for numbers in (cache.keys, cache.values):
            shape = (self._blocks, PAGE, spec.num_kv_heads, numbers.shape[-1])
            held = torch.randn(shape, generator=generator, device=self._device)
            numbers.copy_(held.transpose(1, 2) if isinstance(backend, TritonAttention) else held)
        for batch, inputs in zip(self._steps, self._inputs, strict=True):
            plan = backend.plan(batch, PAGE, self._device)
            outputs.append(backend.attend(spec, cache, plan, *inputs, None))
            times = []
            for _ in range(repeats):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                backend.attend(spec, cache, plan, *inputs, None)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            seconds.append(statistics.median(times) if times else 0.0)
        return seconds, outputs


def compile_all(start: Tiles, spec: LayerSpec, dtype: torch.dtype) -> tuple[int, list[str]]:
    """Compiles every candidate for Hopper; how many kernels there are, and those that spill."""
    from benchmarks.attention_compile import cases_of, compiled

    done: dict[str, int] = {}
    for choices in candidates(start):
        for change in choices:
            tiles = change(start)
            for case in cases_of("", spec, dtype, tiles):
                name = f"{case.function.__name__} {case.launch} keys {tiles.keys} split {tiles.split}"
                if case.function.__name__ == "attend" and name not in done:
                    done[name] = compiled(case)["spilled"]
    return len(done), [name for name, spilled in done.items() if spilled]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "fp8_e4m3"])
    parser.add_argument("--seconds", type=float, default=400.0, help="no measurement begins after this time")
    parser.add_argument("--write", action="store_true", help="store what was found in the package")
    parser.add_argument("--compile", action="store_true", help="compile every candidate for Hopper; needs no GPU")
    options = parser.parse_args(arguments)
    if not options.compile and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --compile needs none")
    found: dict[tuned_tiles.Key, Tiles] = {}
    results: dict[str, Any] = {}
    sizes = list(itertools.product(options.heads, options.dtypes))
    begun = time.monotonic()
    for number, (head, name) in enumerate(sizes):
        dtype = DTYPES[name]
        spec = LayerSpec(32, 8, head, head, head**-0.5)
        start = tiles_for(dtype.itemsize, head, head)
        if start is None:
            parser.error(f"--heads: there are no tiles to begin with for heads of {head}")
        if options.compile:
            kernels, spilling = compile_all(start, spec, dtype)
            results[f"{head} {name}"] = {"kernels": kernels, "spilling": spilling}
        else:
            until = begun + options.seconds * (number + 1) / len(sizes)
            workload = Workload(spec, dtype, torch.device("cuda", torch.cuda.current_device()))
            before = workload(start)
            best, times, tried = tune(start, workload, until)
            if times is not None:
                found[dtype.itemsize, head, head] = best
            results[f"{head} {name}"] = {
                "tried": tried,
                "before": before,
                "after": times,
                "tiles": dataclasses.asdict(best),
            }
        print(f"{head} {name}: {results[f'{head} {name}']}", flush=True)
    about = {"torch": torch.__version__, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    if options.write and found:
        print(tuned_tiles.write(torch.cuda.get_device_name(), found, about))
    print(json.dumps({"benchmark": "attention_tune", **about, "results": results}))


if __name__ == "__main__":
    main()
