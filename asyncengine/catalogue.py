"""`Catalogue`: what of a prefix cache is kept, and the pieces in which it comes and goes. Immutable values.

Saving: an `Inventory`, then piece by piece what is still there. Loading: a `KeptPrefixes` and a `Taken` for each piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncengine.step.batch import Int32, Int64

PIECE_BYTES = 32 << 20
"""Of keys and values, at a time: as many are copied between two steps."""


@dataclass(frozen=True, slots=True, eq=False)
class Catalogue:
    """Whole blocks of computed prompts. Those of which one follows another come after it, and what was used last first.

    Attributes:
        tokens: (blocks, page size) int32: their tokens.
        before: (blocks,) int32: which block each follows; -1 for the first of a prompt.
        parts: By name, how many bytes each part of the KV cache has for a block; so they lie in its row.
    """

    tokens: Int32
    before: Int32
    parts: Mapping[str, int]

    def pieces(self) -> Iterator[slice]:
        """Blocks that are copied at a time; at least one piece, be it empty."""
        most = max(PIECE_BYTES // max(sum(self.parts.values()), 1), 1)
        count = len(self.before)
        for start in range(0, max(count, 1), most):
            yield slice(start, min(start + most, count))


@dataclass(frozen=True, slots=True, eq=False)
class Inventory:
    """A catalogue of what a prefix cache has, and where.

    Attributes:
        catalogue: It.
        blocks: (blocks,) int32: where each lies.
        adopted: (blocks,) int64: as `asyncengine.step.block_pool.BlockPool.adopted` says; so it is known later whether
            it still lies there.
    """

    catalogue: Catalogue
    blocks: Int32
    adopted: Int64


@dataclass(frozen=True, slots=True, eq=False)
class KeptPrefixes:
    """A piece of what was kept.

    Attributes:
        catalogue: Of all.
        start: The first block of the piece.
        rows: (blocks, bytes) uint8: what the KV cache has for each block of the piece.
    """

    catalogue: Catalogue
    start: int
    rows: NDArray[np.uint8]


class Taken(NamedTuple):
    """What has become of a piece.

    Attributes:
        tokens: How many were not known before and are now.
        room: Whether there is room for more.
    """

    tokens: int
    room: bool
