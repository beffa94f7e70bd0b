"""The KV blocks that sequences hold, and those that the prefix cache keeps. Owned by the step thread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asyncengine.step.batch import Int32, Int64
from asyncengine.step.block_pool import BlockPool
from asyncengine.step.kept_states import KeptStates
from asyncengine.step.limits import Limits
from asyncengine.step.prefix_tree import NO_BLOCKS, PrefixTree
from asyncengine.step.sequence import Sequence, SequenceState
from asyncengine.step.slots import SlotTable
from asyncengine.step.state_places import StatePlaces


@dataclass(frozen=True, slots=True)
class Start:
    """What a sequence begins with.

    Attributes:
        cached: Blocks that need not be computed; retained.
        need: How many more it takes.
        saves: Behind how many of its tokens it saves states, where there are some.
    """

    cached: Int32
    need: int
    saves: tuple[int, ...] = ()


class KVBlocks:
    """Who has which blocks: tables of sequences with a slot, and the tree of what was computed before.

    Args:
        limits: What the model can take.
        slots: Where the tables are.

    Attributes:
        weight_version: Of the weights that what is in the tree was computed with.
        copies: From block to block, for whom; due before the next step.
        states: Which states are kept beside the blocks; None for a model without.
    """

    def __init__(self, limits: Limits, slots: SlotTable) -> None:
        self.pool = BlockPool(limits.num_blocks)
        places = None
        if limits.kept_states is not None:
            places = StatePlaces(limits.max_num_sequence, limits.kept_states, limits.num_blocks)
        self.tree = PrefixTree(self.pool, limits.page_size, limits.max_recycling, places)
        self.states = None if places is None else KeptStates(limits, slots, places, self.tree)
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

    def hold(self, sequence: Sequence, spare: int) -> Start | None:
        """What a sequence begins with, if there is room for all that it takes; None if there is not."""
        saves: tuple[int, ...] = ()
        if self.states is not None:
            cached, saves = self.states.look(sequence)
        else:
            cached = self._cached(sequence)
        self.pool.retain(cached)
        need = -(-len(sequence.tokens) // self._limits.page_size) - len(cached)
        if self.make_room(need, spare):
            return Start(cached, need, saves)
        self.pool.release(cached)
        return None

    def fit(self, sequence: Sequence, spare: int) -> bool:
        """Whether there are blocks enough for a sequence to begin."""
        held = self.hold(sequence, spare)
        if held is not None:
            self.pool.release(held.cached)
        return held is not None

    def begin(self, sequence: Sequence, start: Start) -> int:
        """Gives a sequence with a slot what `hold` found; returns how many of its tokens are computed."""
        slot = sequence.slot
        self._slots.append_blocks(slot, start.cached)
        self.give(slot, start.need)
        if self.states is not None:
            self.states.begin(sequence, start.cached, start.saves)
        computed = len(start.cached) * self._limits.page_size
        self._slots.num_computed[slot] = computed
        sequence.weight_version = self.weight_version
        return computed

    def publish(self, sequence: Sequence, *, keep: bool) -> None:
        """Makes what a sequence has computed known to the prefix cache; with `keep` it goes on using it."""
        if not self._limits.reuses_prefixes or sequence.weight_version != self.weight_version:
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
        if self.states is not None:
            self.states.publish(sequence, known, settled, leaves=not keep)
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
        if self.states is not None:
            self.states.release(sequence)

    def forget_cache(self) -> None:
        """Empties the prefix cache; what runs on stays out of it, since it was computed with other weights."""
        self.tree.clear()
        if self.states is not None:
            self.states.forget()
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
        if self.states is not None:
            self.states.check()

    def check_idle(self) -> None:
        """Compares what can be compared at once while nothing runs: only what is pinned may be in use.

        Raises:
            AssertionError: Blocks are used that nobody holds.
        """
        pinned = self.tree.num_pinned
        assert 0 <= self.pool.num_used <= pinned, f"{self.pool.num_used} blocks are used while nothing runs"
        if self.states is not None:
            self.states.check_idle()

    def _cached(self, sequence: Sequence) -> Int32:
        """The blocks at the beginning of a sequence that need not be computed."""
        # The last token is always computed: its logits are what the next one is drawn from.
        # Nor has the cache the logits or hidden states of prompt tokens that are to be looked at.
        request = sequence.request
        known = sequence.tokens[: request.unscored_from] if request.unscored else sequence.tokens[:-1]
        return self.tree.match(known, request.space) if self._limits.reuses_prefixes else NO_BLOCKS
