"""The sequences that decode, as columns of their own for as long as they stay the same. Owned by the step thread."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from asyncengine.step.batch import NO_INDEX, NO_PAIRS, Int32, Int64, StepBatch
from asyncengine.step.pieces import Pieces
from asyncengine.step.sequence import EMPTY, Sequence
from asyncengine.step.slots import SlotTable

_CONTEXT, _PLACE, _MAPPING, _GENERATED = range(4)


class DecodeRows:
    """What the next decode step takes of its rows.

    It is looked up in the slot table once, when the set of sequences changes. After that a step moves every column on
    by one, so that a step of the same sequences costs a handful of operations on short arrays; only rows whose next
    token begins a block are looked up again.

    Arrays that were given out in a batch are never written to, but for entries of block tables past a row's end.

    Args:
        sequences: Those that decode, in the order of their rows.
        slots: The table; whoever changes it otherwise than by what is here makes new rows.

    Attributes:
        sequences: As given.
        slots: (rows,) theirs.
        bound: Whether a step must be through before the next one can be scheduled.
        steps_left: Steps that may be launched before one of them has all its tokens.
        in_flight: Steps of these rows that were launched and are not settled.
    """

    __slots__ = (
        "_all_unknown", "_block_begins", "_columns", "_counting", "_of_columns", "_page_size", "_positions",
        "_query_start", "_rows", "_steps_in_blocks", "_table", "_tables", "bound", "in_flight", "sequences", "slots",
        "steps_left",
    )  # fmt: skip

    def __init__(self, sequences: list[Sequence], slots: SlotTable) -> None:
        self.sequences = sequences
        self.slots: Int64 = np.array([sequence.slot for sequence in sequences], dtype=np.int64)
        self.bound = bool(slots.bound[self.slots].any())
        self.in_flight = 0
        self._table = slots
        self._page_size = slots.page_size
        rows, count = self.slots, len(sequences)
        context = slots.num_computed[rows]
        self.steps_left = int((slots.max_tokens[rows] - context).min(initial=1 << 30)) - 1
        place = rows * slots.tokens.shape[1] + context
        self._columns = np.stack([context, place, place, context + 1 - slots.prompt_tokens[rows]])
        self._rows, self._of_columns = Pieces(count), Pieces(self._columns.size)
        self._positions: Int32 = context.astype(np.int32)
        self._counting = np.arange(count, dtype=np.int64)
        self._query_start = np.arange(count + 1, dtype=np.int32)
        self._all_unknown: NDArray[np.bool_] = np.ones(count, dtype=np.bool_)
        self._block_begins = context  # the position at which a row's next block begins; at first, all are looked up
        self._steps_in_blocks = 0  # before one of them has to be looked up again
        self._tables: Int32 = np.empty((count, 0), dtype=np.int32)

    @property
    def placed(self) -> bool:
        """Whether it is known where the keys and values of every row's next token go."""
        return self._steps_in_blocks > 0

    def lacking(self) -> Int64:
        """The slots of those rows whose next token has no block yet."""
        slots, context = self._table, self._columns[_CONTEXT]
        entering = context >= self._block_begins
        rows, context = self.slots[entering], context[entering]
        lacking: Int64 = rows[slots.num_blocks[rows] * self._page_size <= context]
        return lacking

    def place(self) -> None:
        """Looks up the blocks of rows whose next token begins one; they have it by now."""
        slots, page_size, context = self._table, self._page_size, self._columns[_CONTEXT]
        entering = np.flatnonzero(context >= self._block_begins)
        rows, entered = self.slots[entering], context[entering]
        logical = entered // page_size
        physical = slots.blocks[rows, logical]
        begins = logical * page_size
        self._columns[_MAPPING, entering] = physical.astype(np.int64) * page_size + (entered - begins)
        if len(entering) == len(context):
            self._block_begins = begins + page_size
        else:
            self._block_begins[entering] = begins + page_size
        if int(logical.max()) < self._tables.shape[1]:
            self._tables[entering, logical] = physical
        else:
            self._tables = slots.blocks[self.slots, : slots.num_blocks[self.slots].max()]
        self._steps_in_blocks = int((self._block_begins - context).min())

    def batch(self, copies: Int64, ahead: bool) -> StepBatch:
        """The step in which each of them decodes one token; they are placed.

        Args:
            copies: (C, 2) blocks to copy first.
            ahead: Whether the step before is still computed.
        """
        _, place, mapping, generated = self._columns
        return StepBatch(
            token_ids=self._rows.take(self._table.flat_tokens, place),
            positions=self._positions,
            query_start=self._query_start,
            context_lens=self._positions,
            block_tables=self._tables,
            slot_mapping=mapping,
            sample_index=self._counting,
            sample_slots=self.slots,
            sample_positions=generated,
            copies=copies,
            num_decodes=len(self.sequences),
            score_index=NO_INDEX,
            score_token_ids=EMPTY,
            score_tops=NO_INDEX,
            pool_spans=NO_PAIRS,
            unknown=self.unknown() if ahead else None,
        )

    def unknown(self) -> NDArray[np.bool_] | None:
        """Which rows' input tokens are still being drawn; None if none is."""
        if self.in_flight:
            return self._all_unknown
        unknown = self._columns[_CONTEXT] >= self._table.num_tokens[self.slots]
        return unknown if unknown.any() else None

    def advance(self) -> None:
        """Notes that a step with all of them was launched."""
        self._columns = columns = self._of_columns.plus_one(self._columns.reshape(-1)).reshape(self._columns.shape)
        self._positions = self._rows.plus_one(self._positions)
        self._rows.put(self._table.num_computed, self.slots, columns[_CONTEXT])
        self._steps_in_blocks -= 1
        self.steps_left -= 1
        self.in_flight += 1

    def full(self) -> list[Sequence]:
        """Those of which the steps that were launched draw the last token."""
        if self.steps_left > 0:
            return []
        full = self._columns[_CONTEXT] + 1 >= self._table.max_tokens[self.slots]
        return [self.sequences[row] for row in np.flatnonzero(full).tolist()]
