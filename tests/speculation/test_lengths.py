"""How many tokens are drafted: by load, by what was kept, and not at all where it does not pay."""

from __future__ import annotations

import numpy as np

from asyncengine.speculation.lengths import LONGEST, PROBE_EVERY, DraftLengths

SLOTS = np.arange(4, dtype=np.int64)


def adaptive(draft_cost: float = 0.0) -> DraftLengths:
    return DraftLengths(64, 0, 8.0, draft_cost)


def test_a_fixed_length_is_that_whatever_the_load() -> None:
    assert DraftLengths(64, 5, 8.0).wanted(SLOTS, 10_000).tolist() == [5] * 4


def test_drafts_that_are_kept_grow_and_those_that_are_not_vanish() -> None:
    lengths = adaptive()
    before = lengths.wanted(SLOTS, 4).tolist()
    for _ in range(20):
        lengths.learn(0, 4, 4)
        lengths.learn(1, 4, 0)
    assert len(set(before)) == 1 and before[0] >= 1
    assert lengths.wanted(SLOTS, 4).tolist() == [LONGEST, 0, *before[2:]]
    lengths.place(1)
    assert lengths.wanted(SLOTS, 4).tolist()[1] == before[1]


def test_the_more_tokens_a_step_has_the_shorter_the_drafts_down_to_none() -> None:
    found = []
    for tokens in (1, 4, 8, 16, 64, 256, 100_000):
        found.append(int(adaptive().wanted(SLOTS[:1], tokens)[0]))
    assert found == sorted(found, reverse=True)
    assert found[0] > 1
    assert found[-3:] == [0, 0, 0]


def test_a_costly_drafter_drafts_less() -> None:
    assert adaptive(0.3).wanted(SLOTS, 1)[0] < adaptive(0.05).wanted(SLOTS, 1)[0]
    assert not adaptive(1.0).wanted(SLOTS, 1).any()


def test_what_was_given_up_is_tried_again_now_and_then() -> None:
    lengths = adaptive()
    for _ in range(50):
        lengths.learn(0, 1, 0)
    tried = [int(lengths.wanted(SLOTS[:1], 1)[0]) for _ in range(2 * PROBE_EVERY)]
    assert sum(tried) == 2
    assert max(tried) == 1


def test_acceptance_is_measured_per_draft_that_was_looked_at() -> None:
    lengths = adaptive()
    for _ in range(100):
        lengths.learn(0, 4, 1)  # one kept, one looked at and not kept, two never looked at
    assert abs(float(lengths.acceptance(SLOTS[:1])[0]) - 0.5) < 0.05


def test_what_was_learnt_goes_along_to_another_slot() -> None:
    lengths = adaptive()
    for _ in range(20):
        lengths.learn(0, 4, 0)
    lengths.place(2, lengths.learnt(0))
    assert lengths.acceptance(SLOTS)[2] == lengths.acceptance(SLOTS)[0] < lengths.acceptance(SLOTS)[1]
    assert lengths.wanted(SLOTS, 4).tolist()[2] == 0
