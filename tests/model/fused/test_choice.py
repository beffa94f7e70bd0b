"""Which token counts run through the fused kernels: with a clock that the test sets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from asyncengine import WarmUp
from asyncengine.model.buckets import Buckets
from asyncengine.model.capturing import Capturing
from asyncengine.model.fused import choice
from asyncengine.model.graph_recorder import Tensors
from asyncengine.model.graphs import StepGraphs
from tests.model.test_graphs import CPU, Model, Replayer, decodes


class Fused:
    """A fused decoder as far as `choose` sees it."""

    def __init__(self) -> None:
        self.sizes: frozenset[int] = frozenset()
        self.many = False

    def use(self, sizes: Any) -> None:
        self.sizes = frozenset(sizes)


class Switching(Model):
    """Its logits have a third column: whether a step was run fused."""

    def __init__(self, fused: Fused) -> None:
        super().__init__()
        self._fused = fused

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        fused = torch.full_like(index, ids.shape[1] in self._fused.sizes)
        return torch.stack((ids[0, index], positions[0, index], fused), 1)


class Clock:
    """Says that replays take so long, in the order in which it is asked."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)

    def __call__(self, replay: Callable[[], None]) -> float:
        replay()
        return self._seconds.pop(0)


def chosen(*seconds: float, fails_at: int | None = None) -> tuple[Fused, Capturing]:
    """The buckets 16, 4, 1 and 2, in this order, captured and measured."""
    fused = Fused()
    graphs = StepGraphs(Switching(fused), Buckets((1, 2, 4, 16)), CPU, Replayer(fails_at))
    measured = choice.Choice(graphs, fused, range(1, 9), Clock(*seconds))  # type: ignore[arg-type]
    capturing = Capturing(graphs, measured, at_once=True)
    capturing.begin()
    return fused, capturing


def ran_fused(capturing: Capturing, count: int) -> bool:
    ran = capturing.graphs.run(decodes(count))
    assert ran is not None
    return bool(ran.logits[0, 2])


def test_each_bucket_keeps_what_was_measured_to_be_faster() -> None:
    fused, capturing = chosen(0.005, 0.0025, 0.004, 0.003, 0.004, 0.0045)
    assert fused.sizes == {1, 4}
    assert [ran_fused(capturing, count) for count in (1, 2, 3, 4, 16)] == [True, False, True, True, False]
    assert capturing.warmth == WarmUp(
        7, 7, False, 0,
        (
            "decoder: fused kernels are used for 1, 4 tokens: measured 4 in 2.5 ms (without: 5); 1 in 3 ms "
            "(without: 4); 2 in 4.5 ms (without: 4)",
        ),
    )  # fmt: skip


def test_a_gain_that_is_noise_is_none() -> None:
    fused, capturing = chosen(1.0, 0.97, 1.0, 0.99, 1.0, 0.99)
    assert fused.sizes == {4}
    assert [ran_fused(capturing, count) for count in (1, 2, 4)] == [False, False, True]
    assert "used for 4 tokens" in capturing.warmth.notes[0]


def test_what_is_never_faster_is_not_used() -> None:
    fused, capturing = chosen(*6 * [1.0])
    assert fused.sizes == frozenset()
    assert "fused kernels are not used: measured 4 in" in capturing.warmth.notes[0]
    assert not ran_fused(capturing, 1)


@pytest.mark.parametrize(("fails_at", "won"), [(2, set[int]()), (4, {4})])
def test_what_cannot_be_captured_leaves_the_graphs_that_are_there(fails_at: int, won: set[int]) -> None:
    fused, capturing = chosen(2.0, 1.0, fails_at=fails_at)
    assert fused.sizes == won
    assert capturing.graphs.captured == (1, 2, 4, 16)
    assert [ran_fused(capturing, count) for count in (1, 2, 4)] == [False, False, 4 in won]
    told = "no further, for it cannot be captured: operation not permitted when stream is capturing"
    assert capturing.warmth.notes[0].endswith(told)
    assert not capturing.warmth.goes_on


class Dated(Replayer):
    """Counts replays of graphs that refer to memory which the model has replaced."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.stale = 0
        self._model = model

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        key = self._model.key
        replay, outputs = super().record(function)

        def counted() -> None:
            self.stale += self._model.key != key
            replay()

        return counted, outputs


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_whose_memory_was_replaced_since_is_not_measured(fails: bool) -> None:
    """While the engine is idle steps lie between both captures; a replay would write where one of them wrote."""
    fused = Fused()
    model = Switching(fused)
    recorder = Dated(model)
    graphs = StepGraphs(model, Buckets((1,)), CPU, recorder)
    measured = choice.Choice(graphs, fused, (1,), Clock(2.0, 1.0))  # type: ignore[arg-type]
    ticks = itertools.count(0.0, 2.0)
    capturing = Capturing(graphs, measured, clock=lambda: next(ticks))
    capturing.begin()
    assert capturing.warmth.done == 1 and capturing.warmth.goes_on
    model.key = 1
    recorder.fails_at = recorder.recorded if fails else None
    assert capturing.advance() == "choice of 1 tokens"
    assert recorder.stale == 0 and not capturing.warmth.goes_on
    assert (graphs.captured, fused.sizes) == (((), set()) if fails else ((1,), {1}))


def test_captured_again_the_choice_holds() -> None:
    _, capturing = chosen(1.0, 2.0, 2.0, 1.0, 1.0, 2.0)
    capturing.clear()
    capturing.begin()
    assert [ran_fused(capturing, count) for count in (1, 2, 4)] == [True, False, False]


def test_where_nothing_was_captured_nothing_is_chosen_or_said() -> None:
    fused, capturing = chosen(fails_at=0)
    assert len(capturing.warmth.notes) == 1  # that nothing can be captured
    assert fused.sizes == frozenset()


def many(*seconds: float, counts: tuple[int, ...] = (64, 2048), fails_at: int = 0) -> tuple[Fused, list[Any], str]:
    """Steps of more tokens, measured; what was launched, and whether it was fused."""
    fused, launched = Fused(), list[Any]()

    def launch(count: int) -> None:
        if len(launched) + 1 == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")
        launched.append((count, fused.many))

    note = choice.choose_many(fused, launch, counts, Clock(*seconds))  # type: ignore[arg-type]
    return fused, launched, note


@pytest.mark.parametrize(
    ("seconds", "faster"),
    [((2.0, 1.0, 2.0, 1.0), True), ((1.0, 0.99, 2.0, 1.0), False), ((2.0, 1.0, 1.0, 0.99), False)],
)
def test_many_tokens_are_run_fused_where_some_and_most_of_them_are_faster(
    seconds: tuple[float, ...], faster: bool
) -> None:
    fused, launched, note = many(*seconds)
    assert launched == [(64, False), (64, True), (2048, False), (2048, True)]
    assert fused.many is faster
    before, after = (f"{second * 1e3:.3g}" for second in seconds[:2])
    where = "used" if faster else "not used"
    told = f"decoder: fused kernels are {where} for more than 8 tokens: measured 64 in {after} ms (without: {before}); "
    assert note.startswith(told + "2048 in ")


def test_many_tokens_that_cannot_be_run_fused_are_not() -> None:
    fused, _, note = many(2.0, 1.0, 2.0, fails_at=4)
    assert not fused.many
    assert note.endswith("64 in 1e+03 ms (without: 2e+03); 2048 cannot be run: CUDA out of memory.")
