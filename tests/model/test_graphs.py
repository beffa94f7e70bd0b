"""Captured steps, with a recorder that runs on the CPU: what is captured when, and what happens if it cannot be."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.model import graphs as graphs_module
from asyncengine.model.buckets import Buckets
from asyncengine.model.graph_recorder import Tensors
from asyncengine.model.graphs import StepGraphs, _nothing, capture_steps
from asyncengine.model.loader import TransformersLoader
from asyncengine.step.batch import StepBatch

CPU = torch.device("cpu")


class Replayer:
    """Stands in for CUDA graphs: runs the function again, into the tensor that the first run returned."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.recorded = 0
        self.replayed = 0
        self._fails_at = fails_at

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        if self.recorded == self._fails_at:
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

    def begin_with(self, batch: StepBatch, sections: object) -> tuple[Plan, None]:
        self.begun.append(batch)
        return Plan((len(batch.token_ids), self.key)), None

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return torch.stack((ids[0, index], positions[0, index]), 1)


def decodes(count: int, first: int = 100) -> StepBatch:
    rows = np.arange(count)
    return dataclasses.replace(
        _nothing(count),
        token_ids=(first + rows).astype(np.int32),
        positions=rows.astype(np.int32) * 3,
        query_start=np.arange(count + 1, dtype=np.int32),
        context_lens=rows.astype(np.int32) * 3,
        slot_mapping=rows,
        sample_index=rows,
        num_decodes=count,
    )


def captured(model: Model, sizes: tuple[int, ...] = (1, 2, 4), **others: Any) -> StepGraphs:
    graphs = StepGraphs(model, Buckets(sizes), CPU, others.pop("recorder", None) or Replayer())
    graphs.capture(60.0, **others)
    return graphs


def test_captures_the_largest_first_and_reports_each() -> None:
    model, said = Model(), list[tuple[int, int]]()
    graphs = captured(model, progress=lambda done, of: said.append((done, of)))
    assert [len(batch.token_ids) for batch in model.begun] == [4, 2, 1]
    assert said == [(1, 3), (2, 3), (3, 3)]
    assert graphs.captured == (1, 2, 4)
    assert graphs.notes == []


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


def test_out_of_time_smaller_steps_use_the_larger_graphs() -> None:
    model = Model()
    ticks = itertools.count()
    graphs = StepGraphs(model, Buckets((1, 2, 4)), CPU, Replayer())
    graphs.capture(2.0, clock=lambda: float(next(ticks)))  # the third look at the clock is too late
    assert graphs.captured == (4,)
    assert graphs.notes == ["graphs: 1 of 3 were captured within 2 s"]
    ran = graphs.run(decodes(1))
    assert ran is not None
    assert ran.logits.tolist() == [[100, 0]]
    assert len(model.begun[-1].token_ids) == 4


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_failed_capture_leaves_a_model_without_graphs_and_a_note(fails_at: int) -> None:
    graphs = captured(Model(), recorder=Replayer(fails_at))
    assert graphs.captured == ()
    assert graphs.notes == [
        "graphs: the model cannot be captured, it runs without: operation not permitted when stream is capturing"
    ]
    assert graphs.run(decodes(1)) is None


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

        def begin_with(self, batch: StepBatch, sections: object) -> tuple[Plan, None]:
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
    graphs.capture()
    assert graphs.captured == (1, 2, 4)


def test_the_cpu_has_no_graphs() -> None:
    assert capture_steps(Model(), "cpu", 4, CPU) == (None, ())


def test_attention_whose_plan_has_no_fixed_place_is_not_captured() -> None:
    graphs, notes = capture_steps(Model(), "torch", 4, torch.device("cuda"))
    assert graphs is None
    assert notes == ("graphs: the torch attention plans in tensors of changing sizes; none are captured",)


GREEDY = GenerationConfig(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8], list(range(1, 40))]


def engine_config(path: Path) -> EngineConfig:
    return EngineConfig(
        str(path), device="cpu", dtype="float32", attention_backend="torch", max_num_sequence=4, prefill_chunk_size=16
    )


async def tokens_of(config: EngineConfig, run_ahead: bool = False) -> tuple[list[list[int]], tuple[str, ...]]:
    async with AsyncEngine(config, loader=TransformersLoader(run_ahead=run_ahead)) as engine:
        results = await engine.generate_many(PROMPTS, GREEDY)
        await engine.sleep()
        await engine.wake()
        again = await engine.generate_many(PROMPTS, GREEDY)
        assert [result.token_ids for result in again] == [result.token_ids for result in results]
        return [result.token_ids for result in results], engine.health().notes


@pytest.mark.parametrize("run_ahead", [False, True])
async def test_an_engine_generates_the_same_with_captured_steps(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, run_ahead: bool
) -> None:
    config = engine_config(checkpoint("llama"))
    expected, notes = await tokens_of(config)
    assert notes == ()
    recorder = Replayer()

    def capture(model: Any, backend_name: str, sequences: int, device: torch.device, last: Any) -> Any:
        graphs = StepGraphs(model, Buckets.upto(sequences), device, recorder, last)
        graphs.capture()
        return graphs, tuple(graphs.notes)

    monkeypatch.setattr(graphs_module, "capture_steps", capture)
    found, notes = await tokens_of(config, run_ahead)
    assert found == expected
    assert notes == ()
    assert recorder.recorded == 6  # 1, 2 and 4 sequences, once more after waking
    assert recorder.replayed >= 2 * 11


async def test_an_engine_that_cannot_capture_serves_and_says_so(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(checkpoint("llama"))

    def capture(model: Any, backend_name: str, sequences: int, device: torch.device, last: Any) -> Any:
        graphs = StepGraphs(model, Buckets.upto(sequences), device, Replayer(fails_at=0), last)
        graphs.capture()
        return graphs, tuple(graphs.notes)

    monkeypatch.setattr(graphs_module, "capture_steps", capture)
    found, notes = await tokens_of(config)
    assert len(found[0]) == 12
    assert [note for note in notes if note.startswith("graphs: the model cannot be captured")]
