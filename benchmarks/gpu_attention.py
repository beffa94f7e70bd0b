"""The kernels that can attend on this device, beside each other. A part of `benchmarks.gpu`.

One layer of the 8 B shape: decode of several rows of one context, and prefill of a whole chunk. Calls are queued behind
a kernel that does nothing for a while, so that the device never waits for the host between them; each takes the cache
of another layer. What a step costs the host, its plan and one call, is a figure of its own.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from asyncengine.model.attention.flash_attention import FlashAttention3
from asyncengine.model.attention.flashinfer import FlashInferAttention
from asyncengine.model.attention.protocol import AttentionBackend, BackendUnavailableError, LayerSpec
from asyncengine.model.attention.select import select
from asyncengine.model.attention.token_major import numbers_kept
from benchmarks import gpu_parity
from benchmarks.attention import batch_of

LIBRARIES: dict[str, Callable[[], AttentionBackend]] = {
    "flashinfer": FlashInferAttention,
    "flash_attention_3": FlashAttention3,
}
PARITY = ("llama", "gemma3")
"""Models whose layers all libraries know, with and without a window."""
PAGE = 16
_CALLS, _REPEATS, _LAYERS = 20, 5, 4


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that is measured, and what the device can do.

    Attributes:
        spec: The layer.
        dtype: Of queries, keys and values.
        copy_gb_per_s: Bandwidth of a copy.
        matmul_tflop_per_s: Rate of a matrix product.
    """

    spec: LayerSpec
    dtype: torch.dtype
    copy_gb_per_s: float
    matmul_tflop_per_s: float


def installed() -> tuple[tuple[str, ...], dict[str, str]]:
    """The libraries that are there; and of the others, why they are not."""
    there, missing = [], {}
    for name, make in LIBRARIES.items():
        try:
            make()
        except BackendUnavailableError as error:
            missing[name] = f"not installed: {error}"
        else:
            there.append(name)
    return tuple(there), missing


def made(name: str, device: torch.device) -> AttentionBackend:
    """A back end by name; "ours" is the one that an engine would take."""
    return select("auto", device).backend if name == "ours" else LIBRARIES[name]()


def parity(name: str, lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Whole models over a library's kernels, beside transformers; through captured steps where it has them."""
    return gpu_parity.check_backend(lambda: LIBRARIES[name](), list(PARITY), torch.bfloat16, lengths, device)


def measure(
    name: str, layer: Layer, batches: tuple[int, ...], context: int, chunk: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Decode of each number of rows over `context` tokens, and prefill of `chunk` tokens of one row.

    Returns:
        For each, microseconds of one layer's call on the device, microseconds of the host for a plan and a call, and
        the share of the bandwidth, or of the matrix rate, that is reached.
    """
    spec, backend = layer.spec, made(name, device)
    found: dict[str, dict[str, float]] = {"attention": {"kernel": backend.name}}  # type: ignore[dict-item]
    for rows in batches:
        seconds, host = _one_layer(backend, layer, [1] * rows, [context] * rows, device)
        read = rows * (context + 1) * spec.num_kv_heads * numbers_kept(spec) * layer.dtype.itemsize
        found[f"decode, batch {rows}"] = {
            "us": round(seconds * 1e6, 2),
            "host_us": round(host * 1e6, 1),
            "share_of_copy_bandwidth": round(read / seconds / 1e9 / layer.copy_gb_per_s, 3),
        }
    seconds, host = _one_layer(backend, layer, [chunk], [0], device)
    flops = 2 * (spec.key_dim + spec.value_dim) * spec.num_heads * chunk * (chunk + 1) // 2
    found[f"prefill, {chunk} tokens"] = {
        "us": round(seconds * 1e6, 2),
        "host_us": round(host * 1e6, 1),
        "share_of_matmul_rate": round(flops / seconds / 1e12 / layer.matmul_tflop_per_s, 3),
    }
    return found


def _one_layer(
    backend: AttentionBackend, layer: Layer, new: list[int], contexts: list[int], device: torch.device
) -> tuple[float, float]:
    """Seconds of one call on the device; seconds of a plan and one call on the host."""
    spec, dtype = layer.spec, layer.dtype
    batch, blocks = batch_of(new, contexts, PAGE)
    caches = [backend.allocate(spec, blocks, PAGE, dtype, device) for _ in range(_LAYERS)]
    for cache in caches:
        cache.keys.normal_()
        cache.values.normal_()
    tokens = sum(new)
    query = torch.randn(tokens, spec.num_heads, spec.key_dim, dtype=dtype, device=device)
    key = torch.randn(tokens, spec.num_kv_heads, spec.key_dim, dtype=dtype, device=device)
    value = torch.randn(tokens, spec.num_kv_heads, spec.value_dim, dtype=dtype, device=device)
    turns = itertools.cycle(caches)
    plan: Any = None

    def call() -> None:
        backend.attend(spec, next(turns), plan, query, key, value, None)

    host = []
    with torch.inference_mode():
        for _ in range(_REPEATS + 1):  # the first compiles what is compiled
            _wait(device)
            begun = time.perf_counter()
            plan = backend.plan(batch, PAGE, device)
            call()
            host.append(time.perf_counter() - begun)
        return seconds_of(call, device), statistics.median(host[1:])


def seconds_of(call: Callable[[], object], device: torch.device, calls: int = _CALLS, repeats: int = _REPEATS) -> float:
    """Median seconds of one call among many."""
    times = []
    for _ in range(repeats):
        _wait(device)
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        queued = time.perf_counter() - begun
        if device.type != "cuda":
            times.append(queued)
            continue
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _wait(device)
        torch.cuda._sleep(int(2 * queued * 2e9))  # cycles: longer than the host takes to queue the calls
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
