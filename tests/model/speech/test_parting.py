"""Steps of sequences that begin with an audio, told apart."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncengine.model.speech.parting import Places, of_audio, of_text, of_writing
from asyncengine.step.batch import NO_PAIRS, StepBatch

PAGE = 4
PLACES = Places.of(10, PAGE)


def batch(rows: list[tuple[int, int]]) -> StepBatch:
    """A step of rows with so many tokens before and so many now; those of one token decode if they are the first."""
    counts = np.array([count for _, count in rows])
    context = np.array([before for before, _ in rows], dtype=np.int32)
    starts = np.append(0, np.cumsum(counts)).astype(np.int32)
    positions = np.concatenate([np.arange(before, before + count) for before, count in rows])
    row_of = np.repeat(np.arange(len(rows)), counts)
    blocks = -(-(context + counts).max() // PAGE)
    tables = 100 * np.arange(len(rows))[:, None] + np.arange(blocks)
    last = starts[1:] - 1
    drawing = context + counts > PLACES.count
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
        num_decodes=sum(count == 1 and before > PLACES.count for before, count in rows),
    )


ROW = st.tuples(st.integers(0, PLACES.count + 9), st.integers(1, PLACES.count + 6))


@given(st.lists(ROW, min_size=1, max_size=6))
def test_each_token_is_where_it_was(rows: list[tuple[int, int]]) -> None:
    whole = batch(rows)
    text, audio = of_text(whole, PLACES), of_audio(whole, PLACES)
    own = [
        (row, position)
        for row, (before, count) in enumerate(rows)
        for position in range(before, before + count)
        if position >= PLACES.count
    ]
    if not own:
        assert text is None and audio is None
        return
    assert text is not None and audio is not None
    assert text.token_ids.tolist() == [1000 * row + position for row, position in own]
    assert text.positions.tolist() == [position - PLACES.count for _, position in own]
    assert np.diff(text.query_start).tolist() == [
        sum(of == row for of, _ in own) for row in sorted({row for row, _ in own})
    ]
    ranges = zip(sorted({row for row, _ in own}), itertools.pairwise(text.query_start.tolist()), strict=True)
    for at, (row, (start, end)) in enumerate(ranges):
        assert text.context_lens[at] == text.positions[start]
        for token in range(start, end):
            position = int(text.positions[token])
            assert text.block_tables[at, position // PAGE] == 100 * row + (position + PLACES.count) // PAGE
            slot = text.block_tables[at, position // PAGE] * PAGE + position % PAGE
            assert text.slot_mapping[token] == slot
    assert text.token_ids[text.sample_index].tolist() == whole.token_ids[whole.sample_index].tolist()
    assert audio.slot_mapping.tolist() == [-1] * len(own)
    assert (audio.context_lens == PLACES.heard - 1).all()
    assert audio.block_tables.tolist() == [[100 * row + block for block in range(PLACES.blocks)] for row, _ in own]


def test_what_tokens_attend_to_is_wanted_of_the_same_ones() -> None:
    spans = np.array([[20, 23, 7], [27, 28, 9]])
    whole = dataclasses.replace(batch([(0, 15), (10, 8), (13, 6)]), attention_spans=spans)
    text = of_text(whole, PLACES)
    assert text is not None and text.attention_spans is not None and text.attention_spans[:, 2].tolist() == [7, 9]
    for (first, end, _), (own_first, own_end, _) in zip(spans, text.attention_spans, strict=True):
        assert text.token_ids[own_first:own_end].tolist() == whole.token_ids[first:end].tolist()


def test_drafts_stay_with_their_rows() -> None:
    whole = dataclasses.replace(batch([(15, 3), (20, 2)]), draft_lengths=np.array([2, 1]), num_decodes=2)
    text = of_text(whole, PLACES)
    assert text is not None and text.query_start.tolist() == [0, 3, 5] and text.num_decodes == 2


def test_what_is_written_attends_to_its_own_block() -> None:
    written = of_writing(np.array([5, 6, 40]), PAGE)
    assert written.slot_mapping.tolist() == [5, 6, 40]
    assert written.block_tables.tolist() == [[1], [1], [10]] and written.context_lens.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("frames", "page", "count"), [(1500, 16, 1504), (1500, 32, 1504), (1500, 4, 1500), (10, 16, 16)]
)
def test_an_audio_ends_where_a_block_does(frames: int, page: int, count: int) -> None:
    places = Places.of(frames, page)
    assert (places.heard, places.count) == (frames, count)
