"""Who holds which of the places where states are kept. Owned by the step thread.

A place is in exactly one of three states, and their numbers always add up (`check`):

* free: nobody holds it;
* known: the prefix tree holds it, for the state at the end of one of its blocks. If nobody else does, it can be taken
  back at once, least recently used first;
* held: a sequence alone holds it, for a state that may become known.

That a block of the tree stands for one path, and so for one state, makes the block the state's name: edges may be split
and leaves cut as they like.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

import numpy as np

from asyncengine.step.batch import Int32


class StatePlaces:
    """Hands out places and counts who holds them.

    Args:
        first: The first place; those before it are the slots' own.
        num_places: How many there are.
        num_blocks: Of the KV cache.
    """

    __slots__ = ("_block_of", "_free", "_holds", "_idle", "_place_of", "num_places")

    def __init__(self, first: int, num_places: int, num_blocks: int) -> None:
        self.num_places = num_places
        self._free = list(range(first + num_places - 1, first - 1, -1))
        self._holds: dict[int, int] = {}  # of the others, how many hold each
        self._block_of: dict[int, int] = {}  # of those that are known
        self._place_of = np.full(num_blocks, -1, dtype=np.int32)
        # Those that the tree alone holds. Ordered, because a dict finds its first entry slowly after many deletions.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Places that nobody holds."""
        return len(self._free)

    @property
    def num_known(self) -> int:
        """Places that the tree holds, alone or not."""
        return len(self._block_of)

    @property
    def num_held(self) -> int:
        """Places that are neither free nor known."""
        return len(self._holds) - len(self._block_of)

    @property
    def num_used(self) -> int:
        """Places that neither are free nor can be taken back."""
        return len(self._holds) - len(self._idle)

    def take(self) -> int | None:
        """A place, held once: a free one, or that of the state that was used least recently; None if all are used."""
        if not self._free:
            if not self._idle:
                return None
            self._forget(next(iter(self._idle)))
        place = self._free.pop()
        self._holds[place] = 1
        return place

    def retain(self, place: int) -> None:
        """Holds a place once more."""
        self._holds[place] += 1
        self._idle.pop(place, None)

    def release(self, place: int) -> None:
        """Lets go of a place once; a known one that only the tree holds then is the most recently used."""
        holds = self._holds[place] - 1
        if not holds:
            del self._holds[place]
            self._free.append(place)
            return
        self._holds[place] = holds
        if holds == 1 and place in self._block_of:
            self._idle[place] = None

    def keep(self, block: int, place: int) -> None:
        """Makes the state at the end of a block of the tree known; the caller's hold is the tree's from now on.

        Where one is known already, the place is released: the same tokens have the same state.
        """
        known = int(self._place_of[block])
        if known >= 0:
            self.release(place)
            if known in self._idle:
                self._idle.move_to_end(known)
            return
        self._place_of[block] = place
        self._block_of[place] = block
        if self._holds[place] == 1:
            self._idle[place] = None

    def forget(self, blocks: Int32) -> None:
        """Forgets the states at the ends of blocks that leave the tree. Whoever holds one still has it."""
        places = self._place_of[blocks]
        for place in places[places >= 0].tolist():
            self._forget(place)

    def deepest(self, blocks: Int32) -> int:
        """How many blocks there are of a path up to the last one at whose end a state is known; 0 if there is none."""
        known = np.flatnonzero(self._place_of[blocks] >= 0)
        return int(known[-1]) + 1 if len(known) else 0

    def at(self, block: int) -> int:
        """Where the state at the end of a block is; it is known."""
        place = int(self._place_of[block])
        assert place >= 0, "no state is known there"
        return place

    def check(self, held: Iterable[int]) -> None:
        """Counts everything anew.

        Args:
            held: Places that others than the tree hold, each as often as they do.

        Raises:
            AssertionError: Free, known and held do not add up, or a count is wrong.
        """
        holds = Counter([*held, *self._block_of])
        assert holds == self._holds, f"places are held so often: {dict(holds)}; counted: {self._holds}"
        assert self.num_free + self.num_known + self.num_held == self.num_places, "places were lost"
        assert len({*self._free, *holds}) == self.num_places, "the free list is wrong"
        known = {place: block for block, place in enumerate(self._place_of.tolist()) if place >= 0}
        assert known == self._block_of, "places and blocks do not agree"
        assert set(self._idle) == {place for place in known if holds[place] == 1}, "the idle ones are wrong"

    def _forget(self, place: int) -> None:
        self._place_of[self._block_of.pop(place)] = -1
        self._idle.pop(place, None)
        self.release(place)
