"""Computed prompts, kept for reuse: a radix tree over token ids, in whole blocks. Owned by the step thread.

After SGLang's RadixAttention (Zheng et al., 2024). An edge carries one or more whole blocks; edges are split at block
boundaries. Whoever holds a block of a path holds all blocks before it, so blocks that only the tree holds are always
at the ends of paths, and taking leaves back from their ends, least recently used first, never hurts a reader.

The same tokens have other keys and values under an adapter, so each has a *space*, which is a root of its own; eviction
goes by age over all of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from asyncengine.step.adapters import NO_SPACE
from asyncengine.step.batch import Int32
from asyncengine.step.block_pool import BlockPool
from asyncengine.step.state_places import StatePlaces

NO_BLOCKS: Int32 = np.empty(0, dtype=np.int32)
_NEVER = -(1 << 62)


class _Node:
    __slots__ = ("blocks", "children", "last_used", "parent", "tokens")

    def __init__(self, tokens: Int32, blocks: Int32, parent: _Node | None) -> None:
        self.tokens = tokens
        self.blocks = blocks
        self.parent = parent
        self.children: dict[bytes, _Node] = {}
        self.last_used = _NEVER


class Edge(NamedTuple):
    """Some blocks, one after the other.

    Attributes:
        number: Of the edge.
        before: That of the edge which it follows; -1 for none.
        tokens: (blocks * page size,)
        blocks: (blocks,)
    """

    number: int
    before: int
    tokens: Int32
    blocks: Int32


class PrefixTree:
    """Which token sequences have their keys and values in which blocks.

    Args:
        pool: Counts who holds a block; the tree holds each of its blocks once.
        page_size: Tokens per block.
        max_leaves: Most separate sequences that `trim` leaves; None is unlimited.
        states: Where states at the ends of blocks are kept; None for a model without.
    """

    def __init__(
        self, pool: BlockPool, page_size: int, max_leaves: int | None = None, states: StatePlaces | None = None
    ) -> None:
        self._pool = pool
        self._page_size = page_size
        self._max_leaves = max_leaves
        self._states = states
        self._roots: dict[int, _Node] = {}  # by space
        self._clock = 0
        self._past = 0
        self._leaves = 0
        # (last use, tie break, leaf); entries whose leaf was used since, or is one no longer, are skipped when met.
        self._oldest: list[tuple[int, int, _Node]] = []
        self._pins: dict[str, tuple[int, Int32]] = {}  # space and blocks
        self._pinned_states: dict[str, int] = {}  # the place of the deepest state of those that have one

    def match(self, tokens: Int32, space: int = NO_SPACE) -> Int32:
        """Blocks of the longest known prefix of `tokens`. The caller retains them before anything is evicted."""
        blocks, node = self._find(tokens, space)
        if node is not None:
            self._touch(node)
        return blocks

    def known(self, tokens: Int32, space: int = NO_SPACE) -> Int32:
        """As `match`; it does not count as a use."""
        return self._find(tokens, space)[0]

    def usable(self, tokens: Int32, space: int = NO_SPACE) -> Int32:
        """Of what `match` finds, the blocks behind which a sequence can go on: where states are kept, at a state."""
        blocks = self.match(tokens, space)
        return blocks if self._states is None else blocks[: self._states.deepest(blocks)]

    def insert(self, tokens: Int32, blocks: Int32, space: int = NO_SPACE, *, used_last: bool = True) -> Int32:
        """Makes a computed sequence known.

        Args:
            tokens: (blocks * page size,) ids.
            blocks: Theirs; held by the caller.
            space: Under which adapter they were computed.
            used_last: Whether it counts as used right now; if not, as used before all that is known.

        Returns:
            The blocks under which the tree knows the tokens: where another sequence was first, they differ from
            `blocks`, and the caller should hold them in place of its own.
        """
        known: list[Int32] = []
        root = self._roots.get(space)
        if root is None:
            root = self._roots[space] = _Node(NO_BLOCKS, NO_BLOCKS, None)
        node = root
        start = done = 0
        while done < len(blocks):
            child = node.children.get(self._key(tokens, start))
            if child is None:
                rest = blocks[done:].copy()
                self._pool.adopt(rest)
                leaf = _Node(tokens[start:].copy(), rest, node)
                if node.children or node is root:
                    self._leaves += 1
                node.children[self._key(tokens, start)] = leaf
                known.append(rest)
                node = leaf
                break
            same = self._same_blocks(child, tokens, start)
            if same < len(child.blocks) and done + same < len(blocks):
                self._split(child, same)
            known.append(child.blocks[:same])
            done += same
            start += same * self._page_size
            node = child
        if used_last:
            self._touch(node)
        else:
            self._past -= 1
            self._note_use(node, self._past)
        return np.concatenate(known) if known else NO_BLOCKS

    def edges(self, space: int = NO_SPACE) -> Iterator[Edge]:
        """All that is known, each edge behind the one that it follows, and what was used last first."""
        root = self._roots.get(space)
        stack = [] if root is None else [(-1, node) for node in root.children.values()]
        stack.sort(key=lambda each: each[1].last_used)
        number = 0
        while stack:
            before, node = stack.pop()
            yield Edge(number, before, node.tokens, node.blocks)
            stack += [(number, child) for child in sorted(node.children.values(), key=lambda child: child.last_used)]
            number += 1

    def trim(self, in_use: int = 0) -> None:
        """Forgets the least recently used sequences until `max_leaves` are left, besides `in_use` that are in use."""
        if self._max_leaves is not None and self._leaves > self._max_leaves + in_use:
            self._evict(blocks=None, leaves=self._leaves - self._max_leaves - in_use)

    def evict(self, count: int) -> None:
        """Frees `count` cached blocks, or as many as there are, least recently used first."""
        self._evict(blocks=min(count, self._pool.num_cached), leaves=None)

    def keep(self, block: int, place: int) -> None:
        """Knows from now on where the state at the end of a block is, as `StatePlaces.keep`."""
        assert self._states is not None
        self._states.keep(block, place)
        for name, (_, blocks) in self._pins.items():
            if block in blocks:
                self._pin_state(name, blocks)

    @property
    def pinned_states(self) -> list[int]:
        """Places of states that pins hold, one that several hold as often as they do."""
        return list(self._pinned_states.values())

    @property
    def num_pinned(self) -> int:
        """Blocks that pins hold, one that several hold as often as they do."""
        return sum(len(blocks) for _, blocks in self._pins.values())

    def pin(self, name: str, tokens: Int32, space: int = NO_SPACE) -> None:
        """Keeps the known part of `tokens`, and the deepest state of it, from being evicted until `unpin`."""
        self.unpin(name)
        blocks = self.match(tokens, space)
        self._pool.retain(blocks)
        self._pins[name] = space, blocks
        self._pin_state(name, blocks)

    def unpin(self, name: str) -> bool:
        """Undoes `pin`; returns whether there was such a pin."""
        pin = self._pins.pop(name, None)
        if pin is None:
            return False
        self._pool.release(pin[1])
        self._unpin_state(name)
        return True

    def clear(self) -> None:
        """Forgets everything, pins included. Blocks that sequences hold stay theirs."""
        for space in list(self._roots):
            self.forget(space)
        for name in list(self._pins):  # of nothing
            self.unpin(name)
        self._oldest.clear()

    def forget(self, space: int) -> None:
        """Forgets all of a space, its pins included. Blocks that sequences hold stay theirs."""
        for name in [name for name, (own, _) in self._pins.items() if own == space]:
            self.unpin(name)
        root = self._roots.pop(space, None)
        stack = [] if root is None else list(root.children.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if not node.children:
                self._leaves -= 1
            node.parent = None
            self._abandon(node.blocks)

    def _abandon(self, blocks: Int32) -> None:
        """Lets go of blocks, and of the states at their ends."""
        if self._states is not None:
            self._states.forget(blocks)
        self._pool.abandon(blocks)

    def _pin_state(self, name: str, blocks: Int32) -> None:
        """Holds the deepest state of what is pinned, in place of the one that was."""
        states = self._states
        self._unpin_state(name)
        if states is not None and (count := states.deepest(blocks)):
            place = self._pinned_states[name] = states.at(int(blocks[count - 1]))
            states.retain(place)

    def _unpin_state(self, name: str) -> None:
        place = self._pinned_states.pop(name, None)
        if self._states is not None and place is not None:
            self._states.release(place)

    def _key(self, tokens: Int32, start: int) -> bytes:
        return tokens[start : start + self._page_size].tobytes()

    def _same_blocks(self, node: _Node, tokens: Int32, start: int) -> int:
        other = tokens[start : start + len(node.tokens)]
        different = node.tokens[: len(other)] != other
        same = int(different.argmax()) if different.any() else len(other)
        return same // self._page_size

    def _split(self, node: _Node, at: int) -> None:
        """Cuts an edge after `at` blocks; `node` stays the upper part."""
        cut = at * self._page_size
        lower = _Node(node.tokens[cut:], node.blocks[at:], node)
        lower.children = node.children
        lower.last_used = node.last_used
        for child in lower.children.values():
            child.parent = lower
        node.tokens, node.blocks = node.tokens[:cut], node.blocks[:at]
        node.children = {self._key(lower.tokens, 0): lower}
        if not lower.children:
            self._remember(lower)

    def _find(self, tokens: Int32, space: int) -> tuple[Int32, _Node | None]:
        """Blocks of the longest known prefix, and the edge of the last of them, or the root."""
        root = self._roots.get(space)
        if root is None:
            return NO_BLOCKS, None
        blocks: list[Int32] = []
        node = root
        start = 0
        while (child := node.children.get(self._key(tokens, start))) is not None:
            same = self._same_blocks(child, tokens, start)
            blocks.append(child.blocks[:same])
            start += same * self._page_size
            node = child
            if same < len(child.blocks):
                break
        return np.concatenate(blocks) if blocks else NO_BLOCKS, node

    def _touch(self, node: _Node) -> None:
        self._clock += 1
        self._note_use(node, self._clock)

    def _note_use(self, node: _Node, when: int) -> None:
        leaf = node
        while node.parent is not None:
            node.last_used = max(node.last_used, when)
            node = node.parent
        if not leaf.children and leaf.parent is not None:
            self._remember(leaf)

    def _remember(self, leaf: _Node) -> None:
        heapq.heappush(self._oldest, (leaf.last_used, id(leaf), leaf))
        if len(self._oldest) > 64 + 4 * self._leaves:
            self._rebuild()

    def _rebuild(self) -> None:
        self._oldest = []
        stack = [node for root in self._roots.values() for node in root.children.values()]
        while stack:
            node = stack.pop()
            if node.children:
                stack += node.children.values()
            else:
                self._oldest.append((node.last_used, id(node), node))
        heapq.heapify(self._oldest)

    def _evict(self, *, blocks: int | None, leaves: int | None) -> None:
        """Takes `blocks` blocks from the ends of the oldest leaves, or takes `leaves` whole leaves."""
        busy: list[tuple[int, int, _Node]] = []
        rebuilt = False
        while (blocks or 0) > 0 or (leaves or 0) > 0:
            if not self._oldest:
                if rebuilt or blocks is None:
                    break
                self._rebuild()
                busy.clear()
                rebuilt = True
                continue
            entry = heapq.heappop(self._oldest)
            last_used, _, leaf = entry
            if leaf.parent is None or leaf.children or leaf.last_used != last_used:
                continue
            free = self._pool.only_in_tree(leaf.blocks)
            if free == 0 or (blocks is None and free < len(leaf.blocks)):
                busy.append(entry)
                continue
            take = free if blocks is None else min(free, blocks)
            keep = len(leaf.blocks) - take
            self._abandon(leaf.blocks[keep:])
            if blocks is not None:
                blocks -= take
            if keep:
                leaf.tokens, leaf.blocks = leaf.tokens[: keep * self._page_size], leaf.blocks[:keep]
                busy.append(entry)
                continue
            parent = leaf.parent
            del parent.children[self._key(leaf.tokens, 0)]
            leaf.parent = None
            if parent.children or parent.parent is None:
                self._leaves -= 1
                if leaves is not None:
                    leaves -= 1
            else:
                self._remember(parent)
                if leaves is not None:
                    continue
        for entry in busy:
            heapq.heappush(self._oldest, entry)

    def check(self) -> None:
        """Walks the whole tree.

        Raises:
            AssertionError: A node is malformed, or the number of leaves is wrong.
        """
        leaves = 0
        stack = [item for root in self._roots.values() for item in root.children.items()]
        while stack:
            key, node = stack.pop()
            assert len(node.blocks) * self._page_size == len(node.tokens) > 0
            assert key == self._key(node.tokens, 0)
            leaves += not node.children
            for child in node.children.values():
                assert child.parent is node
            stack += node.children.items()
        assert leaves == self._leaves, f"{leaves} leaves, {self._leaves} counted"
