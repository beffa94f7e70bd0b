"""Reference counts of blocks, against sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncengine.step.block_pool import BlockPool


def some_of(data: st.DataObject, blocks: set[int]) -> set[int]:
    """Any of them, by one number: a bit for each."""
    bits = data.draw(st.integers(0, 2 ** len(blocks) - 1))
    return {block for place, block in enumerate(sorted(blocks)) if bits >> place & 1}


class PoolMachine(RuleBasedStateMachine):
    """Holders (sequences, pins) and one tree over a pool of twelve blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.holders: list[set[int]] = []
        self.tree: set[int] = set()

    def held(self) -> set[int]:
        return set().union(*self.holders)

    @rule(count=st.integers(0, 12))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free:
            blocks = self.pool.allocate(count)
            assert len(set(blocks.tolist())) == count
            assert not set(blocks.tolist()) & (self.held() | self.tree)
            self.holders.append(set(blocks.tolist()))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(np.array(sorted(self.holders.pop(index)), dtype=np.int32))

    @precondition(lambda self: self.held() | self.tree)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        blocks = some_of(data, self.held() | self.tree)
        self.pool.retain(np.array(sorted(blocks), dtype=np.int32))
        self.holders.append(blocks)

    @precondition(lambda self: self.held() - self.tree)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        blocks = some_of(data, self.held() - self.tree)
        self.pool.adopt(np.array(sorted(blocks), dtype=np.int32))
        self.tree |= blocks

    @precondition(lambda self: self.tree)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        blocks = some_of(data, self.tree)
        self.pool.abandon(np.array(sorted(blocks), dtype=np.int32))
        self.tree -= blocks

    @invariant()
    def counts_are_right(self) -> None:
        self.pool.check()
        held = self.held()
        assert self.pool.num_used == len(held)
        assert self.pool.num_cached == len(self.tree - held)
        assert self.pool.num_free == 12 - len(held | self.tree)


TestPool = PoolMachine.TestCase


def test_first_blocks_are_handed_out_first() -> None:
    assert BlockPool(8).allocate(3).tolist() != []
    assert sorted(BlockPool(3).allocate(3).tolist()) == [0, 1, 2]


def test_more_than_there_is_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        BlockPool(3).allocate(4)


def test_only_the_end_in_a_row_can_be_taken_back() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    pool.adopt(blocks)
    pool.release(blocks[[0, 2, 3]])
    assert pool.only_in_tree(blocks) == 2
    pool.release(blocks[[1]])
    assert pool.only_in_tree(blocks) == 4


def test_check_notices_a_block_that_is_freed_twice() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.release(blocks)
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.check()


def test_check_notices_a_wrong_count() -> None:
    pool = BlockPool(4)
    pool.num_cached += 1
    with pytest.raises(AssertionError, match="0 blocks are cached, 1 counted"):
        pool.check()
