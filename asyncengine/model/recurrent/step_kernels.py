"""Launches of the kernels of a step in which each sequence has one token. Owned by the step thread.

How many programs there are follows from shapes alone, and nothing waits for the device: all of it can be captured.
Sizes of tiles are values: tune them here. Compiled for sm_90 by `python -m benchmarks.fused_compile`, no kernel spills
registers. None has been run on a device yet.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from typing import Any

import torch

from asyncengine.model.launching import OPTIONS, power_of_two
from asyncengine.model.recurrent.places import Places

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels can read and write."""
MOST_TAPS = 16
"""Tokens that a convolution sees, or keeps, at most."""
MOST_NUMBERS = 512
"""Of a state that are reduced at once, and so lie in one program, at most."""
TOKENS_EACH = 512
"""That are kept by a convolution, of all channels that one program computes: four of a thread."""
CONVOLUTION_OPTIONS: dict[str, Any] = OPTIONS | {"num_warps": 4}
"""How its kernel is made."""

_NUMBERS_EACH = 4096
"""Of a state that one program changes, if it has no more than that to reduce at once: 16 KiB in float32, 32 numbers of
a thread. A single sequence of Qwen3-Next (32 heads of 128 x 128) has 128 programs then, about as many as there are
multiprocessors, and each has asked for all that it needs before it waits for any of it."""


class Unavailable(Exception):
    """There are no kernels; the message says why."""


def columns_of(key_dim: int, value_dim: int) -> int:
    """How many columns of a head's state one program of the delta rule takes: of 16 bytes at least."""
    return min(power_of_two(value_dim), max(_NUMBERS_EACH // power_of_two(key_dim), 8))


def rows_of(dim: int, state_dim: int) -> int:
    """How many rows of a head's state one program of the selective scan takes."""
    return min(power_of_two(dim), max(_NUMBERS_EACH // power_of_two(state_dim), 8))


def options_of(numbers: int) -> dict[str, Any]:
    """How the compiler is to make a kernel whose programs have so many numbers: with 32 of them in a thread."""
    return OPTIONS | {"num_warps": min(max(numbers // 1024, 1), 8)}


def delta_rule_constants(
    heads: tuple[int, int], dims: tuple[int, int], by_channel: bool, normalise: bool
) -> dict[str, Any]:
    """What the kernel `delta_rule` is compiled for: heads and their sizes, of keys and of values."""
    (key_heads, value_heads), (key_dim, value_dim) = heads, dims
    return {
        "HEADS": value_heads,
        "SHARED": value_heads // key_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_PAD": power_of_two(key_dim),
        "VALUES": columns_of(key_dim, value_dim),
        "BY_CHANNEL": by_channel,
        "NORMALISE": normalise,
    }


def delta_rule_options(constants: dict[str, Any]) -> dict[str, Any]:
    """How it is made."""
    return options_of(constants["KEY_PAD"] * constants["VALUES"])


def selective_scan_constants(
    heads: int, groups: int, dims: tuple[int, int], by_head: bool, softplus: bool
) -> dict[str, Any]:
    """What the kernel `selective_scan` is compiled for: sizes are those of a head, and of what it keeps of each."""
    dim, state_dim = dims
    return {
        "HEADS": heads,
        "SHARED": heads // groups,
        "DIM": dim,
        "STATE_DIM": state_dim,
        "EACH": rows_of(dim, state_dim),
        "STATE_PAD": power_of_two(state_dim),
        "BY_HEAD": by_head,
        "SOFTPLUS": softplus,
    }


def selective_scan_options(constants: dict[str, Any]) -> dict[str, Any]:
    """How it is made."""
    return options_of(constants["EACH"] * constants["STATE_PAD"])


def convolution_constants(channels: int, taps: int, kept: int, silu: bool) -> dict[str, Any]:
    """What the kernel `convolution` is compiled for."""
    return {
        "CHANNELS": channels,
        "TAPS": taps,
        "KEPT": kept,
        "KEPT_PAD": power_of_two(kept),
        "EACH": min(TOKENS_EACH // power_of_two(kept), power_of_two(channels)),
        "SILU": silu,
    }


class StepKernels:
    """The kernels. States are those of all sequences, (places, ...), each place contiguous; P is the number of rows.

    Raises:
        Unavailable: Triton is not there, or does not work.
    """

    def __init__(self) -> None:
        try:
            self._kernels: Any = importlib.import_module("asyncengine.model.recurrent.kernels")
        except Exception as error:  # whatever a package that does not fit the system raises when it is imported
            raise Unavailable(f"triton cannot be imported: {error}") from error

    def delta_rule(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
        places: Places,
        *,
        normalise: bool,
    ) -> torch.Tensor:
        """The gated delta rule (Yang et al., 2024), or with a decay for each key channel Kimi Delta Attention.

        Args:
            query: (P, key heads, key dim), and `key`.
            key: Each of its heads serves as many consecutive heads of the values as there are to one.
            value: (P, heads, value dim).
            decay: (P, heads), or (P, heads, key dim): its logarithm.
            beta: (P, heads).
            state: (places, heads, key dim, value dim); changed in place.
            places: Of the rows.
            normalise: Whether queries and keys are given a length of 1.

        Returns:
            (P, heads, value dim) in the dtype of the queries.
        """
        rows, key_heads, key_dim = key.shape
        heads, value_dim = value.shape[1:]
        constants = delta_rule_constants((key_heads, heads), (key_dim, value_dim), decay.dim() == 3, normalise)
        output = query.new_empty(value.shape)
        query, key, value, decay, beta = (_rows(each) for each in (query, key, value, decay, beta))
        with _on(state):
            self._kernels.delta_rule[(-(-value_dim // constants["VALUES"]), heads, rows)](
                query, key, value, decay, beta, state, output, places.sources, places.targets,
                query.stride(0), key.stride(0), value.stride(0), decay.stride(0), beta.stride(0), state.stride(0),
                places.nowhere, 1 / math.sqrt(key_dim), **constants, **delta_rule_options(constants),
            )  # fmt: skip
        return output

    def selective_scan(
        self,
        given: torch.Tensor,
        step: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        state: torch.Tensor,
        output: torch.Tensor,
        places: Places,
        *,
        skip: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        softplus: bool = False,
    ) -> None:
        """The selective scan of Mamba (Gu & Dao, 2023), or with one step for each head that of Mamba-2.

        Args:
            given: (P, heads, dim).
            step: The same, or (P, heads): the time that passes with the token.
            a: (heads, dim, state dim), or (heads).
            b: (P, groups, state dim), and `c`: each group serves as many consecutive heads as there are to one.
            c: What is read.
            state: (places, heads, dim, state dim); changed in place.
            output: As `given`, contiguous; written to.
            places: Of the rows.
            skip: (heads, dim), or (heads): times the input, it is added to the output.
            bias: The same, of the step.
            gate: As `given`: its SiLU times the output is the output.
            softplus: Whether the step's softplus is what counts.
        """
        rows, heads, dim = given.shape
        by_head = step.dim() == 2
        constants = selective_scan_constants(heads, b.shape[1], (dim, b.shape[2]), by_head, softplus)
        given, step, b, c = (_rows(each) for each in (given, step, b, c))
        gate = None if gate is None else _rows(gate)
        a = a.contiguous()
        skip, bias = (None if each is None else each.contiguous() for each in (skip, bias))
        with _on(state):
            self._kernels.selective_scan[(-(-dim // constants["EACH"]), heads, rows)](
                given, step, a, b, c, state, output, skip, bias, gate, places.sources, places.targets,
                given.stride(0), step.stride(0), b.stride(0), c.stride(0), 0 if gate is None else gate.stride(0),
                state.stride(0), places.nowhere, **constants, **selective_scan_options(constants),
            )  # fmt: skip

    def convolution(
        self,
        given: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        places: Places,
        *,
        silu: bool,
    ) -> torch.Tensor:
        """Each channel's convolution over a token and those before.

        Args:
            given: (P, channels).
            weight: (channels, taps).
            bias: (channels).
            state: (places, channels, kept): the last tokens, one less than there are taps at least. The token is put
                behind them in place.
            places: Of the rows.
            silu: Whether the output's SiLU is the output.

        Returns:
            As `given`, contiguous.
        """
        rows, channels = given.shape
        constants = convolution_constants(channels, weight.shape[1], state.shape[2], silu)
        output = given.new_empty((rows, channels))
        given, weight = _rows(given), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        with _on(state):
            self._kernels.convolution[(-(-channels // constants["EACH"]), rows)](
                given, weight, bias, state, output, places.sources, places.targets, given.stride(0), state.stride(0),
                places.nowhere, **constants, **CONVOLUTION_OPTIONS,
            )  # fmt: skip
        return output


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """What rows of it are dense of: itself, where they are."""
    return tensor if tensor[0].is_contiguous() else tensor.contiguous()


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to its device."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
