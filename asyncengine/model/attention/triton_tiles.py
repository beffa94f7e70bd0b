"""Tile sizes of the Triton attention kernel, by size of a number and of a head. Values alone: tune them here.

Compiled for sm_90 by `python -m benchmarks.attention_compile`, none of them spills registers. None has been timed on a
device yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kind of work is launched.

    Attributes:
        rows: Rows of a tile: pairs of a query token and one of the query heads that share a KV head. A power of two.
        warps: Warps of a program.
        stages: Depth of the software pipeline that loads keys and values.
        registers: Most registers of a thread. Without it the assembler may spill some to fit more programs; with it,
            it may use so many that it spills some. What is written here spills none.
    """

    rows: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one layer is cut.

    Attributes:
        keys: Keys that are multiplied at a time. A power of two.
        split: Keys of a split, a multiple of `keys`. Every split is reduced by itself, then the splits in order, so
            this number and `keys` fix the order in which a sequence is reduced, whatever else is in the batch.
        short: For rows whose query tokens fit into one of its tiles: decodes, mostly.
        long: For all other rows.
    """

    keys: int
    split: int
    short: Launch
    long: Launch


TABLE: dict[tuple[int, int], Tiles] = {
    # (bytes of a stored number, padded size of the larger of key and value head); one byte is fp8
    (1, 16): Tiles(64, 256, Launch(16, 4, 3, 248), Launch(64, 4, 3)),
    (1, 32): Tiles(64, 256, Launch(16, 4, 3, 248), Launch(64, 4, 3)),
    (1, 64): Tiles(64, 256, Launch(16, 4, 3, 248), Launch(64, 4, 3)),
    (1, 128): Tiles(64, 256, Launch(16, 4, 3, 248), Launch(64, 8, 3)),
    (1, 256): Tiles(32, 256, Launch(16, 4, 3, 248), Launch(32, 8, 3, 248)),
    (1, 512): Tiles(32, 256, Launch(16, 8, 2), Launch(16, 8, 2)),
    (2, 16): Tiles(64, 256, Launch(16, 4, 3, 248), Launch(64, 4, 3)),
    (2, 32): Tiles(64, 256, Launch(16, 4, 3, 248), Launch(64, 4, 3)),
    (2, 64): Tiles(64, 256, Launch(16, 4, 3, 248), Launch(64, 4, 3)),
    (2, 128): Tiles(64, 256, Launch(16, 4, 3, 248), Launch(64, 8, 3)),
    (2, 256): Tiles(32, 256, Launch(16, 4, 3, 248), Launch(32, 8, 3, 248)),
    (2, 512): Tiles(32, 256, Launch(16, 8, 2), Launch(16, 8, 2)),
    (4, 16): Tiles(32, 256, Launch(16, 4, 2, 248), Launch(32, 4, 2)),
    (4, 32): Tiles(32, 256, Launch(16, 4, 2, 248), Launch(32, 4, 2)),
    (4, 64): Tiles(32, 256, Launch(16, 4, 2), Launch(32, 4, 2)),
    (4, 128): Tiles(32, 256, Launch(16, 4, 2), Launch(32, 8, 2)),
    (4, 256): Tiles(32, 256, Launch(16, 8, 2, 248), Launch(16, 8, 2, 248)),
    (4, 512): Tiles(16, 256, Launch(16, 8, 1), Launch(16, 8, 1)),
}
EXACT: dict[tuple[int, int, int], Tiles] = {
    # (bytes of a number, size of a key head, of a value head): sizes that need no masks, so fewer registers
    (1, 64, 64): Tiles(128, 256, Launch(16, 4, 3, 248), Launch(128, 8, 3)),
    (1, 128, 128): Tiles(64, 256, Launch(16, 4, 3, 248), Launch(128, 8, 3)),
    (1, 256, 256): Tiles(64, 256, Launch(16, 8, 3), Launch(64, 8, 3)),
    (2, 64, 64): Tiles(128, 256, Launch(16, 4, 3, 248), Launch(128, 8, 3)),
    (2, 128, 128): Tiles(64, 256, Launch(16, 4, 3, 248), Launch(128, 8, 3)),
    (2, 256, 256): Tiles(32, 256, Launch(16, 4, 3, 248), Launch(64, 8, 3)),
    (4, 256, 256): Tiles(32, 256, Launch(16, 8, 2), Launch(16, 8, 2)),
}
IN_KEYS: dict[tuple[int, int], Tiles] = {
    # As TABLE, of layers whose values are the beginning of their keys: the larger of that and of the rest. There are
    # many query heads on the one KV head, so tiles have more rows.
    (1, 256): Tiles(32, 256, Launch(16, 8, 3), Launch(32, 8, 3)),
    (1, 512): Tiles(32, 256, Launch(16, 8, 3), Launch(16, 8, 3)),
    (2, 256): Tiles(32, 256, Launch(32, 8, 3), Launch(32, 8, 3)),
    (2, 512): Tiles(32, 256, Launch(32, 8, 3), Launch(32, 8, 3)),
    (4, 64): Tiles(32, 256, Launch(16, 4, 3), Launch(32, 4, 3)),
    (4, 128): Tiles(32, 256, Launch(16, 8, 3), Launch(32, 8, 3)),
    (4, 256): Tiles(16, 256, Launch(16, 8, 3), Launch(16, 8, 3)),
    (4, 512): Tiles(16, 256, Launch(16, 8, 3), Launch(16, 8, 3)),
}


def padded(size: int) -> int:
    """The size of a head in registers: a power of two, and at least 16, which matrix units need."""
    return max(16, 1 << (size - 1).bit_length())


def tiles_for(
    itemsize: int, key_dim: int, value_dim: int, values_in_keys: bool = False, biased: bool = False
) -> Tiles | None:
    """How a layer is cut, or None where its heads are too large for the kernel.

    Args:
        itemsize: Bytes of a stored number.
        key_dim: Size of a key head.
        value_dim: Of a value head.
        values_in_keys: Whether that is the beginning of the key, which is then multiplied in two parts.
        biased: Whether scores get a bias, which is fetched ahead as keys are: the largest tiles leave no room for it.
    """
    if values_in_keys:
        size = itemsize, padded(max(key_dim - value_dim, value_dim))
        return IN_KEYS.get(size) or TABLE.get(size)
    exact = None if biased else EXACT.get((itemsize, key_dim, value_dim))
    return exact or TABLE.get((itemsize, padded(max(key_dim, value_dim))))
