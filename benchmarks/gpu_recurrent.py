"""Kernels for a token of recurrent layers, beside the same in plain torch. A part of `benchmarks.gpu`.

One layer's state of several rows, each at a place of its own among many: for every kernel, its error against the
formula in torch (in float32; the larger one of outputs and states), microseconds on the device, and those of torch,
which gathers the rows' states, computes and writes them back, as it is done without kernels. Every call has other rows,
so that states come from memory; what must be read and written of them, as a share of a copy's bandwidth, tells how well
that goes. Needs no version of transformers in particular. Interpreted, it tells that all this runs, and nothing else.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from asyncengine.model.recurrent.places import Places
from asyncengine.model.recurrent.step_kernels import StepKernels, Unavailable
from benchmarks.gpu_attention import seconds_of

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Largest allowed error. Outputs are rounded to the dtype."""
_TURNS = 4
"""Sets of rows that take turns, at least."""
_PLACES = 64
"""Places that these have together, at least: with states of 2 MiB, more than the device keeps in its cache."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the layers: heads of keys and values with their dimensions, heads of a scan with theirs, channels and taps."""

    delta_heads: tuple[int, int] = (16, 32)
    delta_dims: tuple[int, int] = (128, 128)
    scan_heads: int = 128
    scan_dims: tuple[int, int] = (64, 128)
    channels: int = 8192
    taps: int = 4


SMALL = Sizes((2, 4), (16, 16), 4, (16, 16), 96, 4)
"""For Triton's interpreter."""


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel, and the same in torch.

    Attributes:
        state: Shape of one row's state.
        dtype: Of it.
        kernel: Takes states of all and places; returns (rows, ...) outputs.
        plain: Takes (rows, ...) states; returns outputs and new states.
    """

    state: tuple[int, ...]
    dtype: torch.dtype
    kernel: Callable[[torch.Tensor, Places], torch.Tensor]
    plain: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def reason_against(device: torch.device) -> str | None:
    """Why nothing can be measured here; None if it can."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is neither a device nor Triton's interpreter"
    try:
        StepKernels()
    except Unavailable as error:
        return str(error)
    return None


def delta_rule(rows: int, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """The gated delta rule, of the shape of Qwen3-Next."""
    (key_heads, heads), (key_dim, value_dim) = sizes.delta_heads, sizes.delta_dims
    query, key = torch.randn(2, rows, key_heads, key_dim, device=device).to(dtype)
    value = torch.randn(rows, heads, value_dim, device=device).to(dtype)
    decay, beta = -torch.rand(rows, heads, device=device), torch.rand(rows, heads, device=device).to(dtype)
    kernels = StepKernels()

    def plain(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = (each.float().repeat_interleave(heads // key_heads, 1) for each in (query, key))
        q, k = (each * torch.rsqrt((each * each).sum(-1, keepdim=True) + 1e-6) for each in (q, k))
        state = state * decay.exp()[..., None, None]
        change = (value.float() - (state * k[..., None]).sum(-2)) * beta.float()[..., None]
        state = state + k[..., None] * change[..., None, :]
        return (state * q[..., None]).sum(-2).div(math.sqrt(key_dim)).to(dtype), state

    return Case(
        (heads, key_dim, value_dim),
        torch.float32,
        lambda state, places: kernels.delta_rule(query, key, value, decay, beta, state, places, normalise=True),
        plain,
    )


def scan(rows: int, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """The scan of Mamba-2, of the shape of Granite 4 small."""
    heads, (dim, state_dim) = sizes.scan_heads, sizes.scan_dims
    given = torch.randn(rows, heads, dim, device=device).to(dtype)
    b, c = torch.randn(2, rows, 1, state_dim, device=device).to(dtype)
    time = torch.randn(rows, heads, device=device).to(dtype)
    a = -4 * torch.rand(heads, device=device)
    skip, bias = torch.randn(2, heads, device=device).to(dtype)
    kernels = StepKernels()

    def kernel(state: torch.Tensor, places: Places) -> torch.Tensor:
        output = torch.empty(rows, heads, dim, device=device)
        kernels.selective_scan(given, time, a, b, c, state, output, places, skip=skip, bias=bias, softplus=True)
        return output

    def plain(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        passed = functional.softplus(time.float() + bias.float())
        state = state * (passed * a).exp()[..., None, None]
        state = state + (passed[..., None] * given.float())[..., None] * b.float()[..., None, :]
        return (state * c.float()[..., None, :]).sum(-1) + given.float() * skip.float()[:, None], state

    return Case((heads, dim, state_dim), torch.float32, kernel, plain)


def convolution(rows: int, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """The convolution before either, of the shape of Qwen3-Next."""
    given = torch.randn(rows, sizes.channels, device=device).to(dtype)
    weight = torch.randn(sizes.channels, sizes.taps, device=device).to(dtype)
    kernels = StepKernels()

    def plain(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.cat([state, given[..., None]], dim=-1)[..., -sizes.taps :]
        return functional.silu((seen.float() * weight.float()).sum(-1)).to(dtype), seen

    return Case(
        (sizes.channels, sizes.taps),
        dtype,
        lambda state, places: kernels.convolution(given, weight, None, state, places, silu=True),
        plain,
    )


CASES = {"delta rule": delta_rule, "scan of mamba-2": scan, "convolution": convolution}


def measure(
    batches: tuple[int, ...], dtype: torch.dtype, device: torch.device, copy_gb_per_s: float
) -> dict[str, dict[str, Any]]:
    """Each kernel with each number of rows.

    Returns:
        For each the error and whether it is small enough, microseconds of kernel and torch, and the share of bandwidth.
    """
    sizes = Sizes() if device.type == "cuda" else SMALL
    found: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        for name, rows in itertools.product(CASES, batches):
            torch.manual_seed(0)
            case = CASES[name](rows, sizes, dtype, device)
            found[f"{name}, batch {rows}"] = _measured(case, rows, copy_gb_per_s, device, TOLERANCE[dtype])
    return found


def _measured(case: Case, rows: int, copy_gb_per_s: float, device: torch.device, tolerance: float) -> dict[str, Any]:
    turns = max(_TURNS, -(-_PLACES // rows)) if device.type == "cuda" else 2
    nowhere = turns * rows
    states = torch.randn(nowhere + 1, *case.state, device=device).to(case.dtype)
    order = torch.randperm(nowhere, device=device)
    every = [Places.same(places, nowhere) for places in order.split(rows)]
    error = _error(case, states, every[0])
    of_kernel, of_torch = _in_turn(every), _in_turn(every)

    def by_torch() -> None:
        places = next(of_torch)
        _, new = case.plain(states.index_select(0, places.sources))
        states.index_copy_(0, places.targets, new)

    few = {} if device.type == "cuda" else {"calls": 1, "repeats": 1}
    seconds = seconds_of(lambda: case.kernel(states, next(of_kernel)), device, **few)
    plain_seconds = seconds_of(by_torch, device, **few)
    moved = 2 * rows * states[0].nbytes
    return {
        "error": float(f"{error:.2g}"),
        "ok": error <= tolerance,
        "us": round(seconds * 1e6, 2),
        "torch_us": round(plain_seconds * 1e6, 2),
        "share_of_copy_bandwidth": round(moved / seconds / 1e9 / copy_gb_per_s, 3),
    }


def _error(case: Case, states: torch.Tensor, places: Places) -> float:
    """1, if a state is changed that is none of the rows'."""
    before = states.clone()
    output, new = case.plain(before.index_select(0, places.sources))
    found = case.kernel(states, places)
    expected = before.index_copy(0, places.targets, new)
    others = torch.ones(len(states), dtype=torch.bool, device=states.device).index_fill(0, places.targets, False)
    if not torch.equal(states[others], before[others]):
        return 1.0
    errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in ((found, output), (states, expected))]
    return float(max(errors))


def _in_turn(every: list[Places]) -> Iterator[Places]:
    return itertools.cycle(every)
