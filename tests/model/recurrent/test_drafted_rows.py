"""Which tokens make a wave, and which states are gone on from once it is known how many tokens count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from asyncengine.model.recurrent.drafted_rows import DraftedRows
from asyncengine.step.batch import NO_INDEX, NO_PAIRS, StepBatch

FIRST = 10
"""The first place where states are set aside."""
NOWHERE = 99
SAVES = [(0, 1, 20), (1, 2, 21), (1, 4, 22), (2, 1, 23)]


def drafted(lengths: Sequence[int] = (1, 3, 0), slots: Sequence[int] = (7, 8, 9)) -> DraftedRows:
    """Rows that decode with so many drafts each."""
    query_start = np.cumsum([0, *(length + 1 for length in lengths)]).astype(np.int32)
    zeros = np.zeros(query_start[-1], dtype=np.int32)
    batch = StepBatch(
        token_ids=zeros,
        positions=zeros,
        query_start=query_start,
        context_lens=np.zeros(len(lengths), dtype=np.int32),
        block_tables=np.zeros((len(lengths), 1), dtype=np.int32),
        slot_mapping=zeros.astype(np.int64),
        sample_index=NO_INDEX,
        sample_slots=NO_INDEX,
        sample_positions=NO_INDEX,
        copies=NO_PAIRS,
        num_decodes=len(lengths),
        draft_lengths=np.array(lengths, dtype=np.int64),
        slots=np.array(slots, dtype=np.int64),
        state_saves=np.array(SAVES, dtype=np.int64),
    )
    return DraftedRows(batch, FIRST, NOWHERE, torch.device("cpu"))


def test_waves_are_of_those_that_have_one_more_token() -> None:
    rows = drafted()
    assert [(wave.count, wave.tokens.tolist(), wave.aside) for wave in rows.waves] == [
        (3, [2, 0, 6], (10, 12)), (2, [3, 1], (12, 13)), (1, [4], (13, 14)), (1, [5], (14, 14)),
    ]  # fmt: skip
    assert rows.places.tolist() == [8, 7, 9] and rows.alike is None
    assert rows.back.tolist() == [1, 4, 0, 3, 5, 6, 2]
    waves = torch.cat([wave.tokens for wave in rows.waves])
    assert waves[rows.back].tolist() == list(range(7))


def test_states_go_from_wave_to_wave_by_where_they_are_set_aside_and_end_in_their_own_places() -> None:
    moves = [
        (wave.places.sources.tolist(), wave.places.targets.tolist(), wave.places.nowhere) for wave in drafted().waves
    ]
    assert moves == [
        ([8, 7, 9], [10, 11, 9], NOWHERE), ([10, 11], [12, 7], NOWHERE), ([12], [13], NOWHERE), ([13], [8], NOWHERE),
    ]  # fmt: skip


def test_places_that_follow_one_another_are_a_range() -> None:
    assert drafted((3, 1, 0), (4, 5, 6)).alike == (4, 7)


@pytest.mark.parametrize(
    ("taken", "saved", "taken_back"),
    [
        ((1, 2, 1), [(11, 20), (12, 21), (9, 23)], [(11, 7), (12, 8)]),
        ((2, 4, 1), [(11, 20), (12, 21), (8, 22), (9, 23)], []),
        ((2, 3, 1), [(11, 20), (12, 21), (9, 23)], [(13, 8)]),
        ((1, 1, 1), [(11, 20), (9, 23)], [(11, 7), (10, 8)]),
        ((0, 0, 0), [], []),
    ],
)
def test_states_are_those_behind_the_last_token_that_counts(
    taken: tuple[int, ...], saved: list[tuple[int, int]], taken_back: list[tuple[int, int]]
) -> None:
    """Kept ones first: a state that is kept may be where its row's own is."""
    assert drafted().taken(np.array(taken, dtype=np.int64)) == saved + taken_back
