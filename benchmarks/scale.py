"""Scale curves: tokens/s, cost on the host and memory against what grows, each beside its limit, as SVG and JSON.

The core is driven synchronously, as `benchmarks.scheduler` does, so that a step is model + host and nothing else.

* running: N requests decode with 8 to 40 tokens behind them on a real model. The limit is the larger of the bytes of
  weights and KV cache over the memory's bandwidth, and the operations (two for each weight and token) over the rate of
  torch's matrix product, in float32 or the model's dtype, whichever is faster; both are measured in the same run.
  "host" is the step without the model.
* context: one step of two rows with N tokens behind each, on a real model whose cache was written before. The limit
  is bytes over bandwidth. "host" comes from a model that costs nothing.
* waiting: N requests in line while 64 decode on a model that costs nothing. "decode" and "turnover" as in
  `benchmarks.scheduler`; both ought to be flat.
* prefix: a prompt whose first N per cent are in the prefix cache. Seconds until its first token; the limit is the time
  without the cache, times the share that has to be computed.

Times are medians, except that a prefill is the best of two. The last line is one JSON object.

    python -m benchmarks.scale [--shape S] [--dtype bfloat16] [--only running context waiting prefix]
        [--write docs/images] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asyncengine import EngineConfig, GenerationConfig
from asyncengine.cli.plot import CORNERS, Panel, document
from asyncengine.generation import resolve
from asyncengine.instructions import AddRequests, NewRequest
from asyncengine.step.core import Core
from benchmarks import scheduler, shapes, step

Row = dict[str, float]


@dataclass(frozen=True, slots=True)
class Machine:
    """What the limits are made of: bytes and operations per second, measured, and the model's sizes."""

    bandwidth: float
    operations: float
    weight_bytes: int
    weights: int
    kv_bytes: int

    def step_seconds(self, tokens: int, cached: int) -> float:
        """The least that a step can take that computes `tokens` and attends to `cached` keys in all."""
        read = self.weight_bytes + cached * self.kv_bytes
        return max(read / self.bandwidth, 2 * self.weights * tokens / self.operations)


def machine(arguments: argparse.Namespace) -> Machine:
    import torch

    size = 256 if arguments.tiny else 2048
    times = []
    for dtype in {torch.float32, getattr(torch, arguments.dtype)}:
        left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        for _ in range(5):
            begun = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - begun)
    model = shapes.make(arguments.shape, arguments.dtype, "meta")
    weights = sum(parameter.numel() for parameter in model.parameters())
    values = model.config
    head_dim = getattr(values, "head_dim", None) or values.hidden_size // values.num_attention_heads
    kv_bytes = 2 * values.num_hidden_layers * values.num_key_value_heads * head_dim
    item = getattr(torch, arguments.dtype).itemsize
    return Machine(
        step.bandwidth(1 << 22 if arguments.tiny else 1 << 27),
        2 * size**3 / min(times),
        weights * item,
        weights,
        kv_bytes * item,
    )


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def core_of(arguments: argparse.Namespace, path: Path, rows: int, tokens: int) -> Core:
    """A core with the real model and room for so many tokens."""
    from asyncengine.model.loader import TransformersLoader

    config = EngineConfig(
        str(path), device="cpu", dtype=arguments.dtype, max_num_sequence=rows, max_total_sequence_length=tokens,
        kv_cache_page_size=step.PAGE, max_queue_size=100_000,
    )  # fmt: skip
    return scheduler.core_with(TransformersLoader(), config)


def add(core: Core, prompts: list[np.ndarray], tokens: int, first: int = 0) -> None:
    assert core.view is not None
    params = resolve(
        GenerationConfig(max_tokens=tokens, temperature=0, ignore_eos=True), GenerationConfig(),
        vocab_size=core.view.vocab_size, eos_token_ids=(), max_tokens=8000, seed=0,
    )  # fmt: skip
    new = tuple(
        NewRequest(first + number, f"r{first + number}", prompt, params) for number, prompt in enumerate(prompts)
    )
    core.handle([AddRequests(new, core.view.epoch, scheduler.Nowhere())])


def finish(core: Core) -> None:
    """Steps until nothing is left."""
    while core.metrics().num_requests_running or core.metrics().num_requests_waiting:
        core.step()
        core.outbox.flush()


def running(arguments: argparse.Namespace, path: Path, limits: Machine) -> list[Row]:
    counts = [1, 2, 4] if arguments.tiny else [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    core, rows, draw, number = core_of(arguments, path, counts[-1], counts[-1] * 64), [], np.random.default_rng(0), 0
    vocabulary = shapes.SHAPES[arguments.shape]["vocab_size"]
    for count in counts:
        steps = 5 if count > 64 else 15
        prompts = [draw.integers(1, vocabulary, 8, dtype=np.int32) for _ in range(count)]
        add(core, prompts, steps + 40, number)
        number += count
        while core.metrics().num_requests_running < count or core.metrics().counters.generation_tokens < number:
            core.step()
        whole, hosts = [], []
        for _ in range(steps):
            before = core.counters.model_seconds.total
            begun = time.perf_counter()
            core.step()
            core.outbox.flush()
            whole.append(time.perf_counter() - begun)
            hosts.append(whole[-1] - (core.counters.model_seconds.total - before))
        used = core.metrics().kv_blocks_used * step.PAGE
        seconds, limit = statistics.median(whole), limits.step_seconds(count, used)
        rows.append(
            {
                "x": count, "tokens_per_s": count / seconds, "step_ms": seconds * 1e3, "limit_ms": limit * 1e3,
                "limit_tokens_per_s": count / limit, "host_us": statistics.median(hosts) * 1e6,
                "kv_mb": used * limits.kv_bytes / 1e6, "resident_mb": resident() / 1e6,
            }
        )  # fmt: skip
        core.requests.abort_all()
        number = core.metrics().counters.generation_tokens
    core.drop_model()
    return rows


def context(arguments: argparse.Namespace, path: Path, limits: Machine) -> list[Row]:
    lengths = [32, 64] if arguments.tiny else [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768 - step.PAGE]
    rows, sequences = [], 2
    core = core_of(arguments, path, sequences, sequences * (lengths[-1] + step.PAGE))
    assert core.loaded is not None
    model, vocabulary = core.loaded.model, core.loaded.vocab_size
    for cache in model._layers.caches:  # type: ignore[attr-defined]  # pages that were never written are all one page
        cache.keys.zero_()
        cache.values.zero_()
    step.place_greedy(model, sequences, vocabulary)
    for length in lengths:
        seconds = step.median_seconds(model, step.batch_of(sequences, 1, length, vocabulary), 7)
        limit = limits.step_seconds(sequences, sequences * length)
        rows.append(
            {
                "x": length, "step_ms": seconds * 1e3, "limit_ms": limit * 1e3, "tokens_per_s": sequences / seconds,
                "limit_tokens_per_s": sequences / limit, "host_us": host_at(length),
                "kv_mb": sequences * length * limits.kv_bytes / 1e6,
            }
        )  # fmt: skip
    core.drop_model()
    return rows


def host_at(length: int) -> float:
    """Microseconds of a step of two sequences of so many tokens on a model that costs nothing."""
    core = scheduler.loaded_core(2, 65536)
    add(core, [np.full(length, 5 + row, np.int32) for row in range(2)], 400)
    while core.metrics().num_requests_running < 2:
        core.step()
    return statistics.median(scheduler.step_seconds(core, 100)) * 1e6


def waiting(arguments: argparse.Namespace) -> list[Row]:
    counts = [0, 10] if arguments.tiny else [0, 10, 100, 1000, 10_000, 100_000]
    slots, steps, rows = (4, 10, []) if arguments.tiny else (64, 200, [])
    for count in counts:
        before = resident()
        begun = time.perf_counter()
        core = scheduler.filled_core(slots, count, lambda _: steps + 50)
        filled, memory = time.perf_counter() - begun, resident() - before
        decoding = statistics.median(scheduler.step_seconds(core, steps))
        del core
        rows.append(
            {
                "x": count, "decode_us": decoding * 1e6, "turnover_us": scheduler.turnover(slots, steps, count) * 1e6,
                "memory_mb": memory / 1e6, "admission_us": filled / (slots + count) * 1e6,
            }
        )  # fmt: skip
    return rows


def prefix(arguments: argparse.Namespace, path: Path, limits: Machine) -> list[Row]:
    length, shares = (64, [0, 50]) if arguments.tiny else (1024, [0, 25, 50, 75, 90, 100])
    core, draw, rows, number = core_of(arguments, path, 2, 8 * length), np.random.default_rng(1), [], 0
    vocabulary = shapes.SHAPES[arguments.shape]["vocab_size"]
    for share in shares:
        times, hits = [], 0
        for _ in range(2):
            known = draw.integers(1, vocabulary, length * share // 100, dtype=np.int32)
            if len(known):
                add(core, [known], 1, number)
                number += 1
                finish(core)
            prompt = np.append(known, draw.integers(1, vocabulary, length - len(known), dtype=np.int32))
            before = core.metrics().counters.prefix_cache_hits
            begun = time.perf_counter()
            add(core, [prompt], 1, number)
            number += 1
            finish(core)
            times.append(time.perf_counter() - begun)
            hits = core.metrics().counters.prefix_cache_hits - before
        rows.append({"x": share, "first_token_ms": min(times) * 1e3, "hit_tokens": hits, "computed": length - hits})
    whole = rows[0]["first_token_ms"]
    for row in rows:
        row["limit_ms"] = max(whole * row["computed"] / length, limits.step_seconds(1, 0) * 1e3)
        row["tokens_per_s"] = length / row["first_token_ms"] * 1e3
    core.drop_model()
    return rows


PLOTS = {
    "running": ("requests that run", (
        ("tokens_per_s", "tokens/s", "limit_tokens_per_s"), ("step_ms", "ms per step", "limit_ms"),
        ("host_us", "µs per step on the host", None), ("kv_mb", "MB of KV cache in use", None),
    )),
    "context": ("tokens of context", (
        ("tokens_per_s", "tokens/s", "limit_tokens_per_s"), ("step_ms", "ms per step", "limit_ms"),
        ("host_us", "µs per step on the host", None), ("kv_mb", "MB of KV cache in use", None),
    )),
    "waiting": ("requests that wait", (
        ("decode_us", "µs per step, all decode", None), ("turnover_us", "µs per step, one ends and one starts", None),
        ("memory_mb", "MB more in memory", None), ("admission_us", "µs to admit a request", None),
    )),
    "prefix": ("% of the prompt in the prefix cache", (
        ("first_token_ms", "ms to the first token", "limit_ms"), ("tokens_per_s", "tokens of prompt/s", None),
        ("computed", "tokens computed", None),
    )),
}  # fmt: skip


def plot(name: str, rows: list[Row], said: str) -> str:
    """One SVG document; dashed is the limit."""
    x_name, panels = PLOTS[name]
    parts: list[str] = []
    for corner, (key, y_name, limit) in zip(CORNERS, panels, strict=False):
        bound = None if limit is None else [(row["x"], row[limit]) for row in rows]
        points = [(row["x"], row[key]) for row in rows]
        parts += Panel(corner, x_name, y_name, points, None, bound, name != "prefix").draw([])
    return document(f"Against {x_name}", said, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="S")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--only", nargs="+", choices=list(PLOTS), default=list(PLOTS))
    parser.add_argument("--write", type=Path, metavar="DIRECTORY", help="where the plots go")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, for the tests")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shape = "tiny"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    limits = machine(arguments)
    curves: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = shapes.write(Path(directory), arguments.shape, arguments.dtype, 32768)
        parts = {
            "running": lambda: running(arguments, path, limits), "context": lambda: context(arguments, path, limits),
            "waiting": lambda: waiting(arguments), "prefix": lambda: prefix(arguments, path, limits),
        }  # fmt: skip
        for name in arguments.only:
            curves[name] = parts[name]()
            print(f"{name}:")
            for row in curves[name]:
                print("   " + "  ".join(f"{key} {value:,.4g}" for key, value in row.items()), flush=True)
    threads = torch.get_num_threads()
    ceilings = {"memory_gb_s": limits.bandwidth / 1e9, "gflop_s": limits.operations / 1e9}
    said = f"{arguments.shape}, {arguments.dtype}, {threads} threads; dashed: the limit, with " + ", ".join(
        f"{value:.0f} {unit}" for value, unit in zip(ceilings.values(), ("GB/s", "GFLOP/s"), strict=True)
    )
    if arguments.write is not None:
        arguments.write.mkdir(parents=True, exist_ok=True)
        for name, rows in curves.items():
            about = "a model that costs nothing" if name == "waiting" else said
            (arguments.write / f"scale-{name}.svg").write_text(plot(name, rows, about), encoding="utf-8")
    rounded: dict[str, Any] = {
        name: [{key: round(value, 3) for key, value in row.items()} for row in rows] for name, rows in curves.items()
    }
    names = {"benchmark": "scale", "shape": arguments.shape, "dtype": arguments.dtype, "threads": threads}
    print(json.dumps({**names, "ceilings": {key: round(value, 1) for key, value in ceilings.items()}, **rounded}))


if __name__ == "__main__":
    main()
