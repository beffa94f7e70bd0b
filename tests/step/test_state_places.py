"""Who holds which place."""

from __future__ import annotations

import numpy as np
import pytest

from asyncengine.step.state_places import StatePlaces


def blocks(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(numbers, dtype=np.int32)


def places(count: int = 2) -> StatePlaces:
    return StatePlaces(8, count, 16)


def kept(among: StatePlaces, *numbers: int) -> list[int]:
    """The places of new states at the ends of blocks."""
    taken = []
    for block in numbers:
        place = among.take()
        assert place is not None
        among.keep(block, place)
        taken.append(place)
    return taken


def test_they_lie_behind_those_of_the_slots() -> None:
    own = places(3)
    assert [own.take() for _ in range(4)] == [8, 9, 10, None]
    assert (own.num_free, own.num_known, own.num_held) == (0, 0, 3)
    own.check([8, 9, 10])


def test_there_may_be_none() -> None:
    own = places(0)
    assert own.take() is None
    own.check([])


def test_one_that_is_let_go_is_free() -> None:
    own = places(1)
    assert own.take() == 8
    own.retain(8)
    own.release(8)
    assert own.take() is None
    own.release(8)
    assert own.num_free == 1 and own.take() == 8


def test_a_known_state_is_found_at_its_block() -> None:
    own = places()
    [place] = kept(own, 3)
    assert own.deepest(blocks(1, 3, 5)) == 2 and own.at(3) == place
    assert own.deepest(blocks(1, 5)) == own.deepest(blocks()) == 0
    assert (own.num_known, own.num_held, own.num_used) == (1, 0, 0)


def test_the_deepest_one_counts() -> None:
    own = places()
    kept(own, 3, 1)
    assert own.deepest(blocks(1, 3, 5)) == 2


def test_the_least_recently_used_one_is_taken_back() -> None:
    own = places(3)
    first, second, third = kept(own, 1, 2, 3)
    own.retain(first)
    own.release(first)
    again = own.take()
    assert again == second
    own.keep(4, again)
    assert own.take() == third
    assert [own.deepest(blocks(block)) for block in (1, 2, 3, 4)] == [1, 0, 0, 1]
    own.check([third])


def test_none_that_somebody_holds_is_taken_back() -> None:
    own = places(1)
    [place] = kept(own, 1)
    own.retain(place)
    assert own.take() is None and own.num_used == 1
    own.release(place)
    assert own.take() == place


def test_the_second_state_of_a_block_is_let_go_and_the_first_counts_as_used() -> None:
    own = places(3)
    first, second = kept(own, 1, 2)
    third = own.take()
    assert third is not None
    own.keep(1, third)
    assert own.num_free == 1 and own.at(1) == first
    own.take()
    assert own.take() == second


def test_a_block_that_leaves_the_tree_takes_its_state_along() -> None:
    own = places()
    kept(own, 1, 2)
    own.forget(blocks(2, 3))
    assert own.deepest(blocks(1, 2)) == 1 and own.num_free == 1
    kept(own, 2)
    own.check([])


def test_whoever_holds_a_forgotten_one_has_it_still() -> None:
    own = places(1)
    [place] = kept(own, 1)
    own.retain(place)
    own.forget(blocks(1))
    assert own.take() is None and (own.num_known, own.num_held) == (0, 1)
    own.check([place])
    own.release(place)
    assert own.num_free == 1


def test_check_notices_a_place_that_nobody_holds() -> None:
    own = places()
    own.take()
    with pytest.raises(AssertionError, match="places are held so often"):
        own.check([])


def test_check_notices_one_that_was_lost() -> None:
    own = places()
    own._free.pop()
    with pytest.raises(AssertionError, match="places were lost"):
        own.check([])
