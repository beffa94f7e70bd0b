"""Pieces of a long audio, whichever way it comes in blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine.model.speech.cutting import pieces

RATE, MOST = 100, 300


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=6), st.integers(0, 99))
def test_blocks_make_no_difference(sizes: list[int], seed: int) -> None:
    samples = np.random.default_rng(seed).uniform(-1, 1, sum(sizes)).astype(np.float32)
    blocks = np.split(samples, np.cumsum(sizes)[:-1])
    found, whole = (list(pieces(each, MOST, RATE)) for each in (blocks, [samples]))
    assert [start for start, _ in found] == [start for start, _ in whole]
    assert np.array_equal(np.concatenate([piece for _, piece in found]), samples)
    for (start, piece), (_, other) in zip(found, whole, strict=True):
        assert np.array_equal(piece, other) and np.array_equal(piece, samples[start : start + len(piece)])
        assert len(piece) <= MOST


def test_it_is_cut_where_it_is_quietest() -> None:
    samples = np.full(500, 0.5, np.float32)
    samples[220:230] = 0.1
    samples[100:120] = 0  # too early: 150 samples are looked at, half of a piece
    assert [start for start, _ in pieces([samples], MOST, RATE)] == [0, 225]


@pytest.mark.parametrize("size", [1, 299, 300])
def test_what_is_heard_at_once_is_not_cut(size: int) -> None:
    [(start, piece)] = pieces([np.ones(size, np.float32)], MOST, RATE)
    assert (start, len(piece)) == (0, size)
