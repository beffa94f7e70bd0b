from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest

from asyncengine.errors import EngineClosedError
from asyncengine.instruction_queue import LONGEST_WAIT, InstructionQueue


def in_threads(*functions: Callable[[], object]) -> None:
    """Runs functions side by side; raises what they raise."""
    errors: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


class TestOrder:
    def test_is_kept_and_all_are_taken_at_once(self) -> None:
        queue: InstructionQueue[int] = InstructionQueue()
        for item in range(5):
            queue.put(item)
        assert len(queue) == 5
        assert queue.drain() == [0, 1, 2, 3, 4]
        assert queue.drain() == [] and len(queue) == 0

    def test_of_each_producer_is_kept_and_nothing_is_lost(self) -> None:
        queue: InstructionQueue[tuple[int, int]] = InstructionQueue()
        producers, each = 4, 3000
        got: list[tuple[int, int]] = []

        def produce(name: int) -> None:
            for item in range(each):
                queue.put((name, item))

        def consume() -> None:
            while len(got) < producers * each:
                queue.wait()  # without a time-out: a lost wake-up hangs here
                got.extend(queue.drain())

        in_threads(consume, *(lambda name=name: produce(name) for name in range(producers)))  # type: ignore[misc]
        for name in range(producers):
            assert [item for who, item in got if who == name] == list(range(each))


class TestWaking:
    def test_something_there_ends_a_wait_at_once(self) -> None:
        queue: InstructionQueue[int] = InstructionQueue()
        queue.put(1)
        queue.wait()

    def test_a_wake_up_before_the_wait_is_not_lost(self) -> None:
        queue: InstructionQueue[int] = InstructionQueue()
        queue.wake()
        queue.wait()

    def test_is_idempotent(self) -> None:
        queue: InstructionQueue[int] = InstructionQueue()
        for _ in range(5):
            queue.wake()
        queue.wait()
        assert not queue._flag.acquire(blocking=False)

    def test_a_time_out_ends_a_wait(self) -> None:
        queue: InstructionQueue[int] = InstructionQueue()
        for timeout in (0.0, -5.0, 0.001):
            queue.wait(timeout)

    @pytest.mark.parametrize("timeout", [1e300, float("inf"), LONGEST_WAIT * 2])
    def test_a_very_long_time_out_is_one(self, timeout: float) -> None:
        queue: InstructionQueue[int] = InstructionQueue()
        queue.wake()
        queue.wait(timeout)

    def test_a_put_while_nobody_sleeps_sets_no_flag(self) -> None:
        queue: InstructionQueue[int] = InstructionQueue()
        queue.put(1)
        assert not queue._flag.acquire(blocking=False)

    def test_no_wake_up_is_lost_over_many_naps(self) -> None:
        """One instruction at a time, each awaited: the consumer falls asleep before most of them."""
        queue: InstructionQueue[int] = InstructionQueue()
        answers: InstructionQueue[int] = InstructionQueue()
        rounds = 3000

        def consume() -> None:
            seen = 0
            while seen < rounds:
                queue.wait()
                for item in queue.drain():
                    seen += 1
                    answers.put(item)

        def produce() -> None:
            for item in range(rounds):
                queue.put(item)
                while not (got := answers.drain()):
                    answers.wait()
                assert got == [item]

        in_threads(consume, produce)


class TestFinalizers:
    def test_may_put_in_the_middle_of_a_put(self) -> None:
        queue: InstructionQueue[str] = InstructionQueue()

        class Dropped:
            def __del__(self) -> None:
                queue.put("from a finalizer")

        class Item(str):
            def __new__(cls) -> Item:
                cycle = [Dropped()]
                cycle.append(cycle)  # type: ignore[arg-type]
                del cycle
                gc.collect()
                return super().__new__(cls, "item")

        for _ in range(3):
            queue.put(Item())
        assert sorted(queue.drain()) == ["from a finalizer"] * 3 + ["item"] * 3

    def test_may_put_in_a_collection_at_any_allocation(self) -> None:
        queue: InstructionQueue[object] = InstructionQueue()
        dropped = 0

        class Dropped:
            def __init__(self) -> None:
                self.me = self

            def __del__(self) -> None:
                nonlocal dropped
                dropped += 1
                queue.put("dropped")

        before = gc.get_threshold()
        gc.set_threshold(1)
        try:
            taken: list[object] = []
            for item in range(500):
                Dropped()
                queue.put([item])
                if item % 7 == 0:
                    taken += queue.drain()
        finally:
            gc.set_threshold(*before)
        gc.collect()
        taken += queue.drain()
        assert [item for item in taken if item != "dropped"] == [[item] for item in range(500)]
        assert dropped == 500 == taken.count("dropped")

    def test_may_put_while_it_is_closed(self) -> None:
        queue: InstructionQueue[object] = InstructionQueue()
        refused: list[bool] = []

        class Dropped:
            def __init__(self) -> None:
                self.me = self

            def __del__(self) -> None:
                try:
                    queue.put("dropped")
                    refused.append(False)
                except EngineClosedError:
                    refused.append(True)

        before = gc.get_threshold()
        gc.set_threshold(1)
        try:
            Dropped()
            queue.put([1])
            left = queue.close()
        finally:
            gc.set_threshold(*before)
        gc.collect()
        assert left.count("dropped") == refused.count(False)


class TestClosing:
    def test_returns_what_was_there_and_refuses_the_rest(self) -> None:
        queue: InstructionQueue[int] = InstructionQueue()
        queue.put(1)
        assert not queue.closed
        assert queue.close() == [1]
        assert queue.closed
        with pytest.raises(EngineClosedError):
            queue.put(2)
        assert queue.close() == []

    def test_each_item_is_either_taken_or_refused(self) -> None:
        for _ in range(60):
            queue: InstructionQueue[list[int]] = InstructionQueue()
            taken: list[list[int]] = []
            refused: list[list[int]] = []
            kept: list[list[int]] = []
            start = threading.Barrier(4)

            def produce(
                queue: InstructionQueue[list[int]] = queue,
                refused: list[list[int]] = refused,
                kept: list[list[int]] = kept,
                start: threading.Barrier = start,
            ) -> None:
                start.wait()
                for number in range(60):
                    item = [number]
                    try:
                        queue.put(item)
                        kept.append(item)
                    except EngineClosedError:
                        refused.append(item)

            def consume(
                queue: InstructionQueue[list[int]] = queue,
                taken: list[list[int]] = taken,
                start: threading.Barrier = start,
            ) -> None:
                start.wait()
                for _ in range(20):
                    taken += queue.drain()
                taken += queue.close()

            in_threads(produce, produce, produce, consume)
            assert sorted(map(id, taken)) == sorted(map(id, kept))
            assert len(taken) + len(refused) == 180
