"""Sparse per-slot token settings (logit bias, min-tokens mask). Owner: the sampler, on the step thread."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class SlotEntries:
    """Token ids and values of the few slots that have any: one run of two flat arrays for each slot.

    Memory is what the entries take, whatever the number of slots, and a batch finds its own in a few array operations.
    """

    def __init__(self, num_slots: int) -> None:
        self._start = np.zeros(num_slots, np.int64)
        self._count = np.zeros(num_slots, np.int64)
        self._ids: Int64 = np.empty(0, np.int64)
        self._values: Float32 = np.empty(0, np.float32)

    def __len__(self) -> int:
        return len(self._ids)

    def put(self, slot: int, ids: Sequence[int], values: Sequence[float]) -> None:
        """Adds the entries of a slot that has none."""
        all_ids = np.concatenate([self._ids, np.asarray(ids, np.int64)])
        all_values = np.concatenate([self._values, np.asarray(values, np.float32)])
        self._start[slot], self._count[slot] = len(self._ids), len(ids)
        self._ids, self._values = all_ids, all_values

    def remove(self, slot: int) -> None:
        """Forgets a slot's entries; does nothing where there are none."""
        start, count = self._start[slot], self._count[slot]
        if count:
            gone = slice(start, start + count)
            self._ids, self._values = np.delete(self._ids, gone), np.delete(self._values, gone)
            self._start[self._start > start] -= count
            self._count[slot] = 0

    def of_batch(self, slots: Int64, wanted: NDArray[np.bool_] | None = None) -> tuple[Int64, Int64, Float32]:
        """The entries of the slots in a batch.

        Args:
            slots: (rows,) the slot of each row.
            wanted: (rows,) which rows' entries to take; None is all.

        Returns:
            (entries,) each: the row in the batch, the token id, the value.
        """
        counts = self._count[slots] if wanted is None else self._count[slots] * wanted
        rows = np.repeat(np.arange(len(slots)), counts)
        first = np.cumsum(counts) - counts  # of each row, among the entries returned
        at = np.arange(len(rows)) + (self._start[slots] - first)[rows]
        return rows, self._ids[at], self._values[at]
