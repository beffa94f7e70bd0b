"""Milliseconds that one layer of paged attention takes on this machine's CPU.

Three step shapes, all with 16 query and 8 key-value heads of 128 in bfloat16 unless told otherwise:

* ``decode``: 16 rows of one token each, contexts spread evenly from 512 to 1,024. Limited by how fast the keys and
  values are read, so the share of the memory's bandwidth is given too (measured here, by summing a large array).
* ``prefill``: 512 new tokens of one row on top of 1,024 in the cache. Limited by arithmetic; given in TFLOP/s, where
  each visible (query head, token) pair counts 2 * (key_dim + value_dim) operations.
* ``overhead``: one row, one token, no context, one thread: the cost of a call that has nothing to do, in microseconds.

A figure is the median over repetitions, and the best of them where something else may be running; each repetition uses
the next of several layers' caches, so that none of it is left in the processor's caches (they hold 32 MiB or so). The
last line is one JSON object with every figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.protocol import AttentionBackend, LayerSpec
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.step.batch import StepBatch

CPU = torch.device("cpu")


def bandwidth() -> float:
    """Bytes per second that all threads together read."""
    words = torch.ones(1 << 27, dtype=torch.float32)
    best = min(timed(lambda: words.sum()) for _ in range(7))
    return words.nbytes / best


def timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def batch_of(new: list[int], contexts: list[int], page_size: int) -> tuple[StepBatch, int]:
    """Rows over randomly ordered blocks, and how many blocks they need."""
    counts = [-(-(context + n) // page_size) for context, n in zip(contexts, new, strict=True)]
    blocks = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
    tables = np.zeros((len(new), max(counts)), np.int32)
    for row, part in enumerate(np.split(blocks, np.cumsum(counts)[:-1])):
        tables[row, : len(part)] = part
    positions = [np.arange(context, context + n) for context, n in zip(contexts, new, strict=True)]
    slots = [tables[row][at // page_size] * page_size + at % page_size for row, at in enumerate(positions)]
    none = np.zeros(0, np.int64)
    batch = StepBatch(
        token_ids=np.zeros(sum(new), np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        query_start=np.cumsum([0, *new]).astype(np.int32),
        context_lens=np.asarray(contexts, np.int32),
        block_tables=tables,
        slot_mapping=np.concatenate(slots).astype(np.int64),
        sample_index=none,
        sample_slots=none,
        sample_positions=none,
        copies=none.reshape(0, 2),
        num_decodes=sum(n == 1 for n in new),
    )
    return batch, sum(counts)


def measure(
    backend: AttentionBackend,
    spec: LayerSpec,
    new: list[int],
    contexts: list[int],
    page_size: int,
    dtype: torch.dtype,
    repetitions: int,
    layers: int = 4,
) -> tuple[float, float]:
    """Median and least seconds of one layer's call."""
    batch, num_blocks = batch_of(new, contexts, page_size)
    caches = [backend.allocate(spec, num_blocks, page_size, dtype, CPU) for _ in range(layers)]
    for cache in caches:
        cache.keys.normal_()
        cache.values.normal_()
    tokens = sum(new)
    query = torch.randn(tokens, spec.num_heads, spec.key_dim, dtype=dtype)
    key = torch.randn(tokens, spec.num_kv_heads, spec.key_dim, dtype=dtype)
    value = torch.randn(tokens, spec.num_kv_heads, spec.value_dim, dtype=dtype)
    plan = backend.plan(batch, page_size, CPU)
    times = [
        timed(lambda i=i: backend.attend(spec, caches[i % layers], plan, query, key, value, None))
        for i in range(repetitions + layers)
    ]
    return statistics.median(times[layers:]), min(times[layers:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["cpu", "torch"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--heads", type=int, nargs=2, default=[16, 8], metavar=("QUERY", "KV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=40)
    arguments = parser.parse_args()
    backend: AttentionBackend = CpuAttention() if arguments.backend == "cpu" else TorchAttention()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    heads, kv_heads = arguments.heads
    dim = arguments.head_dim
    spec = LayerSpec(heads, kv_heads, dim, dim, dim**-0.5)
    peak = bandwidth()
    print(f"{arguments.backend}, {arguments.dtype}, {torch.get_num_threads()} threads, memory {peak / 1e9:.1f} GB/s")
    figures: dict[str, float] = {"memory_gb_s": peak / 1e9}

    contexts = np.linspace(511, 1023, 16).astype(int).tolist()
    read = sum(context + 1 for context in contexts) * kv_heads * 2 * dim * dtype.itemsize
    pairs = sum(range(1025, 1025 + 512)) * heads
    for page_size in arguments.page_sizes:
        median, best = measure(backend, spec, [1] * 16, contexts, page_size, dtype, arguments.repetitions)
        share, best_share = (read / seconds / peak for seconds in (median, best))
        print(
            f"page {page_size}: decode {median * 1e3:.2f} ms, {share:.0%} of the memory's bandwidth "
            f"(best {best * 1e3:.2f} ms, {best_share:.0%}); ",
            end="",
        )
        figures[f"decode_ms_page_{page_size}"] = median * 1e3
        figures[f"decode_best_ms_page_{page_size}"] = best * 1e3
        figures[f"decode_bandwidth_share_page_{page_size}"] = share
        median, best = measure(backend, spec, [512], [1024], page_size, dtype, arguments.repetitions)
        print(
            f"prefill {median * 1e3:.1f} ms, {pairs * 4 * dim / median / 1e12:.2f} TFLOP/s (best {best * 1e3:.1f} ms)"
        )
        figures[f"prefill_ms_page_{page_size}"] = median * 1e3
        figures[f"prefill_best_ms_page_{page_size}"] = best * 1e3

    torch.set_num_threads(1)
    median, _ = measure(backend, LayerSpec(1, 1, 8, 8, 1.0), [1], [0], 16, dtype, 2000)
    print(f"overhead of a call {median * 1e6:.1f} microseconds")
    figures["overhead_us"] = median * 1e6
    print(json.dumps({name: round(figure, 4) for name, figure in figures.items()}))


if __name__ == "__main__":
    main()
