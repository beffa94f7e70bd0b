"""Deadlines pass in their order, and those of requests that have ended are forgotten."""

from __future__ import annotations

from asyncengine.instructions import Deadlines
from asyncengine.step.deadlines import DeadlineQueue


def test_the_soonest_is_next_whoever_came_first() -> None:
    alive, queued = {1, 2}, set[int]()
    queue = DeadlineQueue((alive, queued))
    assert queue.next is None
    queue.add(1, Deadlines(total=9.0).begun(100.0))
    queue.add(2, Deadlines(first_token=3.0, total=20.0).begun(101.0))
    assert queue.next == 104.0
    assert list(queue.passed(110.0)) == [(2, "first_token"), (1, "total")]
    assert queue.next == 121.0 and list(queue.passed(120.9)) == []


def test_those_of_requests_that_have_ended_are_passed_over() -> None:
    alive, queued = {1}, {2}
    queue = DeadlineQueue((alive, queued))
    queue.add(1, Deadlines(queue=1.0, total=2.0).begun(0.0))
    queue.add(2, Deadlines(total=3.0).begun(0.0))
    passed = []
    for number, kind in queue.passed(2.0):
        passed.append((number, kind))
        alive.remove(number)  # by its first deadline
    assert passed == [(1, "queue")]
    assert queue.next == 3.0
    queued.clear()
    assert queue.next is None


def test_what_is_kept_is_in_proportion_to_the_requests_that_live() -> None:
    alive, queued = set[int](), set[int]()
    queue = DeadlineQueue((alive, queued))
    for number in range(1000):
        alive.add(number)
        queue.add(number, Deadlines(queue=1.0, first_token=2.0, total=3.0).begun(float(number)))
        alive.discard(number - 10)
    assert len(queue._heap) <= 64 + 6 * 11
    assert {number for number, _ in queue.passed(1e9)} == alive
