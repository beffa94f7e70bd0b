"""Reference counts of KV cache blocks. Owned by the step thread.

A block is in exactly one of three states, and their numbers always add up (`check`):

* free: nobody holds it;
* cached: only the prefix tree holds it, so it can be taken back at once;
* used: a sequence or a pin holds it, perhaps beside the prefix tree.
"""

from __future__ import annotations

import numpy as np

from asyncengine.step.batch import Int32, Int64


class BlockPool:
    """Hands out blocks 0 .. num_blocks - 1 and counts who holds them."""

    __slots__ = ("_adopted", "_adoptions", "_free", "_in_tree", "_refs", "num_blocks", "num_cached", "num_free")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_cached = 0
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # a stack: the first num_free entries
        self._refs = np.zeros(num_blocks, dtype=np.int32)
        self._in_tree = np.zeros(num_blocks, dtype=np.bool_)
        self._adopted = np.zeros(num_blocks, dtype=np.int64)
        self._adoptions = 0

    @property
    def num_used(self) -> int:
        """Blocks that neither are free nor can be taken back."""
        return self.num_blocks - self.num_free - self.num_cached

    def allocate(self, count: int) -> Int32:
        """Takes `count` free blocks, each held once. The caller has made sure that they are there."""
        assert count <= self.num_free
        self.num_free -= count
        blocks = self._free[self.num_free : self.num_free + count].copy()
        self._refs[blocks] = 1
        return blocks

    def retain(self, blocks: Int32) -> None:
        """Holds each of the blocks, all different, once more."""
        if not len(blocks):
            return
        only_tree = self._in_tree[blocks] & (self._refs[blocks] == 1)
        self.num_cached -= int(np.count_nonzero(only_tree))
        self._refs[blocks] += 1

    def release(self, blocks: Int32) -> None:
        """Lets go of each of the blocks, all different, once."""
        refs = self._refs[blocks] - 1
        self._refs[blocks] = refs
        self.num_cached += int(np.count_nonzero(self._in_tree[blocks] & (refs == 1)))
        freed = blocks[refs == 0]
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)

    def adopt(self, blocks: Int32) -> None:
        """Lets the prefix tree hold blocks that a sequence holds."""
        self._in_tree[blocks] = True
        self._adoptions += 1
        self._adopted[blocks] = self._adoptions
        self._refs[blocks] += 1

    def abandon(self, blocks: Int32) -> None:
        """Undoes `adopt`; blocks that nobody else holds become free."""
        self.num_cached -= int(np.count_nonzero(self._refs[blocks] == 1))
        self._in_tree[blocks] = False
        self._adopted[blocks] = 0
        self.release(blocks)

    def adopted(self, blocks: Int32) -> Int64:
        """(blocks,) when the tree has come to hold each, counted in calls of `adopt`; 0 if it does not.

        As long as that is the same, a block has the same tokens.
        """
        return self._adopted[blocks]

    def only_in_tree(self, blocks: Int32) -> int:
        """How many blocks at the end of `blocks`, in a row, only the tree holds."""
        held = np.flatnonzero(self._refs[blocks] > 1)
        return len(blocks) - (int(held[-1]) + 1 if len(held) else 0)

    def check(self) -> None:
        """Counts everything anew.

        Raises:
            AssertionError: Free, cached and used do not add up, or a count is wrong.
        """
        refs, in_tree = self._refs, self._in_tree
        assert (refs >= in_tree).all(), "a block in the tree is not held by it"
        free = int(np.count_nonzero(refs == 0))
        cached = int(np.count_nonzero(in_tree & (refs == 1)))
        assert free == self.num_free, f"{free} blocks are free, {self.num_free} counted"
        assert cached == self.num_cached, f"{cached} blocks are cached, {self.num_cached} counted"
        assert np.array_equal(np.sort(self._free[:free]), np.flatnonzero(refs == 0)), "the free list is wrong"
