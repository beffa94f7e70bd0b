"""What is known of each sequence that takes part in steps, as columns. Owned by the step thread.

A structure of arrays rather than objects, so that the bookkeeping of a step is a handful of vector operations however
many sequences decode.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from asyncengine.step.adapters import NO_ADAPTER
from asyncengine.step.batch import Int32, Int64

_STOP_IDS = 8


class SlotTable:
    """Rows are slots; a sequence owns one while it is resident.

    Attributes:
        tokens: (slots, max length) prompt and output.
        flat_tokens: (slots * max length,) the same memory.
        num_tokens: (slots,) how many of them there are.
        num_computed: (slots,) how many of them have their keys and values in the cache.
        max_tokens: (slots,) number of tokens at which the sequence ends with reason "length".
        min_tokens: (slots,) number of tokens below which no stop token counts.
        prompt_tokens: (slots,) how many of the tokens are the prompt.
        bound: (slots,) whether what it may draw depends on the token before.
        searching: (slots,) whether it is a beam of a search.
        adapters: (slots,) index of the adapter under which it is computed; `NO_ADAPTER` for none.
        shifts: (slots,) what is added to the place of a token behind the prompt to give its position.
        sources: (slots,) tokens of the source that the sequence begins with, as `StepBatch.sources`; 0 for none.
        stop_ids: (slots, 8) tokens that end the sequence, padded with -1. Longer lists are in `more_stop_ids`.
        blocks: (slots, max blocks) block table.
        num_blocks: (slots,) how many blocks it has.
        last_token_at: (slots,) when the newest token came.
    """

    def __init__(self, num_slots: int, max_length: int, page_size: int) -> None:
        max_blocks = -(-max_length // page_size)
        # zeros, not empty or full: the pages of rows that are never used are never touched.
        self.tokens = np.zeros((num_slots, max_length), dtype=np.int32)
        self.flat_tokens = self.tokens.reshape(-1)
        self.blocks = np.zeros((num_slots, max_blocks), dtype=np.int32)
        self.num_tokens = np.zeros(num_slots, dtype=np.int64)
        self.num_computed = np.zeros(num_slots, dtype=np.int64)
        self.max_tokens = np.zeros(num_slots, dtype=np.int64)
        self.min_tokens = np.zeros(num_slots, dtype=np.int64)
        self.prompt_tokens = np.zeros(num_slots, dtype=np.int64)
        self.bound = np.zeros(num_slots, dtype=np.bool_)
        self.searching = np.zeros(num_slots, dtype=np.bool_)
        self.adapters = np.full(num_slots, NO_ADAPTER, dtype=np.int32)
        self._ever_adapted = False  # while it is not, nobody looks
        self.shifts = np.zeros(num_slots, dtype=np.int64)
        self._ever_shifted = False
        self.sources = np.zeros(num_slots, dtype=np.int32)
        self._ever_sourced = False
        self.num_blocks = np.zeros(num_slots, dtype=np.int64)
        self.stop_ids = np.full((num_slots, _STOP_IDS), -1, dtype=np.int32)
        self.more_stop_ids: dict[int, Int32] = {}
        self.last_token_at = np.zeros(num_slots, dtype=np.float64)
        self.page_size = page_size
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots without a sequence."""
        return len(self._free)

    def take(self) -> int:
        """Reserves a slot."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Frees a slot."""
        self.more_stop_ids.pop(slot, None)
        self.num_blocks[slot] = 0
        self._free.append(slot)

    def fill(
        self,
        slot: int,
        tokens: Int32,
        prompt_tokens: int,
        max_tokens: int,
        min_tokens: int,
        stop_ids: tuple[int, ...],
        *,
        bound: bool = False,
        searching: bool = False,
        adapter: int = NO_ADAPTER,
        shift: int = 0,
        source: int = 0,
    ) -> None:
        """Writes a sequence that has nothing in the cache yet. Arguments as the columns, but for their rows."""
        self.tokens[slot, : len(tokens)] = tokens
        self.num_tokens[slot] = len(tokens)
        self.num_computed[slot] = 0
        self.num_blocks[slot] = 0
        self.prompt_tokens[slot] = prompt_tokens
        self.max_tokens[slot] = max_tokens
        self.min_tokens[slot] = min_tokens
        self.bound[slot] = bound
        self.searching[slot] = searching
        self.adapters[slot] = adapter
        self._ever_adapted |= adapter != NO_ADAPTER
        self.shifts[slot] = shift
        self._ever_shifted |= shift != 0
        self.sources[slot] = source
        self._ever_sourced |= source != 0
        self.stop_ids[slot] = -1
        if len(stop_ids) <= _STOP_IDS:
            self.stop_ids[slot, : len(stop_ids)] = stop_ids
        else:
            self.more_stop_ids[slot] = np.array(stop_ids, dtype=np.int32)

    def known_tokens(self, slot: int) -> Int32:
        """The sequence's tokens; a view."""
        return self.tokens[slot, : self.num_tokens[slot]]

    def block_table(self, slot: int) -> Int32:
        """The sequence's blocks; a view."""
        return self.blocks[slot, : self.num_blocks[slot]]

    def adapters_of(self, slots: Int64) -> Int32 | None:
        """(slots,) indices of the adapters of several sequences; None if none of them has one."""
        if not self._ever_adapted:
            return None
        adapters: Int32 = self.adapters[slots]
        return adapters if (adapters != NO_ADAPTER).any() else None

    def shifts_of(self, slots: Int64) -> Int64 | None:
        """(slots,) shifts of several sequences; None if none of them has one."""
        if not self._ever_shifted:
            return None
        shifts: Int64 = self.shifts[slots]
        return shifts if shifts.any() else None

    def sources_of(self, slots: Int64) -> Int32 | None:
        """(slots,) tokens of the sources of several sequences; None if none of them has one."""
        if not self._ever_sourced:
            return None
        sources: Int32 = self.sources[slots]
        return sources if sources.any() else None

    def append_blocks(self, slot: int, blocks: Int32) -> None:
        """Extends a block table."""
        have = self.num_blocks[slot]
        self.blocks[slot, have : have + len(blocks)] = blocks
        self.num_blocks[slot] = have + len(blocks)

    def append_tokens(self, slots: Int64, token_ids: Int32) -> None:
        """Adds one token to each of several sequences."""
        self.tokens[slots, self.num_tokens[slots]] = token_ids
        self.num_tokens[slots] += 1

    def stop_columns(self, slots: Int64) -> Int32:
        """(slots, columns) stop tokens of several sequences, without the columns that none of them uses."""
        ids = self.stop_ids[slots]
        return ids[:, : int((ids >= 0).sum(axis=1).max(initial=0))]

    def stopped(self, slots: Int64, token_ids: Int32, stop_ids: Int32) -> list[int]:
        """Indices of the sequences that end at the token just appended because it is one of their stop tokens.

        Args:
            slots: Of the sequences.
            token_ids: (slots,) the tokens.
            stop_ids: Their `stop_columns`.
        """
        hit: NDArray[np.bool_] = (stop_ids == token_ids[:, None]).any(axis=1)
        if self.more_stop_ids:
            for row, slot in enumerate(slots.tolist()):
                ids = self.more_stop_ids.get(slot)
                if ids is not None:
                    hit[row] = token_ids[row] in ids
        rows: list[int] = np.flatnonzero(hit & (self.num_tokens[slots] > self.min_tokens[slots])).tolist()
        return rows
