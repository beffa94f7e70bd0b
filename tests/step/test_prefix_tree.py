"""The radix tree against a list of what was inserted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncengine.step.batch import Int32
from asyncengine.step.block_pool import BlockPool
from asyncengine.step.prefix_tree import PrefixTree
from asyncengine.step.state_places import StatePlaces

PAGE = 2
BLOCKS = 24


def ids(tokens: Sequence[int]) -> Int32:
    return np.array(tokens, dtype=np.int32)


SPACES = st.sampled_from([0, 0, 0, 1, 2])

Path = tuple[int, tuple[int, ...]]
"""Space and tokens."""


class Naive:
    """The block at the end of every known path."""

    def __init__(self) -> None:
        self.blocks: dict[Path, int] = {}

    def match(self, tokens: Sequence[int], space: int) -> list[int]:
        found = []
        for end in range(PAGE, len(tokens) + 1, PAGE):
            block = self.blocks.get((space, tuple(tokens[:end])))
            if block is None:
                break
            found.append(block)
        return found


class TreeMachine(RuleBasedStateMachine):
    """Sequences hold blocks as the scheduler does: matched ones, then their own, which they swap for known ones."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.naive = Naive()
        self.holders: list[tuple[int, list[int], list[int]]] = []  # space, tokens, blocks
        self.pins: dict[str, tuple[int, list[int]]] = {}  # space, blocks
        self.states: dict[int, Path] = {}  # by place, what it was kept for last

    @initialize(max_leaves=st.sampled_from([None, None, 0, 1, 2, 4]), places=st.sampled_from([0, 1, 3, 30]))
    def make(self, max_leaves: int | None, places: int) -> None:
        self.max_leaves = max_leaves
        self.places = StatePlaces(5, places, BLOCKS)
        self.tree = PrefixTree(self.pool, PAGE, max_leaves, self.places)

    def held(self) -> set[int]:
        return {block for *_, blocks in [*self.holders, *self.pins.values()] for block in blocks}

    def sync(self) -> None:
        """Takes over what was evicted: only unheld blocks may be gone."""
        held = self.held()
        known = self.walk()
        for path, block in list(self.naive.blocks.items()):
            if known.get(path) != block:
                assert path not in known, "a path has another block than before"
                assert block not in held, "a block that is held was evicted"
                del self.naive.blocks[path]
        assert known == self.naive.blocks

    def walk(self) -> dict[Path, int]:
        found: dict[Path, int] = {}
        stack: list[tuple[int, tuple[int, ...], Any]] = [(space, (), root) for space, root in self.tree._roots.items()]
        while stack:
            space, path, node = stack.pop()
            for at, block in enumerate(node.blocks.tolist()):
                found[space, (*path, *node.tokens[: (at + 1) * PAGE].tolist())] = block
            whole = (*path, *node.tokens.tolist())
            stack += [(space, whole, child) for child in node.children.values()]
        return found

    @rule(tokens=st.lists(st.integers(0, 1), min_size=0, max_size=12), space=SPACES)
    def match(self, tokens: list[int], space: int) -> None:
        assert self.tree.match(ids(tokens), space).tolist() == self.naive.match(tokens, space)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=PAGE, max_size=12), space=SPACES, later=st.booleans())
    def compute(self, tokens: list[int], space: int, later: bool) -> None:
        """A sequence starts: what is known is shared, the rest is its own; it is inserted now or later."""
        tokens = tokens[: len(tokens) // PAGE * PAGE]
        cached = self.tree.match(ids(tokens), space)
        need = len(tokens) // PAGE - len(cached)
        self.pool.retain(cached)
        if need > self.pool.num_free:
            self.tree.evict(need - self.pool.num_free)
            self.holders.append((space, [], cached.tolist()))
            self.sync()
            self.holders.pop()
            if need > self.pool.num_free:
                self.pool.release(cached)
                return
        blocks = [*cached.tolist(), *self.pool.allocate(need).tolist()]
        self.holders.append((space, tokens, blocks))
        if not later:
            self.insert(len(self.holders) - 1)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), used_last=st.sampled_from([True, True, False]))
    def publish(self, data: st.DataObject, used_last: bool) -> None:
        self.insert(data.draw(st.integers(0, len(self.holders) - 1)), used_last)

    def insert(self, index: int, used_last: bool = True) -> None:
        space, tokens, blocks = self.holders[index]
        known = self.tree.insert(ids(tokens), ids(blocks), space, used_last=used_last)
        assert len(known) == len(blocks)
        for end, (own, other) in enumerate(zip(blocks, known.tolist(), strict=True), 1):
            path = space, tuple(tokens[: end * PAGE])
            assert self.naive.blocks.setdefault(path, own) == other
        other = known != ids(blocks)
        self.pool.retain(known[other])
        self.pool.release(ids(blocks)[other])
        self.holders[index] = (space, tokens, known.tolist())
        self.sync()

    @precondition(lambda self: self.naive.blocks)
    @rule(data=st.data())
    def keep_a_state(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.naive.blocks)))
        place = self.places.take()
        if place is None:  # all are pinned
            assert len(set(self.tree.pinned_states)) == self.places.num_places
            return
        known = self.places._place_of[self.naive.blocks[path]] >= 0
        self.tree.keep(self.naive.blocks[path], place)
        if not known:
            self.states[place] = path

    @rule(tokens=st.lists(st.integers(0, 1), max_size=12), space=SPACES)
    def go_on(self, tokens: list[int], space: int) -> None:
        """Finds the deepest of the states that are known of a sequence."""
        known = {self.states[place] for place in self.places._block_of}
        ends = [end for end in range(0, len(tokens) + 1, PAGE) if not end or (space, tuple(tokens[:end])) in known]
        blocks = self.tree.usable(ids(tokens), space)
        assert blocks.tolist() == self.naive.match(tokens[: ends[-1]], space) and len(blocks) * PAGE == ends[-1]

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        *_, blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(ids(blocks))

    @rule()
    def trim(self) -> None:
        self.tree.trim(in_use=len(self.holders))
        self.sync()
        if self.max_leaves is not None and not self.holders and not self.pins:
            assert self.tree._leaves <= self.max_leaves

    @rule(count=st.integers(0, BLOCKS))
    def evict(self, count: int) -> None:
        free, cached = self.pool.num_free, self.pool.num_cached
        self.tree.evict(count)
        assert self.pool.num_free == free + min(count, cached)
        self.sync()

    @rule(name=st.sampled_from("pq"), tokens=st.lists(st.integers(0, 1), max_size=12), space=SPACES)
    def pin(self, name: str, tokens: list[int], space: int) -> None:
        self.tree.pin(name, ids(tokens), space)
        self.pins[name] = space, self.naive.match(tokens, space)

    @rule(name=st.sampled_from("pq"))
    def unpin(self, name: str) -> None:
        assert self.tree.unpin(name) == (name in self.pins)
        self.pins.pop(name, None)

    @rule(sure=st.integers(0, 4))
    def clear(self, sure: int) -> None:
        if sure == 0:
            self.tree.clear()
            self.forgotten({0, 1, 2})

    @rule(space=st.sampled_from([1, 2]))
    def forget(self, space: int) -> None:
        self.tree.forget(space)
        self.forgotten({space})

    def forgotten(self, spaces: set[int]) -> None:
        self.naive.blocks = {path: block for path, block in self.naive.blocks.items() if path[0] not in spaces}
        self.pins = {name: pin for name, pin in self.pins.items() if pin[0] not in spaces}
        # Those that go on do so with blocks that the tree does not know; they would publish them anew.
        for space, _, blocks in self.holders:
            if space in spaces:
                self.pool.release(ids(blocks))
        self.holders = [holder for holder in self.holders if holder[0] not in spaces]
        self.sync()

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "tree"):
            return
        self.tree.check()
        self.pool.check()
        adopted = self.pool.adopted(np.arange(BLOCKS, dtype=np.int32))
        assert np.flatnonzero(adopted).tolist() == sorted(self.naive.blocks.values())
        self.places.check(self.tree.pinned_states)
        for place, block in self.places._block_of.items():
            assert self.naive.blocks[self.states[place]] == block, "a state is at another path than it was kept for"
        for name, (_, blocks) in self.pins.items():
            deepest = [block for block in blocks if self.places._place_of[block] >= 0][-1:]
            pinned = self.tree._pinned_states.get(name)
            assert deepest == ([] if pinned is None else [self.places._block_of[pinned]])
        held = self.held()
        known = set(self.naive.blocks.values())
        assert self.pool.num_used == len(held)
        assert self.pool.num_cached == len(known - held)
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_used == BLOCKS
        assert len(self.tree._oldest) <= 64 + 8 * max(self.tree._leaves, 1)


TestTree = TreeMachine.TestCase


class Filled:
    """A tree in which sequences come, are known, and go."""

    def __init__(self, blocks: int = 32, max_leaves: int | None = None) -> None:
        self.pool = BlockPool(blocks)
        self.tree = PrefixTree(self.pool, PAGE, max_leaves)

    def computed(self, *tokens: int, keep: bool = False) -> Int32:
        cached = self.tree.match(ids(tokens))
        self.pool.retain(cached)
        blocks = np.concatenate([cached, self.pool.allocate(len(tokens) // PAGE - len(cached))])
        self.tree.insert(ids(tokens), blocks)
        if not keep:
            self.pool.release(blocks)
            self.tree.trim()
        return blocks

    def knows(self, *tokens: int) -> int:
        """Blocks known of a sequence, without using it."""
        clock = self.tree._clock
        found = len(self.tree.match(ids(tokens)))
        assert self.tree._clock == clock + 1
        return found


def test_least_recently_used_goes_first() -> None:
    case = Filled()
    case.computed(1, 1)
    case.computed(2, 2)
    case.computed(3, 3)
    case.tree.match(ids([1, 1]))
    case.tree.evict(2)
    assert (case.knows(1, 1), case.knows(2, 2), case.knows(3, 3)) == (1, 0, 0)


def test_what_is_inserted_as_used_before_goes_before_what_was_there_and_leaves_no_trace_there() -> None:
    case = Filled()
    case.computed(1, 1, 2, 2)
    case.computed(3, 3)
    for tokens in ((1, 1, 4, 4), (5, 5), (1, 1), (1, 1, 2, 2, 6, 6)):
        own = case.pool.allocate(len(tokens) // PAGE)
        case.tree.insert(ids(tokens), own, used_last=False)
        case.pool.release(own)
    assert case.tree.known(ids([3, 3])).tolist() == case.tree.known(ids([3, 3, 1])).tolist()  # looking is no use
    assert [bytes(edge.tokens.tolist()) for edge in case.tree.edges()] == [
        b"\3\3", b"\1\1", b"\2\2", b"\6\6", b"\4\4", b"\5\5",
    ]  # fmt: skip
    case.tree.evict(1)
    case.tree.evict(1)
    assert (len(case.tree.known(ids([1, 1, 2, 2, 6, 6]))), len(case.tree.known(ids([5, 5])))) == (2, 0)
    case.tree.evict(1)
    assert len(case.tree.known(ids([1, 1, 4, 4]))) == 1 and len(case.tree.known(ids([1, 1, 2, 2]))) == 2
    case.tree.evict(1)
    assert len(case.tree.known(ids([1, 1, 2, 2]))) == 1 and len(case.tree.known(ids([3, 3]))) == 1


def test_leaves_go_before_what_they_share() -> None:
    case = Filled()
    case.computed(1, 1, 2, 2)
    case.computed(1, 1, 3, 3)
    case.tree.evict(2)
    assert case.knows(1, 1) == 1
    case.tree.evict(1)
    assert case.pool.num_free == case.pool.num_blocks


def test_long_leaves_are_taken_back_from_their_ends() -> None:
    case = Filled()
    case.computed(1, 1, 2, 2, 3, 3)
    case.tree.evict(1)
    assert case.knows(1, 1, 2, 2, 3, 3) == 2


def test_what_is_cut_above_a_fork_is_above_it_still() -> None:
    case = Filled()
    case.computed(1, 1, 2, 2, 3, 3)
    case.computed(1, 1, 2, 2, 4, 4)
    case.computed(1, 1, 5, 5)
    case.tree.check()
    case.tree.evict(2)  # both ends of the fork
    assert case.knows(1, 1, 2, 2) == 2
    case.tree.evict(3)
    assert case.pool.num_free == case.pool.num_blocks
    case.tree.check()


def test_a_held_leaf_is_passed_over() -> None:
    case = Filled()
    case.computed(1, 1, keep=True)
    case.computed(2, 2)
    case.tree.evict(5)
    assert (case.knows(1, 1), case.knows(2, 2)) == (1, 0)


def test_only_whole_blocks_are_matched() -> None:
    case = Filled()
    case.computed(1, 2, 3, 4)
    assert case.knows(1, 2, 3) == 1
    assert case.knows(1) == 0
    assert case.knows() == 0
    assert case.knows(1, 2, 4, 4) == 1


def test_the_second_to_compute_the_same_is_told_the_first_ones_blocks() -> None:
    case = Filled()
    first = case.computed(1, 1, 2, 2, keep=True)
    own = case.pool.allocate(3)
    known = case.tree.insert(ids([1, 1, 2, 2, 3, 3]), own)
    assert known.tolist() == [*first.tolist(), own[2]]


def test_pinned_blocks_are_never_evicted() -> None:
    case = Filled()
    case.computed(1, 1, 2, 2)
    case.computed(1, 1, 3, 3)
    case.tree.pin("p", ids([1, 1, 2, 2]))
    case.tree.evict(10)
    assert case.knows(1, 1, 2, 2) == 2
    assert case.knows(1, 1, 3, 3) == 1
    assert case.tree.unpin("p") and not case.tree.unpin("p")
    case.tree.evict(10)
    assert case.pool.num_free == case.pool.num_blocks


def test_a_pin_of_the_same_name_replaces_the_other() -> None:
    case = Filled()
    case.computed(1, 1)
    case.computed(2, 2)
    case.tree.pin("p", ids([1, 1]))
    case.tree.pin("p", ids([2, 2]))
    case.tree.evict(10)
    assert (case.knows(1, 1), case.knows(2, 2)) == (0, 1)


def test_two_pins_of_the_same_prompt_are_two() -> None:
    case = Filled()
    case.computed(1, 1)
    case.tree.pin("p", ids([1, 1]))
    case.tree.pin("q", ids([1, 1]))
    case.tree.unpin("p")
    case.tree.evict(10)
    assert case.knows(1, 1) == 1


def test_clear_forgets_pins_but_not_what_sequences_hold() -> None:
    case = Filled()
    blocks = case.computed(1, 1, keep=True)
    case.computed(2, 2)
    case.tree.pin("p", ids([2, 2]))
    case.tree.clear()
    case.tree.check()
    assert case.pool.num_used == 1 and case.pool.num_cached == 0
    case.pool.release(blocks)
    assert case.pool.num_free == case.pool.num_blocks


def test_the_number_of_leaves_is_bounded() -> None:
    case = Filled(max_leaves=2)
    for token in range(6):
        case.computed(token, token, 9, 9)
        assert case.tree._leaves <= 2
    assert case.knows(5, 5) == case.knows(4, 4) == 1
    assert case.knows(3, 3) == 0


def test_no_leaves_may_be_kept() -> None:
    case = Filled(max_leaves=0)
    case.computed(1, 1, 2, 2)
    assert case.pool.num_free == case.pool.num_blocks


def test_leaves_in_use_do_not_count() -> None:
    case = Filled(max_leaves=1)
    case.computed(1, 1, keep=True)
    case.computed(2, 2, keep=True)
    blocks = case.computed(3, 3, keep=True)
    case.pool.release(blocks)
    case.tree.trim(in_use=2)
    assert case.knows(3, 3) == 1


def test_trimming_forgets_a_sequence_but_not_what_it_shares() -> None:
    case = Filled(max_leaves=1)
    case.computed(1, 1, 2, 2)
    case.computed(1, 1, 3, 3)
    assert case.tree._leaves == 1
    assert (case.knows(1, 1, 2, 2), case.knows(1, 1, 3, 3)) == (1, 2)


def test_trimming_passes_over_a_leaf_that_is_partly_in_use() -> None:
    case = Filled(max_leaves=0)
    blocks = case.computed(1, 1, 2, 2, keep=True)
    case.pool.release(blocks[1:])
    case.tree.trim()
    assert case.knows(1, 1, 2, 2) == 2


def test_the_heap_of_leaves_does_not_grow_with_use() -> None:
    case = Filled()
    for token in range(4):
        case.computed(token, token)
    for _ in range(2000):
        case.tree.match(ids([1, 1]))
    assert len(case.tree._oldest) < 200


def test_check_notices_a_wrong_number_of_leaves() -> None:
    case = Filled()
    case.computed(1, 1)
    case.tree._leaves += 1
    with pytest.raises(AssertionError, match="1 leaves, 2 counted"):
        case.tree.check()
