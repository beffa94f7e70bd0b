"""The host's side of the Triton kernel: every visible key is attended to once, whatever the batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from attention_case import step_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine.model.attention.triton import parts_bytes_of
from asyncengine.model.attention.work_list import (
    ITEM,
    LIST,
    LISTS,
    MERGE,
    SLOTS,
    TABLES,
    Cut,
    WorkLists,
    work_lists,
)
from asyncengine.step.batch import StepBatch

PLAIN = Cut(group=4, ways=2, short_rows=16, long_rows=64, split=256, window=None)


def batch_of(new: list[int], contexts: list[int], page_size: int = 16) -> StepBatch:
    first, tables = 0, []
    for context, count in zip(contexts, new, strict=True):
        blocks = -(-(context + count) // page_size)
        tables.append(list(range(first, first + blocks)))
        first += blocks
    return step_batch(new, contexts, tables, page_size)


def items_of(lists: WorkLists, index: int) -> np.ndarray:
    count, start = lists.values[LISTS + LIST * index : LISTS + LIST * index + 2].tolist()
    return lists.values[start : start + count * ITEM].reshape(count, ITEM)


def merges_of(lists: WorkLists, index: int) -> np.ndarray:
    count, start = lists.values[LISTS + LIST * index + 2 : LISTS + LIST * index + 4].tolist()
    return lists.values[start : start + count * MERGE].reshape(count, MERGE)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2000), st.sampled_from([0, 1, 2, 4, 5, 16, 17, 100, 300])), min_size=1),
    cut=st.builds(
        Cut,
        group=st.integers(1, 70),
        ways=st.integers(1, 8),
        short_rows=st.just(16),
        long_rows=st.sampled_from([16, 32, 64]),
        split=st.sampled_from([64, 256]),
        window=st.none() | st.integers(1, 500),
    ),
    programs=st.integers(1, 500),
    max_parts=st.sampled_from([0, 10, 500, 100_000]),
    page_size=st.sampled_from([1, 16, 17]),
    padding=st.integers(0, 20),
)
def test_every_split_of_every_token_is_done_once_and_merged_in_order(
    rows: list[tuple[int, int]], cut: Cut, programs: int, max_parts: int, page_size: int, padding: int
) -> None:
    batch = batch_of([new for _, new in rows], [context for context, _ in rows], page_size)
    tokens = int(batch.query_start[-1])
    slots = np.concatenate((batch.slot_mapping, np.full(padding, -1)))
    lists = work_lists(dataclasses.replace(batch, slot_mapping=slots), page_size, [cut], programs, max_parts)
    assert lists.parts <= max_parts
    tables = lists.values[lists.values[TABLES] :]
    assert (lists.values[lists.values[SLOTS] :][: len(slots)] == slots).all()

    done: dict[int, dict[int, int]] = {}  # token -> split -> row of parts, or -1
    row_of = np.repeat(np.arange(len(rows)), np.diff(batch.query_start))
    for index, tile_rows in ((0, cut.short_rows), (1, cut.long_rows)):
        assert lists.items[index] == len(items_of(lists, index))
        for token, count, position, table, split, end, part, _ in items_of(lists, index).tolist():
            assert 1 <= count <= cut.tokens(tile_rows)
            if token >= tokens:
                assert split == end and part == -1
            else:
                row = row_of[token]
                length = rows[row][0] + rows[row][1]
                blocks = -(-length // page_size)
                assert position == batch.positions[token]
                assert (tables[table : table + blocks] == batch.block_tables[row, :blocks]).all()
            assert part < max(1, max_parts)
            for i in range(count):
                splits = done.setdefault(token + i, {})
                for s in range(split, end):
                    assert s not in splits
                    splits[s] = -1 if part < 0 else part + (s - split) * count + i
    assert sorted(done) == list(range(tokens + padding))

    merged = {}
    for index in (0, 1):
        for token, part, stride, count in merges_of(lists, index).tolist():
            merged[token] = [part + i * stride for i in range(count)]
            assert merged[token][-1] < max_parts
    for token in range(tokens):
        splits = done[token]
        position = int(batch.positions[token])
        first = 0 if cut.window is None else max(0, position - cut.window + 1)
        assert set(range(first // cut.split, position // cut.split + 1)) <= set(splits)
        parts_of_token = [splits[s] for s in sorted(splits)]
        if -1 in parts_of_token:
            assert set(parts_of_token) == {-1}
            assert token not in merged
        else:
            assert merged[token] == parts_of_token


def test_a_full_batch_is_not_shared_out_and_a_single_row_is() -> None:
    full = work_lists(batch_of([1] * 256, [1000] * 256), 16, [PLAIN], 264, 4096)
    assert full.items == (256, 0) and full.merges == (0, 0) and full.parts == 0
    single = work_lists(batch_of([1], [1000]), 16, [PLAIN], 264, 4096)
    assert single.items == (4, 0) and single.merges == (1, 0) and single.parts == 4


@pytest.mark.parametrize(("ways", "group"), [(8, 4), (4, 7), (2, 8), (1, 8)])
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize("context", [32_000, 131_000])
def test_few_long_rows_keep_a_whole_device_busy(ways: int, group: int, rows: int, context: int) -> None:
    """On an H200, and heads of 128: no program gets more than its fair share, rounded up to a split."""
    cut = dataclasses.replace(PLAIN, ways=ways, group=group)
    max_parts = parts_bytes_of(141 << 30) // (4 * ways * group * 128)
    lists = work_lists(batch_of([1] * rows, [context] * rows), 16, [cut], 264, max_parts)
    items = items_of(lists, 0)
    assert lists.parts == rows * (context // 256 + 1)
    fair = -(-rows * (context // 256 + 1) // (264 // ways))
    assert (items[:, 5] - items[:, 4]).max() <= fair


def test_long_work_comes_first() -> None:
    lists = work_lists(batch_of([1, 1, 1], [10, 5000, 600]), 16, [PLAIN], 1, 0)
    assert items_of(lists, 0)[:, 0].tolist() == [1, 2, 0]


def test_window_skips_what_no_token_sees() -> None:
    cut = dataclasses.replace(PLAIN, window=100)
    (item,) = items_of(work_lists(batch_of([1], [5000]), 16, [cut], 1, 0), 0).tolist()
    assert (item[4], item[5]) == (4901 // 256, 5000 // 256 + 1)


def test_decodes_are_short_and_prefills_long() -> None:
    lists = work_lists(batch_of([1, 4, 5], [9, 9, 9]), 16, [PLAIN], 1, 0)
    assert lists.items == (2, 1)


@pytest.mark.parametrize("cuts", [[], [PLAIN], [PLAIN, dataclasses.replace(PLAIN, window=9)]])
def test_a_step_without_tokens(cuts: list[Cut]) -> None:
    lists = work_lists(batch_of([0], [9]), 16, cuts, 100, 100)
    assert lists.items == (0, 0) * len(cuts)
