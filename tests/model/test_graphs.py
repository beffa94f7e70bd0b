"""Captured steps, with a recorder that runs on the CPU: what is captured when, and what happens if it cannot be."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, WarmUp
from asyncengine.model import capturing as capturing_module
from asyncengine.model import graphs as graphs_module
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.buckets import Buckets, padding
from asyncengine.model.capturing import Capturing
from asyncengine.model.graph_recorder import Tensors
from asyncengine.model.graphs import StepGraphs, graphs_for
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.token_draw import FILTERED
from asyncengine.step.batch import StepBatch

pytestmark = pytest.mark.loops("either")

CPU = torch.device("cpu")


class Replayer:
    """Stands in for CUDA graphs: runs the function again, into the tensor that the first run returned.

    After so many captures one fails, where that is wanted.
    """

    def __init__(self, fails_at: int | None = None) -> None:
        self.recorded = 0
        self.replayed = 0
        self.fails_at = fails_at

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        if self.recorded == self.fails_at:
            self.fails_at = None
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        self.recorded += 1
        outputs = tuple(output.clone() for output in function())

        def replay() -> None:
            self.replayed += 1
            with torch.inference_mode():
                for output, again in zip(outputs, function(), strict=True):
                    output.copy_(again)

        return replay, outputs


@dataclass
class Plan:
    graph_key: object


@dataclass
class Model:
    """Its logits are (id, position) of the tokens that are asked for."""

    key: object = 0
    begun: list[StepBatch] = field(default_factory=list)
    forwards: int = 0
    mixed: list[bool] = field(default_factory=list)

    def begin_with(
        self, batch: StepBatch, sections: object, captured: bool = False, mixed: bool = False
    ) -> tuple[Plan, None]:
        self.begun.append(batch)
        self.mixed.append(mixed)
        return Plan((len(batch.token_ids), self.key)), None

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return torch.stack((ids[0, index], positions[0, index]), 1)


def decodes(count: int, first: int = 100) -> StepBatch:
    rows = np.arange(count)
    return dataclasses.replace(
        padding(count),
        token_ids=(first + rows).astype(np.int32),
        positions=rows.astype(np.int32) * 3,
        query_start=np.arange(count + 1, dtype=np.int32),
        context_lens=rows.astype(np.int32) * 3,
        slot_mapping=rows,
        sample_index=rows,
        num_decodes=count,
    )


def capture_all(graphs: StepGraphs) -> StepGraphs:
    """Captures whatever can be."""
    Capturing(graphs, at_once=True).begin()
    return graphs


def captured(model: Model, recorder: Replayer | None = None) -> StepGraphs:
    return capture_all(StepGraphs(model, Buckets((1, 2, 4)), CPU, recorder or Replayer()))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_step_is_padded_to_its_bucket_and_replayed(count: int) -> None:
    model, recorder = Model(), Replayer()
    graphs = captured(model, recorder=recorder)
    for first in (100, 200):
        ran = graphs.run(decodes(count, first))
        assert ran is not None
        assert ran.logits.tolist() == [[first + i, 3 * i] for i in range(count)]
        assert len(model.begun[-1].token_ids) == {1: 1, 2: 2, 3: 4, 4: 4}[count]
        assert model.begun[-1].query_start.tolist() == list(range(count + 1))
    assert recorder.replayed == 2
    assert recorder.recorded == 3


def test_larger_steps_and_prefills_are_left_alone() -> None:
    model = Model()
    graphs = captured(model)
    before = len(model.begun)
    assert graphs.run(decodes(5)) is None
    assert graphs.run(dataclasses.replace(decodes(2), num_decodes=1)) is None
    assert len(model.begun) == before


def prompts(*lengths: int, first: int = 100, decoding: int = 0) -> StepBatch:
    """A step of whole prompts behind some decodes, each of which draws behind its last token."""
    counts = np.array([1] * decoding + list(lengths))
    ends, total = np.cumsum(counts), int(counts.sum())
    return dataclasses.replace(
        padding(total),
        token_ids=(first + np.arange(total)).astype(np.int32),
        positions=np.arange(total, dtype=np.int32),
        query_start=np.concatenate(([0], ends)).astype(np.int32),
        context_lens=np.zeros(len(counts), np.int32),
        slot_mapping=np.arange(total),
        sample_index=ends - 1,
        num_decodes=decoding,
    )


class TestMixed:
    """Captured steps of anything, beside those that decode."""

    def of(self, most_samples: int = 3, recorder: Replayer | None = None) -> tuple[Model, Replayer, Capturing]:
        model, recorder = Model(), recorder or Replayer()
        graphs = StepGraphs(model, Buckets((1, 2, 4)), CPU, recorder)
        capturing = Capturing(graphs, mixed=graphs.mixed(Buckets((4, 8, 16)), most_samples), at_once=True)
        capturing.begin()
        return model, recorder, capturing

    def test_steps_with_prompts_are_padded_and_replayed(self) -> None:
        model, recorder, capturing = self.of()
        assert recorder.recorded == 6 and capturing.warmth == WarmUp(6, 6, False)
        for step, size in ((prompts(3), 4), (prompts(5, 2, decoding=1), 8), (prompts(16), 16), (prompts(4), 4)):
            ran = capturing.run(step)
            assert ran is not None
            assert ran.logits.tolist() == [[100 + i, i] for i in step.sample_index.tolist()]
            assert len(model.begun[-1].token_ids) == size and model.mixed[-1]
        assert recorder.replayed == 4

    def test_decodes_have_their_own(self) -> None:
        model, recorder, capturing = self.of()
        ran = capturing.run(decodes(4))
        assert ran is not None and len(ran.logits) == 4
        assert not model.mixed[-1] and recorder.replayed == 1

    def test_what_is_too_large_gives_more_logits_or_has_drafts_is_launched(self) -> None:
        _, recorder, capturing = self.of()
        drafts = dataclasses.replace(prompts(3), draft_lengths=np.array([2]))
        for step in (prompts(17), prompts(2, 2, 2, 2), drafts):
            assert capturing.run(step) is None
        assert recorder.replayed == 0

    def test_none_is_padded_to_more_than_its_bucket(self) -> None:
        """A launched step may be faster than one of twice its tokens."""
        graphs = StepGraphs(Model(), Buckets((1,)), CPU, Replayer()).mixed(Buckets((4, 8)), 3)
        graphs.capture(8)
        assert graphs.run(prompts(3)) is None and graphs.run(prompts(6)) is not None

    @pytest.mark.parametrize("fails_at", [2, 3])
    def test_where_they_cannot_be_captured_those_that_decode_can_be(self, fails_at: int) -> None:
        _, _, capturing = self.of(recorder=Replayer(fails_at))
        further = "further " if fails_at > 2 else ""
        (note,) = capturing.warmth.notes
        assert note.startswith(f"graphs: no {further}steps with prompts are captured: operation not permitted")
        assert capturing.graphs.captured == (1, 2, 4) and not capturing.warmth.goes_on
        assert capturing.run(decodes(2)) is not None
        assert (capturing.run(prompts(16)) is not None) == bool(further)

    def test_a_graph_that_is_slower_than_launching_is_let_go(self) -> None:
        taken, tokens = [1.0, 2.0, 1.0, 0.5], list[int]()

        def seconds(run: Callable[[], None]) -> float:
            run()
            tokens.append(len(model.begun[-1].token_ids))
            return taken.pop(0)

        model = Model()
        graphs = StepGraphs(model, Buckets((1,)), CPU, Replayer())
        mixed = graphs.mixed(Buckets((4, 16)), 3)
        capturing = Capturing(graphs, mixed=mixed, seconds=seconds, at_once=True)
        capturing.begin()
        assert tokens == [11, 16, 3, 4] and mixed.captured == (4,)
        assert capturing.run(prompts(16)) is None and capturing.run(prompts(4)) is not None
        assert capturing.warmth.notes == (
            "graphs: steps with prompts of 5 to 16 tokens are launched: measured 1e+03 ms (replayed: 2e+03)",
        )

    def test_one_that_cannot_be_measured_is_let_go_too(self) -> None:
        def seconds(run: Callable[[], None]) -> float:
            raise torch.OutOfMemoryError("CUDA out of memory\nmore of it")

        graphs = StepGraphs(Model(), Buckets((1,)), CPU, Replayer())
        capturing = Capturing(graphs, mixed=graphs.mixed(Buckets((4,)), 3), seconds=seconds, at_once=True)
        for _ in range(2):  # as after a sleep
            capturing.begin()
            assert capturing.run(prompts(3)) is None and capturing.run(decodes(1)) is not None
            told = "graphs: steps with prompts of 1 to 4 tokens are launched: CUDA out of memory"
            assert capturing.warmth.notes == (told,)

    def test_other_memory_means_another_capture(self) -> None:
        model, recorder, capturing = self.of()
        model.key = 1
        for replayed in (0, 1):
            ran = capturing.run(prompts(5, 2))
            assert ran is not None
            assert ran.logits.tolist() == [[104, 4], [106, 6]]
            assert (recorder.recorded, recorder.replayed) == (7, 1 + replayed)

    def test_cleared_with_the_others(self) -> None:
        _, _, capturing = self.of()
        capturing.clear()
        assert capturing.run(prompts(3)) is None
        capturing.begin()
        assert capturing.run(prompts(3)) is not None


def test_a_model_that_cannot_be_captured_runs_without_and_a_note_says_so() -> None:
    graphs = captured(Model(), recorder=Replayer(0))
    assert graphs.captured == () and not graphs.capturable
    assert graphs.notes == [
        "graphs: the model cannot be captured, it runs without: operation not permitted when stream is capturing"
    ]
    assert graphs.run(decodes(1)) is None


def test_a_capture_that_fails_leaves_the_graphs_that_are_there() -> None:
    graphs = captured(Model(), recorder=Replayer(2))
    assert graphs.captured == (1, 4) and not graphs.capturable
    assert graphs.notes == ["graphs: no further steps are captured: operation not permitted when stream is capturing"]
    for count in (1, 2):
        ran = graphs.run(decodes(count))
        assert ran is not None
        assert ran.logits.tolist() == [[100 + i, 3 * i] for i in range(count)]
    assert not graphs.capture(2)


def test_other_memory_means_another_capture() -> None:
    model, recorder = Model(), Replayer()
    graphs = captured(model, recorder=recorder)
    model.key = 1
    for _ in range(3):
        ran = graphs.run(decodes(2))
        assert ran is not None
        assert ran.logits.tolist() == [[100, 0], [101, 3]]
    assert recorder.recorded == 4
    assert graphs.captured == (1, 2, 4)


def test_a_step_with_drafts_uses_a_graph_or_none_and_never_replaces_one() -> None:
    class LongRows(Model):
        """Launches other kernels where a row has more than two tokens, as the Triton attention does."""

        def begin_with(
            self, batch: StepBatch, sections: object, captured: bool = False, mixed: bool = False
        ) -> tuple[Plan, None]:
            super().begin_with(batch, sections)
            return Plan((len(batch.token_ids), bool((np.diff(batch.query_start) > 2).any()))), None

    def drafted(*counts: int) -> StepBatch:
        starts = np.cumsum([0, *counts]).astype(np.int32)
        return dataclasses.replace(
            decodes(sum(counts)),
            query_start=starts,
            context_lens=np.zeros(len(counts), np.int32),
            num_decodes=len(counts),
            draft_lengths=np.array(counts) - 1,
        )

    model, recorder = LongRows(), Replayer()
    graphs = captured(model, recorder=recorder)
    for counts in ((3,), (2, 2), (1, 3), (2,)):
        for batch in (drafted(*counts), decodes(sum(counts))):
            ran = graphs.run(batch)
            assert ran is not None
            assert ran.logits.tolist() == [[100 + i, 3 * i] for i in range(sum(counts))]
    assert recorder.recorded == 3  # the three buckets, before the first step
    assert recorder.replayed == 4 + 2  # all without drafts, and those whose rows are short


def test_a_capture_that_fails_in_a_step_does_not_cost_the_step() -> None:
    model = Model()
    graphs = captured(model, recorder=Replayer(fails_at=3))
    model.key = 1
    ran = graphs.run(decodes(2))
    assert ran is not None
    assert ran.logits.tolist() == [[100, 0], [101, 3]]
    assert graphs.run(decodes(2)) is None
    assert len(graphs.notes) == 1


def test_cleared_graphs_can_be_captured_again() -> None:
    graphs = captured(Model())
    graphs.clear()
    assert graphs.run(decodes(1)) is None
    capture_all(graphs)
    assert graphs.captured == (1, 2, 4)


def test_the_cpu_has_no_graphs() -> None:
    assert graphs_for(Model(), TorchAttention(), 4, CPU) == (None, ())


def test_attention_whose_plan_has_no_fixed_place_is_not_captured() -> None:
    graphs, notes = graphs_for(Model(), TorchAttention(), 4, torch.device("cuda"))
    assert graphs is None
    assert notes == ("graphs: the torch attention plans in tensors of changing sizes; none are captured",)


GREEDY = GenerationConfig(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8], list(range(1, 40))]


def engine_config(path: Path) -> EngineConfig:
    return EngineConfig(
        str(path), device="cpu", dtype="float32", attention_backend="torch", max_num_sequence=4, prefill_chunk_size=16
    )


def graphs_here(monkeypatch: pytest.MonkeyPatch, recorder: Replayer) -> None:
    """Captures steps on the CPU, from now on, with a recorder, and however long a load takes."""

    def made(
        model: Any, backend: Any, sequences: int, device: torch.device, last: Any, waits: str | None, states: Any
    ) -> Any:
        kinds = () if last is None else FILTERED
        return StepGraphs(model, Buckets.upto(sequences), device, recorder, last, kinds, states=states), ()

    monkeypatch.setattr(graphs_module, "graphs_for", made)
    monkeypatch.setattr(capturing_module, "FIRST_SECONDS", 600.0)


async def warmed_up(engine: AsyncEngine) -> WarmUp:
    """Returns once nothing is left to be captured."""
    until = time.monotonic() + 60
    while (progress := engine.health().warm_up).goes_on:
        assert time.monotonic() < until
        await asyncio.sleep(0.001)
    return progress


async def tokens_of(config: EngineConfig, run_ahead: bool = False) -> tuple[list[list[int]], tuple[str, ...]]:
    """What an engine says while it is warmed up, afterwards, and anew after a sleep."""
    async with AsyncEngine(config, loader=TransformersLoader(run_ahead=run_ahead)) as engine:
        results = await engine.generate_many(PROMPTS, GREEDY)
        await warmed_up(engine)
        second = await engine.generate_many(PROMPTS, GREEDY)
        await engine.sleep()
        await engine.wake()
        await warmed_up(engine)
        for again in (second, await engine.generate_many(PROMPTS, GREEDY)):
            assert [result.token_ids for result in again] == [result.token_ids for result in results]
        return [result.token_ids for result in results], engine.health().notes


@pytest.mark.parametrize(
    ("run_ahead", "when"),
    [
        (False, "load"),
        (True, "idle"),
        pytest.param(False, "idle", marks=pytest.mark.long),
        pytest.param(True, "load", marks=pytest.mark.long),
    ],
)
@pytest.mark.in_short("True-idle")
async def test_an_engine_generates_the_same_with_captured_steps(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, run_ahead: bool, when: Any
) -> None:
    config = engine_config(checkpoint("llama")).replace(graph_capture=when)
    expected, notes = await tokens_of(config)
    assert notes == ()
    recorder = Replayer()
    graphs_here(monkeypatch, recorder)
    found, notes = await tokens_of(config, run_ahead)
    assert found == expected
    assert notes == ()
    # 1, 2 and 4 sequences, with three draws each where tokens stay on the device; once more after waking.
    assert recorder.recorded == 2 * (12 if run_ahead else 3)
    assert recorder.replayed >= 3 * 11


async def test_steps_with_drafts_of_a_model_that_keeps_states_are_launched_beside_captured_ones(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(checkpoint("lfm2", vocab_size=50)).replace(kv_cache_page_size=8)
    recorder = Replayer()
    graphs_here(monkeypatch, recorder)
    found = [await tokens_of(config.replace(speculative_mode=mode)) for mode in ("disable", "ngram")]
    assert found[0][0] == found[1][0]
    async with AsyncEngine(config.replace(speculative_mode="ngram", spec_draft_length=3)) as engine:
        await warmed_up(engine)
        replayed, steps = recorder.replayed, engine.metrics().counters.steps
        await engine.generate([5, 6, 5, 6], GREEDY.replace(max_tokens=40))
        counters = engine.metrics().counters
        assert counters.draft_tokens and 0 < recorder.replayed - replayed < counters.steps - steps - 1


@pytest.mark.loops("each")
async def test_a_few_steps_are_captured_at_once_and_the_others_while_the_engine_is_idle(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(checkpoint("llama"))
    recorder = Replayer()
    graphs_here(monkeypatch, recorder)
    begin, at_load = Capturing.begin, list[int]()
    monkeypatch.setattr(Capturing, "begin", lambda self: (begin(self), at_load.append(recorder.recorded))[0])
    async with AsyncEngine(config) as engine:
        assert await warmed_up(engine) == WarmUp(3, 3, False)
        assert (at_load, recorder.recorded) == ([2], 3)
        await engine.unload()
        assert engine.health().warm_up == WarmUp(0, 0, False)
        await engine.reload(config.replace(graph_capture="load"))
        assert engine.health().warm_up == WarmUp(3, 3, False)
        await engine.sleep()
        assert engine.health().warm_up == WarmUp(0, 0, False)
        await engine.wake()
        assert engine.health().warm_up == WarmUp(3, 3, False)


async def test_graphs_are_let_go_with_their_model(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of their capture, and without a garbage collection."""
    config = engine_config(checkpoint("llama"))
    graphs_here(monkeypatch, Replayer())
    made: list[weakref.ref[StepGraphs]] = []
    begin = Capturing.begin
    monkeypatch.setattr(Capturing, "begin", lambda self: (made.append(weakref.ref(self.graphs)), begin(self))[1])
    async with AsyncEngine(config) as engine:
        for _ in range(2):
            await engine.unload()
            await engine.reload(config)
        await engine.sleep()
        await engine.unload()
    assert len(made) == 3 and all(graphs() is None for graphs in made)


async def test_an_engine_that_cannot_capture_serves_and_says_so(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(checkpoint("llama"))
    graphs_here(monkeypatch, Replayer(fails_at=0))
    found, notes = await tokens_of(config)
    assert len(found[0]) == 12
    assert [note for note in notes if note.startswith("graphs: the model cannot be captured")]


async def test_a_capture_that_fails_while_the_engine_is_idle_costs_nothing_but_the_rest(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(checkpoint("llama"))
    graphs_here(monkeypatch, Replayer(fails_at=2))
    async with AsyncEngine(config) as engine:
        progress = await warmed_up(engine)
        assert (progress.done, progress.of) == (2, 3)
        assert engine.health().ok
        assert engine.health().notes == progress.notes
        assert progress.notes[0].startswith("graphs: no further steps are captured: operation not permitted")
        assert [len(result.token_ids) for result in await engine.generate_many(PROMPTS, GREEDY)] == [12, 12, 12]
