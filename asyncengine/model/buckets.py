"""Token counts for which the model's step is captured, and how a step is padded to one of them. No torch."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np

from asyncengine.step.batch import StepBatch

_MIXED = (32, 64, 128, 192, 256, 384, 512)
"""A device takes longer for more tokens than the host does to launch them, one by one."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """Rising token counts.

    A padded token has id 0 and position 0, belongs to no row, and is written nowhere; what the model computes for it
    is thrown away.

    Attributes:
        sizes: Not empty.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or self.sizes[0] < 1 or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"sizes are {self.sizes!r}; expected rising positive numbers")

    @classmethod
    def upto(cls, largest: int) -> Buckets:
        """1, 2, 4, then multiples of 8 up to 64, of 16 up to 256, of 64 up to 512, then of 256.

        A step of 16 tokens or more computes at most half more than it has, a smaller one at most twice as many.

        Args:
            largest: Tokens of the largest step; the last bucket.
        """
        if largest < 1:
            raise ValueError(f"largest is {largest}; expected at least 1")
        steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 64), *range(512, largest, 256)]
        return cls((*(size for size in steps if size < largest), largest))

    @classmethod
    def mixed(cls, largest: int) -> Buckets:
        """32, 64, 128, 192, 256, 384 and 512: of steps with prompts, which are worth a graph as long as they are small.

        Args:
            largest: Tokens of the largest step; the last bucket, if it is no larger than those.
        """
        return cls((*(size for size in _MIXED if size < largest), *((largest,) if largest <= _MIXED[-1] else ())))

    @classmethod
    def doubling(cls, largest: int) -> Buckets:
        """1, 2, 4 and so on: fewer than of `upto`, for steps that are less common.

        Args:
            largest: Tokens of the largest step; the last bucket.
        """
        return cls((*itertools.takewhile(lambda size: size < largest, (1 << n for n in itertools.count())), largest))

    def coarse(self) -> tuple[int, ...]:
        """A few of the sizes, the largest first: with those of `upto`, a step is padded at most fourfold."""
        chosen = [self.sizes[-1]]
        for size, smaller in itertools.pairwise((*self.sizes[-2::-1], 0)):
            if 4 * smaller < chosen[-1]:
                chosen.append(size)
        return tuple(chosen)

    def of(self, tokens: int) -> int | None:
        """The smallest bucket that holds so many tokens; None where none does, or where there is no token."""
        at = bisect.bisect_left(self.sizes, tokens)
        return self.sizes[at] if tokens > 0 and at < len(self.sizes) else None


def padded(batch: StepBatch, tokens: int) -> StepBatch:
    """The step with `tokens` tokens; rows and samples are those of `batch`."""
    missing = tokens - len(batch.token_ids)
    if missing < 0:
        raise ValueError(f"a step of {len(batch.token_ids)} tokens does not fit into {tokens}")
    if not missing:
        return batch
    zeros = np.zeros(missing, np.int32)
    return dataclasses.replace(
        batch,
        token_ids=np.concatenate((batch.token_ids, zeros)),
        positions=np.concatenate((batch.positions, zeros)),
        slot_mapping=np.concatenate((batch.slot_mapping, np.full(missing, -1, np.int64))),
    )


def padding(tokens: int) -> StepBatch:
    """A step of padding alone."""
    empty = np.zeros(0, np.int64)
    return StepBatch(
        token_ids=np.zeros(tokens, np.int32),
        positions=np.zeros(tokens, np.int32),
        query_start=np.zeros(1, np.int32),
        context_lens=np.zeros(0, np.int32),
        block_tables=np.zeros((0, 1), np.int32),
        slot_mapping=np.full(tokens, -1, np.int64),
        sample_index=empty,
        sample_slots=empty,
        sample_positions=empty,
        copies=empty.reshape(0, 2),
        num_decodes=0,
    )
