"""The KV blocks that sequences hold, and those that the prefix cache keeps. Owned by the step thread."""

from __future__ import annotations

import numpy as np

from asyncengine.step.batch import Int32, Int64
from asyncengine.step.block_pool import BlockPool
from asyncengine.step.limits import Limits
from asyncengine.step.prefix_tree import PrefixTree
from asyncengine.step.sequence import EMPTY, Sequence, SequenceState
from asyncengine.step.slots import SlotTable


class KVBlocks:
    """Who has which blocks: tables of sequences with a slot, and the tree of what was computed before.

    Args:
        limits: What the model can take.
        slots: Where the tables are.

    Attributes:
        weight_version: Of the weights that what is in the tree was computed with.
        copies: From block to block, for whom; due before the next step.
    """

    def __init__(self, limits: Limits, slots: SlotTable) -> None:
        self.pool = BlockPool(limits.num_blocks)
        self.tree = PrefixTree(self.pool, limits.page_size, limits.max_recycling)
        self.weight_version = 0
        self.copies: list[tuple[int, int, Sequence]] = []
        self._limits = limits
        self._slots = slots

    def make_room(self, count: int, spare: int = 0) -> bool:
        """Sees to it that `count` blocks are free, taking cached ones back; False if that leaves fewer than `spare`."""
        if count + spare > self.pool.num_free + self.pool.num_cached:
            return False
        if count > self.pool.num_free:
            self.tree.evict(count - self.pool.num_free)
        return count <= self.pool.num_free

    def give(self, slot: int, count: int) -> None:
        """Gives a sequence free blocks."""
        self._slots.append_blocks(slot, self.pool.allocate(count))

    def give_each(self, slots: Int64) -> None:
        """Gives each of several sequences a free block."""
        table = self._slots
        table.blocks[slots, table.num_blocks[slots]] = self.pool.allocate(len(slots))
        table.num_blocks[slots] += 1

    def share(self, sequence: Sequence, blocks: Int32) -> None:
        """Lets a sequence begin with blocks that another one computed."""
        self.pool.retain(blocks)
        self._slots.append_blocks(sequence.slot, blocks)

    def copy(self, source: int, sequence: Sequence) -> None:
        """Gives a sequence a free block that will have the contents of another before the next step."""
        own = self.pool.allocate(1)
        self._slots.append_blocks(sequence.slot, own)
        self.copies.append((source, int(own[0]), sequence))

    def hold(self, sequence: Sequence, spare: int) -> tuple[Int32, int] | None:
        """The cached blocks that a sequence begins with, retained, and how many more it takes, for which there is room;
        None if there is not.
        """
        cached = self._cached(sequence)
        self.pool.retain(cached)
        need = -(-len(sequence.tokens) // self._limits.page_size) - len(cached)
        if self.make_room(need, spare):
            return cached, need
        self.pool.release(cached)
        return None

    def fit(self, sequence: Sequence, spare: int) -> bool:
        """Whether there are blocks enough for a sequence to begin."""
        held = self.hold(sequence, spare)
        if held is not None:
            self.pool.release(held[0])
        return held is not None

    def begin(self, sequence: Sequence, cached: Int32, need: int) -> int:
        """Gives a sequence with a slot what `hold` found; returns how many of its tokens are computed."""
        slot = sequence.slot
        self._slots.append_blocks(slot, cached)
        self.give(slot, need)
        computed = len(cached) * self._limits.page_size
        self._slots.num_computed[slot] = computed
        sequence.weight_version = self.weight_version
        return computed

    def publish(self, sequence: Sequence, *, keep: bool) -> None:
        """Makes what a sequence has computed known to the prefix cache; with `keep` it goes on using it."""
        if not self._limits.prefix_cache or sequence.weight_version != self.weight_version:
            return
        slot, slots, page_size = sequence.slot, self._slots, self._limits.page_size
        # What is under way may fail, and what the tokens are that are drawn there is not known.
        settled = int(slots.num_computed[slot]) - sequence.in_flight
        if sequence.state is SequenceState.DECODE:
            settled = min(settled, int(slots.num_tokens[slot]) - 1)
        whole = settled // page_size
        if not whole:
            return
        own = slots.blocks[slot, :whole]
        known = self.tree.insert(slots.tokens[slot, : whole * page_size], own, sequence.request.space)
        # Another sequence may have computed the same tokens meanwhile. Going on with its blocks keeps every holder
        # of a block a holder of all blocks before it, which the tree relies on.
        other = known != own
        if keep and other.any():
            self.pool.retain(known[other])
            self.pool.release(own[other])
            own[:] = known

    def release(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks from it, and the copies that it waits for."""
        if self.copies:
            self.copies = [copy for copy in self.copies if copy[2] is not sequence]
        self.pool.release(self._slots.block_table(sequence.slot))
        self._slots.num_blocks[sequence.slot] = 0

    def forget_cache(self) -> None:
        """Empties the prefix cache; what runs on stays out of it, since it was computed with other weights."""
        self.tree.clear()
        self.weight_version += 1

    def due_copies(self) -> Int64:
        """(n, 2) what is to be copied before the next step, from where and to where; it counts as done."""
        due = self.resident_copies()
        self.copies.clear()
        return due

    def resident_copies(self) -> Int64:
        """The same, still due."""
        copies = [(source, to) for source, to, branch in self.copies if branch.resident]
        return np.array(copies, dtype=np.int64).reshape(-1, 2)

    def check(self) -> None:
        """Compares all accounts with each other.

        Raises:
            AssertionError: They disagree.
        """
        self.pool.check()
        self.tree.check()

    def check_idle(self) -> None:
        """Compares what can be compared at once while nothing runs: only what is pinned may be in use.

        Raises:
            AssertionError: Blocks are used that nobody holds.
        """
        pinned = self.tree.num_pinned
        assert 0 <= self.pool.num_used <= pinned, f"{self.pool.num_used} blocks are used while nothing runs"

    def _cached(self, sequence: Sequence) -> Int32:
        """The blocks at the beginning of a sequence that need not be computed."""
        # The last token is always computed: its logits are what the next one is drawn from.
        # Nor has the cache the logits or hidden states of prompt tokens that are to be looked at.
        known = sequence.tokens[: sequence.request.scored] if sequence.request.unscored else sequence.tokens[:-1]
        return self.tree.match(known, sequence.request.space) if self._limits.prefix_cache else EMPTY
