"""How products with weights of four bits are cut. Values alone: tune them here.

Compiled for sm_90 by `python -m benchmarks.fused_compile`, none of them spills registers. None has been timed on a
device yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncengine.model.launching import power_of_two

_MULTIPROCESSORS = 132
_MANY_WARPS = 12 * _MULTIPROCESSORS
"""Warps of a launch from which on a device has enough to do: three for each scheduler."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What one program of `by_row` takes; of a gate and an up projection, twice the outputs.

    Attributes:
        outputs: A power of two.
        units: How many times 32 inputs at a time; a power of two.
        warps: Warps of a program, between which the inputs are divided.
        stages: Depth of the pipeline that loads through shared memory.
    """

    outputs: int
    units: int
    warps: int = 1
    stages: int = 3


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of `by_tile` takes; of a gate and an up projection, twice the outputs.

    Attributes:
        outputs: A power of two.
        inputs: How many of a split at a time; a power of two.
        tokens: A power of two.
        splits: Parts of the inputs that are added apart, each by a warp; 1 is for the larger matrix units.
        warps: Warps of a program.
        stages: Depth of the pipeline that loads through shared memory.
    """

    outputs: int
    inputs: int
    tokens: int
    splits: int = 4
    warps: int = 4
    stages: int = 3


def rows_for(inputs: int, outputs: int, gated: bool) -> Rows:
    """How a product of one token is cut.

    A warp reads 512 bytes of a row at a time. The more rows it reads side by side, the less often it needs the inputs.

    Args:
        inputs: Of a matrix.
        outputs: Of all experts of a token together.
        gated: Whether a program reads two matrices side by side.
    """
    each, units = 4 if gated else 8, inputs // 32
    warps = next((n for n in (4, 2) if units % (32 * n) == 0 and n * outputs < 2 * each * _MANY_WARPS), 1)
    return Rows(each, min(32 * warps, power_of_two(units)), warps)


def tile_for(tokens: float, outputs: int, itemsize: int, gated: bool) -> Tile:
    """How a product of several tokens is cut. Its tokens depend on `tokens` and `itemsize` alone.

    Args:
        tokens: How many a matrix is multiplied with, on average.
        outputs: Of all matrices together.
        itemsize: Bytes of an input.
        gated: Whether a program reads two matrices side by side.
    """
    if itemsize == 4:
        return Tile(16, 16, 8, stages=2)
    if tokens <= 4:
        return Tile(16, 128, 8)
    if tokens <= 16:
        return Tile(16, 128, 16)
    if tokens <= 48:
        return Tile(16 if gated else 32, 64, 32, stages=4)
    height = 64 if tokens <= 160 else 128
    many = outputs * max(tokens / height, 1.0) >= 128 * _MULTIPROCESSORS
    return Tile(128, 64, height, splits=1, warps=8) if many else Tile(64, 64, height, splits=1, warps=4)
