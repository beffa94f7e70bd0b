"""In which order steps and draws are captured, what of that a load waits for, and what ends it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from asyncengine import WarmUp
from asyncengine.model import capturing as capturing_module
from asyncengine.model.buckets import Buckets
from asyncengine.model.capturing import CapturesOf, Capturing, Room
from asyncengine.model.graphs import StepGraphs
from asyncengine.model.last_tokens import LastTokens
from asyncengine.model.token_draw import DrawKind
from asyncengine.step.batch import StepBatch
from tests.model.test_graphs import CPU, Model, Replayer, decodes

GIB = 1 << 30
PLAIN = (DrawKind.PLAIN,)


def capturing_of(
    sizes: tuple[int, ...] = (1, 2, 4, 16), kinds: tuple[DrawKind, ...] = (), fails_at: int | None = None, **others: Any
) -> Capturing:
    graphs = StepGraphs(Model(), Buckets(sizes), CPU, Replayer(fails_at), LastTokens(16, CPU), kinds)
    return Capturing(graphs, **{"clock": lambda: 0.0, **others})


def the_rest(capturing: Capturing) -> list[str]:
    done = []
    while capturing.warmth.goes_on:
        done.append(capturing.advance())
    return done


def test_a_few_first_so_that_every_step_is_replayed_and_then_the_others_largest_first() -> None:
    capturing = capturing_of((1, 2, 4, 8, 16, 24), PLAIN)
    capturing.begin()
    assert capturing.graphs.captured == (1, 2, 8, 24)
    assert capturing.graphs.captured_draws == tuple((size, DrawKind.PLAIN) for size in (1, 2, 8, 24))
    waits = "graphs: 8 of 12 are captured, the others while there are no requests"
    assert capturing.warmth == WarmUp(8, 12, True, 0, (waits,))
    for count in range(1, 25):
        ran = capturing.graphs.run(decodes(count))
        assert ran is not None and len(ran.logits) == count
    assert the_rest(capturing) == [
        "step of 16 tokens", "step of 4 tokens", "draw of 16 tokens, plain", "draw of 4 tokens, plain",
    ]  # fmt: skip
    assert capturing.warmth == WarmUp(12, 12, False)


def test_all_of_them_where_that_is_wanted() -> None:
    capturing = capturing_of(kinds=PLAIN, at_once=True, clock=itertools.count(0, 100.0).__next__)
    capturing.begin()
    assert capturing.warmth == WarmUp(8, 8, False)
    assert capturing.graphs.captured == (1, 2, 4, 16)


def test_a_load_waits_no_longer_than_it_may() -> None:
    ticks = itertools.count()
    capturing = capturing_of(clock=lambda: float(next(ticks)))  # a second for each look at the clock
    capturing.begin()
    assert capturing.graphs.captured == (4, 16)  # begun after one and two seconds; after three, no other
    assert capturing.warmth.goes_on
    assert the_rest(capturing) == ["step of 1 tokens", "step of 2 tokens"]


def test_a_step_that_cannot_be_captured_ends_it() -> None:
    capturing = capturing_of(kinds=PLAIN, fails_at=1)
    capturing.begin()
    assert capturing.graphs.captured == (16,)
    failed = "graphs: no further steps are captured: operation not permitted when stream is capturing"
    assert capturing.warmth == WarmUp(1, 8, False, 0, (failed,))


def test_a_draw_that_cannot_be_captured_ends_the_draws() -> None:
    capturing = capturing_of(kinds=PLAIN, fails_at=3)
    capturing.begin()
    assert capturing.warmth.goes_on and capturing.graphs.captured == (1, 4, 16)
    assert the_rest(capturing) == ["step of 2 tokens"]
    assert (capturing.warmth.done, capturing.warmth.of, len(capturing.warmth.notes)) == (4, 8, 1)


def test_a_step_that_needs_another_graph_and_gets_none_ends_it_too() -> None:
    capturing = capturing_of(kinds=PLAIN, fails_at=6)
    capturing.begin()
    model: Any = capturing.graphs._model
    model.key = 1  # all graphs must be captured anew
    assert capturing.graphs.run(decodes(3)) is not None
    (note,) = capturing.warmth.notes[:1]
    assert note.startswith("graphs: the model cannot be captured, it runs without")
    assert the_rest(capturing) == ["step of 2 tokens"]  # nothing of it is done
    assert capturing.graphs.captured == ()


def test_a_draw_is_never_captured_behind_a_graph_whose_memory_was_replaced() -> None:
    """There lies the step that was run last: its slots, which may be another request's by now."""
    ticks, last = itertools.count(), LastTokens(16, CPU)
    graphs = StepGraphs(Model(), Buckets((1, 2)), CPU, Replayer(), last, PLAIN)
    capturing = Capturing(graphs, clock=lambda: float(next(ticks)))
    capturing.begin()
    assert (graphs.captured, graphs.captured_draws) == ((1, 2), ())  # there was no time for more
    graphs.run(dataclasses.replace(decodes(2), sample_slots=np.array([3, 5])))
    graphs._buffer.reserve(2 * graphs._buffer.capacity)  # as for a step that brings more along
    last.tensor[:] = 7
    assert the_rest(capturing) == ["draw of 2 tokens, plain", "draw of 1 tokens, plain"]
    assert last.tensor[: last.nowhere].tolist() == 16 * [7]
    assert capturing.warmth == WarmUp(4, 4, False)


class Device:
    """Each capture takes so many bytes of it."""

    def __init__(self, each: int) -> None:
        self.captured = lambda: 0
        self._each = each

    def free(self) -> int:
        return 80 * GIB - self._each * self.captured()


@pytest.mark.parametrize(("each", "done"), [(1 << 20, 4), (GIB // 4, 4), (GIB // 2, 3), (2 * GIB, 1)])
def test_they_take_no_more_than_was_set_aside_for_them_and_one_more(each: int, done: int) -> None:
    device = Device(each)
    capturing = capturing_of(room=Room(GIB, device.free), at_once=True)
    device.captured = lambda: len(capturing.graphs.captured)
    capturing.begin()
    assert len(capturing.graphs.captured) == capturing.warmth.done == done
    assert capturing.warmth.nbytes == done * each
    assert not capturing.warmth.goes_on
    taken = f"they take {done * each / GIB:.2f} GiB, and 1.00 GiB were set aside"
    assert capturing.warmth.notes == (() if done == 4 else (f"graphs: {done} of 4 are captured, no others: {taken}",))


def test_cleared_and_begun_again_they_are_counted_anew() -> None:
    device = Device(GIB // 4)
    capturing = capturing_of(room=Room(GIB, device.free), at_once=True)
    device.captured = lambda: len(capturing.graphs.captured)
    for _ in range(2):
        capturing.begin()
        assert capturing.warmth == WarmUp(4, 4, False, GIB)
    capturing.clear()
    assert capturing.warmth == WarmUp(0, 0, False)
    assert capturing.graphs.captured == ()


def test_those_of_a_draft_model_come_after_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing_module, "FIRST_SECONDS", 0.0)
    both = [capturing_of((1, 2)), capturing_of((1, 4), fails_at=1)]
    for one in both:
        one.begin()
    together = CapturesOf(both)
    assert together.warmth.of == 4 and together.warmth.done == 0
    done = []
    while together.warmth.goes_on:
        done.append(together.warm_up())
    assert done == ["step of 2 tokens", "step of 1 tokens", "step of 4 tokens", "step of 1 tokens"]
    assert (together.warmth.done, together.warmth.of, len(together.warmth.notes)) == (3, 4, 1)


@dataclasses.dataclass
class Adapters:
    """Stands in for those of a model."""

    capturable: bool = True
    generation: int = 1

    @contextlib.contextmanager
    def looked_up(self, which: torch.Tensor) -> Iterator[None]:
        self.which = which.tolist()
        yield


def adapted(adapters: Any, recorder: Replayer | None = None, **others: Any) -> Capturing:
    graphs = StepGraphs(Model(), Buckets((1, 2)), CPU, recorder or Replayer())
    return Capturing(graphs, adapted=graphs.adapted(Buckets.doubling(3), adapters), **others)


def with_adapters(*own: int) -> StepBatch:
    return dataclasses.replace(decodes(len(own)), adapters=np.array(own, np.int32))


class TestAdapters:
    def test_steps_with_adapters_are_captured_while_there_are_any(self) -> None:
        capturing = adapted(adapters := Adapters(capturable=False))
        capturing.begin()
        capturing.adapters_changed()
        assert capturing.warmth == WarmUp(2, 2, False) and capturing.run(with_adapters(0)) is None
        adapters.capturable, adapters.generation = True, 2
        capturing.adapters_changed()
        assert the_rest(capturing) == [f"adapted step of {n} tokens" for n in (3, 1, 2)]
        assert capturing.warmth == WarmUp(5, 5, False)
        ran = capturing.run(with_adapters(4, -1, 4))
        assert ran is not None and ran.logits.tolist() == [[100, 0], [101, 3], [102, 6]]
        assert adapters.which == [4, -1, 4]
        assert capturing.run(decodes(2)) is not None and adapters.which == [4, -1, 4]
        assert capturing.run(decodes(3)) is None, "one without adapters waits for no kernels of theirs"
        adapters.capturable, adapters.generation = False, 3
        capturing.adapters_changed()
        assert capturing.warmth == WarmUp(2, 2, False) and capturing.run(with_adapters(0)) is None

    def test_what_holds_still_is_kept_and_else_captured_again(self) -> None:
        capturing = adapted(adapters := Adapters(), recorder := Replayer(), at_once=True)
        capturing.begin()
        assert recorder.recorded == 5
        capturing.adapters_changed()
        assert not capturing.warmth.goes_on
        adapters.generation += 1
        capturing.adapters_changed()
        assert capturing.run(with_adapters(0)) is None and capturing.run(decodes(1)) is not None
        adapters.generation += 1
        capturing.advance()
        capturing.adapters_changed()  # in the middle
        assert capturing.warmth.of == 5 and len(the_rest(capturing)) == 3 and recorder.recorded == 9
        assert capturing.warmth == WarmUp(5, 5, False) and capturing.run(with_adapters(0)) is not None

    def test_where_they_cannot_be_captured_others_can_be(self) -> None:
        capturing = adapted(Adapters(), Replayer(fails_at=3), at_once=True)
        capturing.begin()
        (note,) = capturing.warmth.notes
        assert note.startswith("graphs: no further steps with adapters are captured: operation not permitted")
        assert capturing.graphs.captured == (1, 2) and capturing.run(with_adapters(0)) is not None
