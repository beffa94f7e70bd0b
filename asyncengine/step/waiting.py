"""The waiting queue: by priority, then by arrival. Owned by the step thread."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from asyncengine.step.sequence import Sequence


class WaitingQueue:
    """Sequences without a slot. Every operation is O(log n) or better; removal is lazy."""

    __slots__ = ("_heap", "_members")

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], int, Sequence]] = []
        self._members: dict[Sequence, int] = {}  # the stamp of the entry that counts
        # A sequence that left and came back has an old entry in the heap: the stamp tells them apart.

    def push(self, sequence: Sequence) -> None:
        """Adds a sequence at its place; one that was preempted keeps its arrival, so it goes before later ones."""
        stamp = self._members[sequence] = sequence.request.preemptions
        heapq.heappush(self._heap, (sequence.order, stamp, sequence))

    def head(self) -> Sequence | None:
        """Whose turn it is."""
        while self._heap:
            _, stamp, sequence = self._heap[0]
            if self._members.get(sequence) == stamp:
                return sequence
            heapq.heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is."""
        del self._members[sequence]
        if not self._members:  # entries keep prompts, and what is in them
            self._heap.clear()
        elif len(self._heap) > 64 + 2 * len(self._members):
            self._heap = [entry for entry in self._heap if self._members.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._members

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._members))
