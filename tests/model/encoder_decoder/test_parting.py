"""Steps of sequences that begin with a source, told apart."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncengine.model.encoder_decoder.parting import filled, of_sources, of_text, of_writing
from asyncengine.step.batch import NO_PAIRS, StepBatch

PAGE = 4


def batch(rows: list[tuple[int, int, int]]) -> StepBatch:
    """A step of rows with so many tokens before, so many now and a source of so many; those of one token decode if they
    are the first.
    """
    counts = np.array([count for _, count, _ in rows])
    context = np.array([before for before, _, _ in rows], dtype=np.int32)
    sources = np.array([source for _, _, source in rows], dtype=np.int32)
    places = np.array([filled(source, PAGE) for source in sources.tolist()])
    starts = np.append(0, np.cumsum(counts)).astype(np.int32)
    positions = np.concatenate([np.arange(before, before + count) for before, count, _ in rows])
    row_of = np.repeat(np.arange(len(rows)), counts)
    blocks = -(-(context + counts).max() // PAGE)
    tables = 100 * np.arange(len(rows))[:, None] + np.arange(blocks)
    last = starts[1:] - 1
    drawing = context + counts > places
    return StepBatch(
        token_ids=(1000 * row_of + positions).astype(np.int32),
        positions=positions.astype(np.int32),
        query_start=starts,
        context_lens=context,
        block_tables=tables.astype(np.int32),
        slot_mapping=tables[row_of, positions // PAGE] * PAGE + positions % PAGE,
        sample_index=last[drawing].astype(np.int64),
        sample_slots=np.arange(len(rows))[drawing],
        sample_positions=np.zeros(int(drawing.sum()), np.int64),
        copies=NO_PAIRS,
        num_decodes=sum(count == 1 and before > place for (before, count, _), place in zip(rows, places, strict=True)),
        sources=sources,
    )


ROW = st.tuples(st.integers(0, 21), st.integers(1, 18), st.integers(1, 13))


@given(st.lists(ROW, min_size=1, max_size=6))
def test_each_token_is_where_it_was(rows: list[tuple[int, int, int]]) -> None:
    whole = batch(rows)
    text, sources = of_text(whole, PAGE), of_sources(whole, PAGE)
    first = [filled(source, PAGE) for _, _, source in rows]
    own = [
        (row, position)
        for row, (before, count, _) in enumerate(rows)
        for position in range(before, before + count)
        if position >= first[row]
    ]
    if not own:
        assert text is None and sources is None
        return
    assert text is not None and sources is not None
    assert text.token_ids.tolist() == [1000 * row + position for row, position in own]
    assert text.positions.tolist() == [position - first[row] for row, position in own]
    assert text.positions.dtype == np.int32 and text.sources is None
    owners = sorted({row for row, _ in own})
    assert np.diff(text.query_start).tolist() == [sum(of == row for of, _ in own) for row in owners]
    ranges = zip(owners, itertools.pairwise(text.query_start.tolist()), strict=True)
    for at, (row, (start, end)) in enumerate(ranges):
        assert text.context_lens[at] == text.positions[start]
        for token in range(start, end):
            position = int(text.positions[token])
            assert text.block_tables[at, position // PAGE] == 100 * row + (position + first[row]) // PAGE
            slot = text.block_tables[at, position // PAGE] * PAGE + position % PAGE
            assert text.slot_mapping[token] == slot
    assert text.token_ids[text.sample_index].tolist() == whole.token_ids[whole.sample_index].tolist()
    assert sources.slot_mapping.tolist() == [-1] * len(own)
    assert sources.context_lens.tolist() == [rows[row][2] - 1 for row, _ in own]
    for at, (row, _) in enumerate(own):
        blocks = first[row] // PAGE
        assert sources.block_tables[at, :blocks].tolist() == [100 * row + block for block in range(blocks)]


def test_drafts_stay_with_their_rows() -> None:
    whole = dataclasses.replace(batch([(15, 3, 10), (20, 2, 3)]), draft_lengths=np.array([2, 1]), num_decodes=2)
    text = of_text(whole, PAGE)
    assert text is not None and text.query_start.tolist() == [0, 3, 5] and text.num_decodes == 2


def test_what_is_written_attends_to_its_own_block() -> None:
    written = of_writing(np.array([5, 6, 40]), PAGE)
    assert written.slot_mapping.tolist() == [5, 6, 40]
    assert written.block_tables.tolist() == [[1], [1], [10]] and written.context_lens.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("tokens", "page", "places"), [(1500, 16, 1504), (1500, 32, 1504), (1500, 4, 1500), (10, 16, 16), (1, 4, 4)]
)
def test_a_source_ends_where_a_block_does(tokens: int, page: int, places: int) -> None:
    assert filled(tokens, page) == places


def test_what_tokens_attend_to_is_wanted_of_the_same_ones() -> None:
    spans = np.array([[12, 15, 7], [19, 20, 9]])
    whole = dataclasses.replace(batch([(0, 15, 10), (0, 5, 3), (4, 3, 4)]), attention_spans=spans)
    text = of_text(whole, PAGE)
    assert text is not None and text.attention_spans is not None and text.attention_spans[:, 2].tolist() == [7, 9]
    for (first, end, _), (own_first, own_end, _) in zip(spans, text.attention_spans, strict=True):
        assert text.token_ids[own_first:own_end].tolist() == whole.token_ids[first:end].tolist()
