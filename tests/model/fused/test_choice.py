"""Which token counts run through the fused kernels: with a clock that the test sets."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from asyncengine import WarmUp
from asyncengine.model.buckets import Buckets
from asyncengine.model.capturing import Capturing
from asyncengine.model.fused import choice
from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.graph_recorder import Tensors
from asyncengine.model.graphs import StepGraphs
from tests.model.test_graphs import CPU, Model, Replayer, decodes


class Fused:
    """A fused decoder as far as a choice sees it."""

    serves, use, rest = FusedDecoder.serves, FusedDecoder.use, FusedDecoder.rest

    def __init__(self) -> None:
        self.sizes = frozenset(range(1, 9))
        self.some = True
        self.many: bool | None = None


class Switching(Model):
    """Its logits have a third column: whether a step was run fused."""

    def __init__(self, fused: Fused) -> None:
        super().__init__()
        self._fused = fused

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        fused = torch.full_like(index, self._fused.serves(ids.shape[1]))
        return torch.stack((ids[0, index], positions[0, index], fused), 1)


class Clock:
    """Says that replays take so long, in the order in which it is asked."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)

    def __call__(self, replay: Callable[[], None]) -> float:
        replay()
        return self._seconds.pop(0)


def chosen(*seconds: float, fails_at: int | None = None) -> tuple[Fused, Capturing]:
    """The buckets 24, 16, 4, 1 and 2, in this order, captured; the first and those of few tokens measured."""
    fused = Fused()
    graphs = StepGraphs(Switching(fused), Buckets((1, 2, 4, 16, 24)), CPU, Replayer(fails_at))
    measured = choice.Choice(fused, Clock(*seconds), graphs)  # type: ignore[arg-type]
    assert not any(fused.serves(tokens) for tokens in range(1, 1000))
    capturing = Capturing(graphs, measured, at_once=True)
    capturing.begin()
    return fused, capturing


def ran_fused(capturing: Capturing, count: int) -> bool:
    ran = capturing.graphs.run(decodes(count))
    assert ran is not None
    return bool(ran.logits[0, 2])


def test_each_bucket_of_few_tokens_keeps_what_was_measured_to_be_faster_and_one_of_more_speaks_for_all() -> None:
    fused, capturing = chosen(0.02, 0.01, 0.005, 0.0025, 0.004, 0.003, 0.004, 0.0045)
    assert (fused.sizes, fused.some, fused.many) == ({1, 4}, True, None)
    runs = {count: ran_fused(capturing, count) for count in (1, 2, 3, 4, 5, 16, 24)}
    assert runs == {1: True, 2: False, 3: True, 4: True, 5: True, 16: True, 24: True}
    assert capturing.warmth == WarmUp(
        9, 9, False, 0,
        (
            "decoder: fused kernels are used for 1, 4, 9 to 512, more tokens: measured 24 in 10 ms (without: 20); "
            "4 in 2.5 ms (without: 5); 1 in 3 ms (without: 4); 2 in 4.5 ms (without: 4)",
        ),
    )  # fmt: skip


def test_a_gain_that_is_noise_is_none() -> None:
    fused, capturing = chosen(1.0, 0.99, 1.0, 0.97, 1.0, 0.99, 1.0, 0.99)
    assert (fused.sizes, fused.some) == ({4}, False)
    assert [ran_fused(capturing, count) for count in (1, 2, 4, 16, 24)] == [False, False, True, False, False]
    assert "used for 4 tokens" in capturing.warmth.notes[0]


def test_what_is_never_faster_is_not_used() -> None:
    fused, capturing = chosen(*8 * [1.0])
    assert not any(fused.serves(tokens) for tokens in range(1, 1000))
    assert "fused kernels are not used: measured 24 in" in capturing.warmth.notes[0]
    assert not ran_fused(capturing, 1)


@pytest.mark.parametrize(("fails_at", "some", "won"), [(1, False, set[int]()), (4, True, set[int]()), (6, True, {4})])
def test_what_cannot_be_captured_leaves_the_graphs_that_are_there(fails_at: int, some: bool, won: set[int]) -> None:
    fused, capturing = chosen(2.0, 1.0, 2.0, 1.0, fails_at=fails_at)
    assert (fused.sizes, fused.some) == (won, some)
    assert capturing.graphs.captured == (1, 2, 4, 16, 24)
    assert [ran_fused(capturing, count) for count in (1, 2, 4, 16, 24)] == [False, False, 4 in won, some, some]
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
    measured = choice.Choice(fused, Clock(2.0, 1.0), graphs)  # type: ignore[arg-type]
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
    _, capturing = chosen(1.0, 0.5, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0)
    capturing.clear()
    capturing.begin()
    assert [ran_fused(capturing, count) for count in (1, 2, 4, 24)] == [True, False, False, True]


def test_where_nothing_was_captured_nothing_is_chosen_or_said() -> None:
    fused, capturing = chosen(fails_at=0)
    assert len(capturing.warmth.notes) == 1  # that nothing can be captured
    assert not any(fused.serves(tokens) for tokens in range(1, 1000))


@pytest.mark.parametrize("faster", [False, True])
def test_launched_steps_decide_for_their_like(faster: bool) -> None:
    fused, launched = Fused(), list[bool]()
    measured = choice.Choice(fused, Clock())  # type: ignore[arg-type]
    for counts, tokens in (((1,), 1), (range(2, 9), 8), ((512,), 64), ((513,), 2048)):
        clock = Clock(2.0, 1.0 if faster else 1.99)
        measured.decide_launched(counts, tokens, lambda tokens=counts[-1]: launched.append(fused.serves(tokens)), clock)
    assert launched == [False, True] * 4
    assert [fused.serves(tokens) for tokens in (1, 2, 8, 9, 512, 513, 9999)] == [faster] * 7
    (note,) = measured.notes
    where = "used for 1, 2, 3, 4, 5, 6, 7, 8, 9 to 512, more tokens" if faster else "not used"
    assert note.startswith(f"decoder: fused kernels are {where}: measured 1 launched in ")
    assert "; 2048 launched in " in note


def test_a_launched_step_that_cannot_be_run_is_left_to_transformers() -> None:
    fused = Fused()
    measured = choice.Choice(fused, Clock())  # type: ignore[arg-type]

    def launch() -> None:
        if fused.many:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")

    measured.decide_launched((513,), 2048, launch, Clock(2.0))
    assert not fused.many
    told = "decoder: fused kernels are not used: measured 2048 cannot be launched: CUDA out of memory."
    assert measured.notes == (told,)


def test_of_many_buckets_one_that_is_captured_first_decides() -> None:
    fused = Fused()
    graphs = StepGraphs(Switching(fused), Buckets.upto(1024), CPU, Replayer())
    measured = choice.Choice(fused, Clock(), graphs)  # type: ignore[arg-type]
    assert [size for size in graphs.sizes if measured.is_open(size)] == [1, 2, 4, 8, 256]
    assert Buckets.upto(1024).coarse()[:2] == (1024, 256)
