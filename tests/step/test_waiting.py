from __future__ import annotations

import gc
import weakref

from hypothesis import given
from hypothesis import strategies as st

from asyncengine.instructions import NewRequest
from asyncengine.step.sequence import Request, Sequence
from asyncengine.step.waiting import WaitingQueue

from .core_case import Box, params, prompt_of


def sequence(arrival: int, priority: int = 0, branch: int = 0) -> Sequence:
    new = NewRequest(arrival, f"r{arrival}", prompt_of("x"), params(), priority)
    return Sequence(Request(new, Box(), arrival, 0.0), branch)


def drained(queue: WaitingQueue) -> list[Sequence]:
    order = []
    while (head := queue.head()) is not None:
        order.append(head)
        queue.remove(head)
    return order


def test_first_come_first_served() -> None:
    queue = WaitingQueue()
    sequences = [sequence(arrival) for arrival in range(4)]
    for one in sequences:
        queue.push(one)
    assert drained(queue) == sequences


def test_the_more_urgent_go_first() -> None:
    queue = WaitingQueue()
    late, urgent, patient = sequence(3, -1), sequence(2, -1), sequence(1, 1)
    for one in (late, urgent, patient):
        queue.push(one)
    assert drained(queue) == [urgent, late, patient]


def test_branches_of_one_request_go_in_order() -> None:
    queue = WaitingQueue()
    second, first = sequence(1, branch=2), sequence(1, branch=1)
    queue.push(second)
    queue.push(first)
    assert drained(queue) == [first, second]


def test_one_that_left_is_let_go() -> None:
    """Its prompt may have audio in it."""
    queue = WaitingQueue()
    sequences = [sequence(arrival) for arrival in range(3)]
    for one in sequences:
        queue.push(one)
    gone = [weakref.ref(one.request.new.prompt) for one in sequences]
    for one in sequences[::-1]:
        queue.remove(one)
    del one, sequences
    gc.collect()
    assert [each() for each in gone] == [None] * 3


def test_one_that_was_preempted_keeps_its_place() -> None:
    queue = WaitingQueue()
    first, second = sequence(1), sequence(2)
    queue.push(first)
    queue.push(second)
    queue.remove(first)
    first.request.preemptions += 1
    queue.push(first)
    assert drained(queue) == [first, second]


def test_one_that_left_is_not_seen_again() -> None:
    queue = WaitingQueue()
    first, second = sequence(1), sequence(2)
    queue.push(first)
    queue.push(second)
    queue.remove(first)
    assert first not in queue and second in queue
    assert queue.head() is second
    assert len(queue) == 1 and list(queue) == [second]


def test_what_is_left_behind_is_bounded() -> None:
    queue = WaitingQueue()
    keeper = sequence(0)
    queue.push(keeper)
    for arrival in range(1, 1000):
        one = sequence(arrival)
        queue.push(one)
        queue.remove(one)
        assert len(queue._heap) <= 70
    again = sequence(1)
    for _ in range(1000):
        again.request.preemptions += 1
        queue.push(again)
        queue.remove(again)
        assert len(queue._heap) <= 70
    assert drained(queue) == [keeper]


@given(st.lists(st.tuples(st.sampled_from(["push", "remove", "head"]), st.integers(0, 5)), max_size=60))
def test_is_a_sorted_set(rules: list[tuple[str, int]]) -> None:
    sequences = [sequence(arrival, priority=arrival % 2) for arrival in range(6)]
    queue, inside = WaitingQueue(), set()
    for what, which in rules:
        one = sequences[which]
        if what == "push" and one not in inside:
            one.request.preemptions += 1
            queue.push(one)
            inside.add(one)
        elif what == "remove" and one in inside:
            queue.remove(one)
            inside.discard(one)
        assert queue.head() is min(inside, key=lambda each: each.order, default=None)
        assert set(queue) == inside and len(queue) == len(inside)
