"""Products with weights of four bits on a device: launches of `four_bit_kernels`. Importing this needs no triton.

How much is launched depends on shapes alone, and nothing waits for the device: all of it can be captured.

What is multiplied is what `FourBits.weight` gives, in float32 for a token that is multiplied by itself. Else weights
are in the dtype of the inputs, to which scales and zeros are rounded before: that is exact where it holds them, as it
does powers of two and small integers, and else adds an error as large as that of rounding the weights. Sums are in
float32. Their order depends on the shape of the weights and on the kind of tile: a token by itself, up to 16, up to 48
and more tokens of a matrix differ in that.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from asyncengine.model.launching import OPTIONS, power_of_two
from asyncengine.model.quantised.four_bit_tiles import Rows, Tile, rows_for, tile_for
from asyncengine.model.quantised.four_bits import FP4, INT4, NONLINEAR, FourBits

ALIGNMENT = 32
"""Inputs must be a multiple of it, and those that share a scale of half of it."""
TABLES = (INT4, FP4, NONLINEAR)
"""What codes may stand for; only the first may have zeros."""
ITEM = 3
"""Numbers of an item of work: an expert, where its pairs begin in the order, and how many they are."""
_NUMBERS_EACH = 1024
_PAIRS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Gate:
    """What experts do between their two products.

    Attributes:
        activation: Of the gate, by `blueprint.ACTIVATIONS`, or `experts.CLAMPED`.
        alternating: Whether a gate's and an up projection's outputs alternate; else they follow each other.
        alpha: Of the clamped activation.
        limit: Of the clamped activation.
    """

    activation: int = 0
    alternating: bool = False
    alpha: float = 0.0
    limit: float = 0.0


@dataclass(frozen=True, slots=True)
class Matrices:
    """What the kernels are compiled for, apart from how it is cut.

    Attributes:
        inputs: Of every matrix.
        rows: Of every matrix.
        group: Inputs that share a scale.
        table: What codes stand for, as the number of one of `TABLES`.
        zeros: Whether there are zeros.
        bias: Whether there is a bias.
        experts: How many matrices there are; 0 is one that is no expert's.
        shared: How many pairs in a row have the same row of the input.
        gate: What makes one output of two rows, if something does.
    """

    inputs: int
    rows: int
    group: int
    table: int = 0
    zeros: bool = False
    bias: bool = False
    experts: int = 0
    shared: int = 1
    gate: Gate | None = None

    @classmethod
    def of(cls, weights: FourBits, bias: torch.Tensor | None, experts: int = 0, **others: Any) -> Matrices:
        """Those that are given.

        Raises:
            ValueError: There is no kernel for them.
        """
        rows, inputs = weights.shape
        zeros = weights.zeros is not None
        if inputs % ALIGNMENT or weights.group % (ALIGNMENT // 2):
            raise ValueError(f"there is no kernel for {inputs} inputs in groups of {weights.group}")
        if weights.values not in TABLES or (zeros and weights.values != INT4):
            raise ValueError("codes of four bits must be integers, or FP4 or NONLINEAR without zeros")
        parts = (weights.codes, weights.scales, weights.zeros, bias)
        if not all(part is None or part.is_contiguous() for part in parts):
            raise ValueError("weights of four bits must be contiguous")
        table, has_bias = TABLES.index(weights.values), bias is not None
        return cls(inputs, rows // max(experts, 1), weights.group, table, zeros, has_bias, experts, **others)

    @property
    def outputs(self) -> int:
        """How many results a row of the input has."""
        return self.rows if self.gate is None else self.rows // 2

    def constants(self, shares: bool) -> dict[str, Any]:
        """Of both kernels.

        Args:
            shares: Whether results are multiplied by shares.
        """
        gate = self.gate or Gate()
        step = 2 if gate.alternating else 1
        return {
            "INPUTS": self.inputs,
            "OUTPUTS": self.outputs,
            "ROWS": self.rows,
            "STEP": step,
            "OTHER": 0 if self.gate is None else 1 if gate.alternating else self.outputs,
            "GROUP": self.group,
            "TABLE": self.table,
            "HAS_ZEROS": self.zeros,
            "HAS_BIAS": self.bias,
            "EXPERTS": self.experts,
            "SHARED": self.shared,
            "HAS_SHARES": shares,
            "ACTIVATION": gate.activation,
            "ALPHA": gate.alpha,
            "LIMIT": gate.limit,
        }

    def of_rows(self, rows: Rows, shares: bool) -> dict[str, Any]:
        """Constants of `by_row`."""
        cut = {"OUTPUTS_EACH": rows.outputs, "UNITS": rows.units, "STAGES": rows.stages}
        return self.constants(shares) | cut

    def of_tile(self, tile: Tile, shares: bool, dtype: torch.dtype, widen: bool = False) -> dict[str, Any]:
        """Constants of `by_tile`."""
        return self.constants(shares) | {
            "UNIT": min(self.group & -self.group, tile.inputs),
            "OUTPUTS_EACH": tile.outputs,
            "TOKENS": tile.tokens,
            "SPLITS": tile.splits,
            "INPUTS_AT_ONCE": tile.inputs,
            "STAGES": tile.stages,
            # Without tf32, whose 10 bits of mantissa are not what float32 was asked for.
            "PRECISION": "ieee" if dtype is torch.float32 else None,
            "WIDEN": widen,
        }


@dataclass(frozen=True, slots=True)
class _Product:
    """A product whose shape is known."""

    matrices: Matrices
    weights: FourBits
    bias: torch.Tensor | None
    shares: torch.Tensor | None = None

    def by_row(self, x: torch.Tensor, result: torch.Tensor, chosen: torch.Tensor | None = None) -> None:
        """Writes (pairs, outputs) of (pairs / shared, inputs); cut as for one token, however many there are."""
        matrices, pairs = self.matrices, result.shape[0]
        top = 1 if chosen is None else chosen.shape[1]
        rows = rows_for(matrices.inputs, matrices.outputs * top, matrices.gate is not None)
        _kernels().by_row[(-(-matrices.outputs // rows.outputs), pairs)](
            x, self.weights.codes, self.weights.scales, self.weights.zeros, self.bias, chosen, self.shares, result,
            **matrices.of_rows(rows, self.shares is not None), **launch_options(rows),
        )  # fmt: skip

    def tile(self, tokens: float, dtype: torch.dtype) -> Tile:
        """How it is cut for so many tokens of a matrix."""
        matrices = self.matrices
        outputs = matrices.outputs * max(matrices.experts, 1)
        return tile_for(tokens, outputs, dtype.itemsize, matrices.gate is not None)

    def by_tile(self, x: torch.Tensor, result: torch.Tensor, tile: Tile, work: _Work | None = None) -> None:
        """Writes (pairs, outputs) of (pairs / shared, inputs)."""
        matrices, pairs = self.matrices, result.shape[0]
        items, order = (None, None) if work is None else (work.items, work.order)
        count = -(-pairs // tile.tokens) if work is None else work.items.shape[0]
        widen = x.dtype is torch.bfloat16 and x.device.type == "cpu"
        _kernels().by_tile[(-(-matrices.outputs // tile.outputs), count)](
            x, self.weights.codes, self.weights.scales, self.weights.zeros, self.bias, items, order, self.shares,
            result, pairs, **matrices.of_tile(tile, self.shares is not None, x.dtype, widen), **launch_options(tile),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Work:
    """Which pairs an expert has.

    Attributes:
        items: (most, 3) int32: experts, where their pairs begin in the order, and how many of them there are.
        order: (pairs,) int32.
    """

    items: torch.Tensor
    order: torch.Tensor

    @classmethod
    def of(cls, chosen: torch.Tensor, experts: int, tokens: int) -> _Work:
        """Sorts the pairs of (tokens, top) by their expert, into items of up to `tokens`."""
        pairs = chosen.numel()
        some = min(pairs, experts)
        most = some + (pairs - some) // tokens  # each that has any wastes all but one of an item
        order = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
        items = torch.empty(most, ITEM, dtype=torch.int32, device=chosen.device)
        constants = routing_constants(experts, tokens)
        _kernels().route[(experts,)](chosen, order, items, pairs, most, **constants, **OPTIONS)
        return cls(items, order)


def has_kernel(weights: FourBits) -> bool:
    """Whether weights can be multiplied here: there is a kernel for them, and triton."""
    try:
        Matrices.of(weights, None)
    except ValueError:
        return False
    return importlib.util.find_spec("triton") is not None


def routing_constants(experts: int, tokens: int) -> dict[str, int]:
    """Of `route`."""
    return {"EXPERTS": experts, "BINS": power_of_two(experts + 1), "TOKENS": tokens, "BLOCK": _PAIRS_AT_ONCE}


def launch_options(cut: Rows | Tile) -> dict[str, Any]:
    """How the compiler is to make `by_row` or `by_tile`."""
    return OPTIONS | {"num_warps": cut.warps, "num_stages": cut.stages}


def multiply(x: torch.Tensor, weights: FourBits, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(tokens, inputs) to (tokens, outputs), in one launch.

    Args:
        x: In bfloat16, float16 or float32.
        weights: Of one matrix.
        bias: (outputs,).

    Raises:
        ValueError: There is no kernel for such weights.
    """
    product = _Product(Matrices.of(weights, bias), weights, bias)
    tokens = x.shape[0]
    result = x.new_empty(tokens, weights.shape[0])
    if tokens:
        with _on(x):
            if tokens == 1:
                product.by_row(_readable(x), result)
            else:
                product.by_tile(_readable(x), result, product.tile(tokens, x.dtype))
    return result


def multiply_experts(
    x: torch.Tensor,
    gate_up: FourBits,
    down: FourBits,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    gate: Gate,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum, for each token, of what its experts make of it, each times its share.

    Few pairs of a token and an expert are multiplied each by itself, in three launches. More are sorted by expert, so
    that an expert's weights are read once for all that is sent to it, in four.

    Args:
        x: (tokens, hidden) in bfloat16, float16 or float32.
        gate_up: Of all experts one after the other, (experts * 2 * inner, hidden).
        down: The same, (experts * hidden, inner).
        chosen: (tokens, top) experts, as integers; one that does not exist adds nothing.
        shares: (tokens, top).
        gate: What is between.
        gate_up_bias: (experts, 2 * inner).
        down_bias: (experts, hidden).

    Returns:
        (tokens, hidden).

    Raises:
        ValueError: There is no kernel for such weights.
    """
    (tokens, hidden), top = x.shape, chosen.shape[1]
    experts, pairs = down.shape[0] // hidden, tokens * top
    result = x.new_empty(tokens, hidden)
    if not pairs:
        return result.zero_()
    x, chosen, shares = _readable(x), chosen.contiguous(), shares.contiguous()
    first = _Product(Matrices.of(gate_up, gate_up_bias, experts, shared=top, gate=gate), gate_up, gate_up_bias)
    second = _Product(Matrices.of(down, down_bias, experts), down, down_bias, shares)
    inner = x.new_empty(pairs, first.matrices.outputs)
    with _on(x):
        if tokens == 1 or 2 * pairs <= experts:
            parts = torch.empty(pairs, hidden, dtype=torch.float32, device=x.device)
            first.by_row(x, inner, chosen)
            second.by_row(inner, parts, chosen)
        else:
            parts = x.new_empty(pairs, hidden)
            tiles = [product.tile(pairs / experts, x.dtype) for product in (first, second)]
            work = _Work.of(chosen, experts, tiles[0].tokens)  # which is that of both
            first.by_tile(x, inner, tiles[0], work)
            second.by_tile(inner, parts, tiles[1], work)
        _kernels().add_up[(tokens, -(-hidden // _NUMBERS_EACH))](
            parts, chosen, result, WIDTH=hidden, TOP=top, EXPERTS=experts, EACH=_NUMBERS_EACH, **OPTIONS
        )
    return result


def _readable(x: torch.Tensor) -> torch.Tensor:
    """Rows one after the other, from an address on from which two numbers can be read at a time."""
    return x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _on(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _kernels() -> Any:
    return importlib.import_module("asyncengine.model.quantised.four_bit_kernels")
