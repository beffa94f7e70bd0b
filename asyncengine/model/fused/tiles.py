"""How the products of a step of few tokens are cut. Values alone: tune them here.

Compiled for sm_90 by `python -m benchmarks.fused_compile`, none of them spills registers. None has been timed on a
device yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncengine.model.launching import power_of_two

MOST_TOKENS = 8
"""Tokens of the largest step whose products are kernels of ours: so wide is their narrow side in matrix units."""

SOME_TOKENS = 512
"""Tokens of the largest step for which it is decided at once, with all above `MOST_TOKENS`, how it is run."""

HEADS_EACH = 4
"""Heads that one program norms and rotates; a power of two."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program takes of a product.

    Attributes:
        outputs: Rows of a matrix; a power of two.
        inputs: How many of their inputs at a time; a power of two.
        warps: Warps of a program.
        stages: Depth of the pipeline that loads through shared memory; 1 is none.
    """

    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 1


def tile_for(tokens: int, inputs: int, outputs: int, itemsize: int, gated: bool) -> Tile:
    """How a product is cut.

    Args:
        tokens: 1, or more.
        inputs: Of the product.
        outputs: Of all its matrices together.
        itemsize: Bytes of a weight.
        gated: Whether a program reads two matrices side by side.
    """
    if tokens == 1:
        # A thread loads 16 bytes of each row at a time. Few outputs are cut finer, so that all multiprocessors read.
        # Through shared memory, because the assembler saves registers by loading one row after the other.
        each = 4 if gated or outputs < 8192 else 8
        return Tile(each, min(2048 // itemsize, power_of_two(inputs)), stages=3)
    if itemsize == 4:
        return Tile(16, min(32, power_of_two(inputs)), stages=4)
    return Tile(16 if outputs < 8192 else 32, min(128 if gated else 256, max(16, power_of_two(inputs))), stages=3)
