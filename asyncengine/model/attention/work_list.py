"""What the Triton kernel is to do in one step: tiles of query tokens, and the splits of context each attends to.

Plain numpy, on the host, into one array of int32; how it reads is described at the top of `triton_kernels.py`. How the
work is shared out depends on the batch; what is computed does not, because every split is reduced by itself and splits
are folded in order, by whoever does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asyncengine.step.batch import Int32, Int64, StepBatch

SLOTS = 0
TABLES = 1
REACH = 2
LISTS = 4
"""The header's first work list; LIST numbers each: items, where they are, merges, where they are."""
LIST = 4
ITEM = 8
MERGE = 4


_NO_ITEMS = np.zeros((0, ITEM), np.int64)
_NO_MERGES = np.zeros((0, MERGE), np.int64)
_NO_REACH = np.zeros(0, np.int32)
_SHARED = 3
"""Sections before those of the work lists."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How the layers of one kind are cut into tiles and splits.

    Attributes:
        group: Query heads that share a KV head.
        ways: KV heads; each attends apart, and so adds to what can run side by side.
        short_rows: Rows of a tile for rows with few query tokens, of which none looks ahead, and
        long_rows: for all others. A row is a pair of a token and a head.
        split: Keys of a split.
        window: The layer's sliding window, or None.
        looks_ahead: Whether tokens see as far as `StepBatch.reach`.
    """

    group: int
    ways: int
    short_rows: int
    long_rows: int
    split: int
    window: int | None
    looks_ahead: bool = False

    def tokens(self, rows: int) -> int:
        """Query tokens of a tile."""
        return rows // min(self.group, rows)

    def side_by_side(self, rows: int) -> int:
        """How many programs take one item."""
        heads = min(self.group, rows)
        return self.ways * -(-self.group // heads)


@dataclass(frozen=True, slots=True)
class WorkLists:
    """A step's plan in numbers.

    Attributes:
        values: All of it, the header first.
        items: For each work list, how many items it has.
        merges: For each work list, how many merges.
        parts: How many rows of `parts` the largest list writes.
    """

    values: Int32
    items: tuple[int, ...]
    merges: tuple[int, ...]
    parts: int


@dataclass(slots=True)
class _Tiles:
    """Columns of equal length: one entry is a tile."""

    token: Int64
    tokens: Int64
    position: Int64
    table: Int64
    split: Int64
    end: Int64


def work_lists(batch: StepBatch, page_size: int, cuts: Sequence[Cut], programs: int, max_parts: int) -> WorkLists:
    """Makes the work lists of one step: for every cut a short and a long one.

    Args:
        batch: The step. Tokens beyond its last row pad it: their slots must be -1 and their output is zero.
        page_size: Tokens to a block.
        cuts: Of the model's layers.
        programs: How many programs run side by side; rows are shared out among them where there are too few.
        max_parts: How many rows of `parts` there are. Where they are used up, rows are not shared out.
    """
    queries = np.diff(batch.query_start).astype(np.int64)
    lengths = batch.context_lens.astype(np.int64) + queries
    blocks = np.where(queries > 0, -(-lengths // page_size), 0)
    width = int(blocks.max(initial=0))
    tables = batch.block_tables[:, :width][np.arange(width) < blocks[:, None]]
    table = np.cumsum(blocks) - blocks
    # Padding is a row without context, which attends to nothing.
    padding = len(batch.slot_mapping) - int(batch.query_start[-1])

    reach = _NO_REACH if batch.reach is None else batch.reach
    sections: list[np.ndarray[tuple[int, ...], np.dtype[np.integer]]] = [batch.slot_mapping, tables, reach]
    items, merges, parts = [], [], 0
    for cut in cuts:
        size = cut.tokens(cut.short_rows)
        is_short = queries <= size
        if cut.looks_ahead and batch.reach is not None:
            is_short &= ~_looking_ahead(batch)
        short = np.flatnonzero((queries > 0) & is_short)
        long = np.flatnonzero((queries > 0) & ~is_short)
        for rows, chosen in ((cut.short_rows, short), (cut.long_rows, long)):
            work, merge, used = _NO_ITEMS, _NO_MERGES, 0
            if len(chosen):
                tiles = _tiles(batch, queries, table, chosen, cut, rows)
                work, merge, used = _share_out(tiles, programs // cut.side_by_side(rows), max_parts)
            if padding and rows == cut.short_rows:
                work = np.concatenate((work, _padding(batch, padding, cut.tokens(rows))))
            sections += [work.ravel(), merge.ravel()]
            items.append(len(work))
            merges.append(len(merge))
            parts = max(parts, used)

    header = LISTS + LIST * len(items)
    starts = header + np.cumsum([0, *map(len, sections)])
    values = np.empty(int(starts[-1]), np.int32)
    values[:header] = 0
    values[SLOTS], values[TABLES], values[REACH] = starts[:_SHARED]
    for i, (count, merging) in enumerate(zip(items, merges, strict=True)):
        at = LISTS + LIST * i
        values[at : at + LIST] = count, starts[_SHARED + 2 * i], merging, starts[_SHARED + 1 + 2 * i]
    for start, section in zip(starts.tolist(), sections, strict=False):
        values[start : start + len(section)] = section
    return WorkLists(values, tuple(items), tuple(merges), parts)


def _tiles(batch: StepBatch, queries: Int64, table: Int64, rows: Int64, cut: Cut, tile_rows: int) -> _Tiles:
    """Cuts the query tokens of some rows into tiles."""
    size = cut.tokens(tile_rows)
    row, tokens, offset = rows, queries[rows], np.zeros(1, np.int64)
    if int(tokens.max()) > size:
        counts = -(-tokens // size)
        row = np.repeat(rows, counts)
        offset = _within(counts) * size
        tokens = np.minimum(queries[row] - offset, size)
    position = batch.context_lens[row].astype(np.int64) + offset
    until = position + tokens
    if cut.looks_ahead and batch.reach is not None:
        until = batch.reach[batch.query_start[row] + offset + tokens - 1].astype(np.int64)
    first_seen = np.zeros_like(position) if cut.window is None else np.maximum(position - cut.window + 1, 0)
    return _Tiles(
        token=batch.query_start[row].astype(np.int64) + offset,
        tokens=tokens,
        position=position,
        table=table[row],
        split=first_seen // cut.split,
        end=(until - 1) // cut.split + 1,
    )


def _looking_ahead(batch: StepBatch) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Which rows have a token that reaches beyond itself: they are long, so that short ones are attended to as ever."""
    assert batch.reach is not None
    queries = np.diff(batch.query_start)
    row = np.repeat(np.arange(len(queries)), queries)
    beyond = batch.reach[: len(row)] > batch.context_lens[row] + _within(queries.astype(np.int64)) + 1
    return np.bincount(row[beyond], minlength=len(queries)) > 0


def _share_out(tiles: _Tiles, programs: int, max_parts: int) -> tuple[Int64, Int64, int]:
    """Makes items of tiles, several of a tile where there would be too few: (items, merges, rows of parts)."""
    splits = tiles.end - tiles.split
    # Splits that each program would do if they were shared out evenly. Nobody gets more than that, if it can be had.
    fair = max(1, -(-int(splits.sum()) // max(1, programs)))
    items = np.zeros((len(splits), ITEM), np.int64)
    columns = (tiles.token, tiles.tokens, tiles.position, tiles.table, tiles.split, tiles.end)
    for column, values in enumerate(columns):
        items[:, column] = values
    items[:, 6] = -1
    merges, used = _NO_MERGES, 0
    if int(splits.max()) > fair:
        items, merges, used = _split_up(items, splits, fair, max_parts)
    # The longest come first, so that all programs end together.
    return items[np.argsort(items[:, 4] - items[:, 5], kind="stable")], merges, used


def _split_up(whole: Int64, splits: Int64, fair: int, max_parts: int) -> tuple[Int64, Int64, int]:
    """Makes several items of those with more than `fair` splits, the longest first if there is not room for all."""
    pieces = -(-splits // fair)
    rows = np.where(pieces > 1, splits * whole[:, 1], 0)
    order = np.argsort(-splits, kind="stable")
    fits = np.empty(len(splits), np.bool_)
    fits[order] = np.cumsum(rows[order]) <= max_parts
    pieces, rows = np.where(fits, pieces, 1), np.where(fits, rows, 0)
    first_part = np.cumsum(rows) - rows

    item = np.repeat(np.arange(len(splits)), pieces)
    items = whole[item]
    size = (-(-splits // pieces))[item]
    done = _within(pieces) * size
    items[:, 4] += done
    items[:, 5] = np.minimum(items[:, 4] + size, items[:, 5])
    items[:, 6] = np.where((pieces > 1)[item], first_part[item] + done * items[:, 1], -1)
    items = items[items[:, 5] > items[:, 4]]  # the last may be empty, because the sizes were rounded up

    shared = np.flatnonzero(pieces > 1)
    tokens = whole[shared, 1]
    item, in_tile = np.repeat(shared, tokens), _within(tokens)
    merges = np.stack((whole[item, 0] + in_tile, first_part[item] + in_tile, whole[item, 1], splits[item]), axis=1)
    return items, merges, int(rows.sum())


def _within(counts: Int64) -> Int64:
    """0, 1, .. counts[0] - 1, 0, 1, .. counts[1] - 1, and so on."""
    ends = np.cumsum(counts)
    within: Int64 = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
    return within


def _padding(batch: StepBatch, padding: int, size: int) -> Int64:
    """Items that attend to nothing, for the tokens that pad the batch."""
    items = np.zeros((-(-padding // size), ITEM), np.int64)
    offset = np.arange(len(items)) * size
    items[:, 0] = batch.query_start[-1] + offset
    items[:, 1] = np.minimum(padding - offset, size)
    items[:, 6] = -1
    return items
