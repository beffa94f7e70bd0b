"""The sequences that decode, as columns of their own for as long as they stay the same. Owned by the step thread."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from asyncengine.step.batch import NO_INDEX, NO_PAIRS, NO_SAVES, NO_TOKENS, Int32, Int64, StepBatch
from asyncengine.step.pieces import Pieces
from asyncengine.step.plan import StateMoves
from asyncengine.step.sequence import Sequence
from asyncengine.step.slots import SlotTable

_PLACE, _MAPPING, _GENERATED = range(3)


class _Columns:
    """What a step takes of its rows, looked up in the slot table once and then moved on by one in each step.

    So a step of the same sequences costs a handful of operations on short arrays. Only rows whose next token begins a
    block are looked up again. Arrays that were given out in a batch are never written to, but for entries of block
    tables past a row's end.

    Attributes:
        context: (rows,) tokens in the KV cache.
        left: Steps before a row has to be looked up again; below zero where some went by with the rows beside others.
        pieces: For columns of the rows' length.
        unknown: (rows,) all true.
    """

    __slots__ = (
        "_adapters", "_begins", "_columns", "_counting", "_lengths", "_positions", "_query_start", "_slots", "_sources",
        "_table", "_tables", "context", "left", "pieces", "unknown",
    )  # fmt: skip

    def __init__(self, slots: Int64, table: SlotTable) -> None:
        self._slots, self._table = slots, table
        count = len(slots)
        self.context: Int64 = table.num_computed[slots]
        context = self.context
        place = slots * table.tokens.shape[1] + context
        self._columns = np.stack([place, place, context + 1 - table.prompt_tokens[slots]])
        self._lengths: Int32 = context.astype(np.int32)
        shifts = table.shifts_of(slots)
        self._positions = self._lengths if shifts is None else (context + shifts).astype(np.int32)
        self.pieces = Pieces(count)
        self._counting = np.arange(count, dtype=np.int64)
        self._query_start = np.arange(count + 1, dtype=np.int32)
        self._begins = context  # the position at which a row's next block begins; at first, all are looked up
        self._tables: Int32 = np.empty((count, 0), dtype=np.int32)
        self.unknown: NDArray[np.bool_] = np.ones(count, dtype=np.bool_)
        self._adapters = table.adapters_of(slots)
        self._sources = table.sources_of(slots)
        self.left = 0

    def look_up(self) -> None:
        """Looks up the blocks of rows whose next token begins one; they have it by now."""
        table, page_size, context = self._table, self._table.page_size, self.context
        entering = np.flatnonzero(context >= self._begins)
        slots, entered = self._slots[entering], context[entering]
        logical = entered // page_size
        physical = table.blocks[slots, logical]
        begins = logical * page_size
        self._columns[_MAPPING, entering] = physical.astype(np.int64) * page_size + (entered - begins)
        if len(entering) == len(context):
            self._begins = begins + page_size
        else:
            self._begins[entering] = begins + page_size
        if self.left == 0 and int(logical.max()) < self._tables.shape[1]:
            self._tables[entering, logical] = physical
        else:  # a row may have passed a whole block since
            self._tables = table.blocks[self._slots, : table.num_blocks[self._slots].max()]
        self.left = int((self._begins - context).min())

    def batch(self, copies: Int64, unknown: NDArray[np.bool_] | None, states: StateMoves | None) -> StepBatch:
        """The step in which each row decodes one token."""
        columns = self._columns
        return StepBatch(
            token_ids=self.pieces.take(self._table.flat_tokens, columns[_PLACE]),
            positions=self._positions,
            query_start=self._query_start,
            context_lens=self._lengths,
            block_tables=self._tables,
            slot_mapping=columns[_MAPPING],
            sample_index=self._counting,
            sample_slots=self._slots,
            sample_positions=columns[_GENERATED],
            copies=copies,
            num_decodes=len(self._slots),
            score_index=NO_INDEX,
            score_token_ids=NO_TOKENS,
            score_tops=NO_INDEX,
            pool_spans=NO_PAIRS,
            unknown=unknown,
            adapters=self._adapters,
            slots=None if states is None else self._slots,
            state_copies=NO_PAIRS if states is None else states.copies,
            state_saves=NO_SAVES if states is None else states.saves,
            sources=self._sources,
        )

    def move_on(self) -> None:
        """By one token."""
        pieces = self.pieces
        self._columns = pieces.plus_one(self._columns)
        shifted, self._lengths = self._positions is not self._lengths, pieces.plus_one(self._lengths)
        self._positions = pieces.plus_one(self._positions) if shifted else self._lengths
        self.context = pieces.plus_one(self.context)
        self.left -= 1


class DecodeRows:
    """The rows that decode.

    Args:
        sequences: Those that decode, in the order of their rows.
        table: Knows them; whoever changes it otherwise than by what is here makes new rows.

    Attributes:
        sequences: As given.
        slots: (rows,) theirs.
        bound: Whether a step must be through before the next one can be scheduled.
        searching: Whether any of them is a beam of a search.
        steps_left: Steps that may be launched before one of them has all its tokens.
        in_flight: Steps of these rows that were launched and are not settled.
    """

    __slots__ = ("_columns", "_table", "bound", "in_flight", "searching", "sequences", "slots", "steps_left")

    def __init__(self, sequences: list[Sequence], table: SlotTable) -> None:
        self.sequences = sequences
        self.slots: Int64 = np.array([sequence.slot for sequence in sequences], dtype=np.int64)
        self.bound = bool(np.count_nonzero(table.bound[self.slots]))
        self.searching = self.bound and bool(table.searching[self.slots].any())
        self.steps_left = int((table.max_tokens[self.slots] - table.num_computed[self.slots]).min(initial=1 << 30)) - 1
        self.in_flight = 0
        self._table = table
        self._columns: _Columns | None = None  # from the first step on in which they are alone

    @property
    def placed(self) -> bool:
        """Whether every row is known to have the block that its next token goes to."""
        return self._columns is not None and self._columns.left > 0

    def lacking(self) -> Int64:
        """The slots of those rows whose next token has no block yet."""
        context = self._table.num_computed[self.slots]
        lacking: Int64 = self.slots[context >= self._table.num_blocks[self.slots] * self._table.page_size]
        return lacking

    def completing(self) -> Int64:
        """The rows whose next token is the last one of its block."""
        columns = self._columns
        if columns is not None and columns.left > 1:
            return NO_INDEX
        page_size = self._table.page_size
        return np.flatnonzero(self._table.num_computed[self.slots] % page_size == page_size - 1)

    def batch(self, copies: Int64, ahead: bool, states: StateMoves | None = None) -> StepBatch:
        """The step in which each of them decodes one token; none is lacking a block.

        Args:
            copies: (C, 2) blocks to copy first.
            ahead: Whether the step before is still computed.
            states: What is done with states; None if the model keeps none.
        """
        columns = self._columns
        if columns is None:
            columns = self._columns = _Columns(self.slots, self._table)
        if columns.left <= 0:
            columns.look_up()
        unknown = None
        if ahead:
            unknown = columns.unknown if self.in_flight else self.unknown()
        return columns.batch(copies, unknown, states)

    def unknown(self) -> NDArray[np.bool_] | None:
        """(rows,) which rows' input tokens are still being drawn; None if none is."""
        unknown = self._table.num_computed[self.slots] >= self._table.num_tokens[self.slots]
        return unknown if unknown.any() else None

    def advance(self) -> None:
        """Notes that a step with all of them was launched."""
        self.steps_left -= 1
        self.in_flight += 1
        columns = self._columns
        if columns is None:
            self._table.num_computed[self.slots] += 1
        else:
            columns.move_on()
            columns.pieces.put(self._table.num_computed, self.slots, columns.context)

    def full(self) -> list[Sequence]:
        """Those of which the steps that were launched draw the last token."""
        if self.steps_left > 0:
            return []
        full = self._table.num_computed[self.slots] + 1 >= self._table.max_tokens[self.slots]
        return [self.sequences[row] for row in np.flatnonzero(full).tolist()]
