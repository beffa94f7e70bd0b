from __future__ import annotations

import numpy as np
import pytest

from asyncengine.step.slots import SlotTable

from .core_case import prompt_of


def table() -> SlotTable:
    return SlotTable(num_slots=3, max_length=10, page_size=4)


def test_slots_are_handed_out_once() -> None:
    slots = table()
    taken = [slots.take() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2] and slots.num_free == 0
    with pytest.raises(IndexError):
        slots.take()
    slots.give_back(taken[1])
    assert slots.take() == taken[1]


def test_a_slot_that_was_given_back_remembers_nothing() -> None:
    slots = table()
    slot = slots.take()
    slots.fill(slot, prompt_of("abcdef"), 6, 10, 6, tuple(range(20)))
    slots.append_blocks(slot, prompt_of([5, 6]))
    slots.num_computed[slot] = 6
    slots.give_back(slot)
    assert slot not in slots.more_stop_ids
    assert slots.take() == slot
    slots.fill(slot, prompt_of("xy"), 2, 10, 2, (7,))
    assert slots.known_tokens(slot).tolist() == list(b"xy")
    assert slots.block_table(slot).tolist() == []
    assert slots.num_computed[slot] == 0
    assert slots.stop_ids[slot].tolist() == [7] + [-1] * 7


def test_a_slot_that_is_filled_again_has_the_new_ones_limits() -> None:
    slots = table()
    slot = slots.take()
    slots.fill(slot, prompt_of("abc"), 3, 10, 6, (7, 8, 9), bound=True)
    slots.fill(slot, prompt_of("xy"), 2, 8, 2, (5,))
    assert slots.stop_ids[slot].tolist() == [5] + [-1] * 7
    assert not slots.bound[slot]
    assert (slots.prompt_tokens[slot], slots.max_tokens[slot], slots.min_tokens[slot]) == (2, 8, 2)


def test_tokens_and_blocks_are_appended() -> None:
    slots = table()
    a, b = slots.take(), slots.take()
    slots.fill(a, prompt_of([1, 2]), 2, 10, 2, ())
    slots.fill(b, prompt_of([3]), 1, 10, 1, ())
    slots.append_tokens(np.array([a, b]), prompt_of([8, 9]))
    slots.append_tokens(np.array([b]), prompt_of([7]))
    assert slots.known_tokens(a).tolist() == [1, 2, 8]
    assert slots.known_tokens(b).tolist() == [3, 9, 7]
    slots.append_blocks(a, prompt_of([4]))
    slots.append_blocks(a, prompt_of([2, 3]))
    assert slots.block_table(a).tolist() == [4, 2, 3]
    assert slots.block_table(b).tolist() == []


def stopped(slots: SlotTable, rows: np.ndarray, *token_ids: int) -> list[int]:
    return slots.stopped(rows, prompt_of(token_ids), slots.stop_columns(rows))


@pytest.mark.parametrize("others", [0, 7, 8, 30])
def test_a_stop_token_stops_however_many_there_are(others: int) -> None:
    slots = table()
    a, b = slots.take(), slots.take()
    ids = (99, *range(100, 100 + others))
    slots.fill(a, prompt_of([1]), 1, 10, 1, ids)
    slots.fill(b, prompt_of([1]), 1, 10, 1, ())
    both = np.array([a, b])
    slots.append_tokens(both, prompt_of([99, 99]))
    assert stopped(slots, both, 99, 99) == [0]
    assert stopped(slots, both, 98, 98) == []
    assert bool(slots.more_stop_ids) == (others >= 8)


def test_a_stop_token_does_not_stop_before_min_tokens() -> None:
    slots = table()
    slot = np.array([slots.take()])
    slots.fill(int(slot[0]), prompt_of([1, 2]), 2, 10, 2 + 2, (9,))
    for expected in ([], [], [0]):
        slots.append_tokens(slot, prompt_of([9]))
        assert stopped(slots, slot, 9) == expected


def test_padding_is_no_stop_token() -> None:
    slots = table()
    slot = np.array([slots.take()])
    slots.fill(int(slot[0]), prompt_of([1]), 1, 10, 1, ())
    slots.append_tokens(slot, prompt_of([0]))
    assert stopped(slots, slot, 0) == []


def test_the_last_block_may_be_partly_filled() -> None:
    assert table().blocks.shape == (3, 3)
