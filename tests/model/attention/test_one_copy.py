"""Whatever a step brings to the device goes there in one copy, beside the Triton attention's plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from triton_device import require_triton

from asyncengine.model import device_copy, sampler, token_masks, token_penalties
from asyncengine.model.attention.protocol import CarryingBackend, LayerSpec
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.attention.triton import TritonAttention
from asyncengine.model.buckets import Buckets
from asyncengine.model.graphs import StepGraphs
from asyncengine.model.last_tokens import LastTokens
from asyncengine.model.packed_buffer import PackedBuffer
from asyncengine.model.step_inputs import StepInputs
from asyncengine.model.token_draw import FILTERED, DrawKind, DrawSettings
from asyncengine.step.batch import StepBatch
from tests.model.test_graphs import Replayer, capture_all
from tests.model.test_token_draw import ROWS, Echo, decodes, placed

CPU = torch.device("cpu")


class Planned(Echo):
    """Plans as a model over the Triton attention does; what it computes needs no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = TritonAttention(programs=4, tuned={})
        self.attention.allocate(LayerSpec(2, 1, 16, 16, 1.0), 8, 16, torch.float32, CPU)
        self.plans: list[Any] = []

    def begin_with(self, batch: StepBatch, sections: Any, captured: bool = False, mixed: bool = False) -> Any:
        plan, sent = self.attention.plan_with(batch, 16, CPU, sections)
        self.plans.append(plan)
        return plan, sent


def step(slots: list[int], position: int, ids: list[int]) -> StepBatch:
    return dataclasses.replace(decodes(slots, position, ids), block_tables=np.zeros((len(slots), 1), np.int32))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was copied to the device."""
    require_triton()
    monkeypatch.setattr(device_copy, "_AT_HAND", "none")
    made: list[str] = []
    packed, single = PackedBuffer._copy, device_copy.to_device

    def copy(self: PackedBuffer, start: int, end: int) -> torch.Tensor:
        made.append("packed")
        return packed(self, start, end)

    def one(array: Any, device: torch.device) -> torch.Tensor:
        made.append("single")
        return single(array, device)

    monkeypatch.setattr(PackedBuffer, "_copy", copy)
    for module in (sampler, token_masks, token_penalties):
        monkeypatch.setattr(module, "to_device", one)
    return made


@pytest.mark.parametrize("kind", list(DrawKind))
def test_of_a_captured_step(kind: DrawKind, copies: list[str]) -> None:
    model, last = Planned(), LastTokens(8, CPU)
    graphs = StepGraphs(model, Buckets((1, 2, 4)), CPU, Replayer(), last, FILTERED)
    capture_all(graphs)
    recorded, rows = len(model.plans), placed(ROWS[kind][:2])
    for position in range(3):
        copies.clear()
        ran = graphs.run(step([1, 0], position, [9, 8]), rows)
        assert ran is not None and ran.tokens is not None
        assert copies == ["packed"]
    assert len({plan.buffer.data_ptr() for plan in model.plans[recorded:]}) == 1
    assert all(plan.buffer.data_ptr() % 16 == 0 for plan in model.plans)


def test_of_a_step_that_is_launched(copies: list[str]) -> None:
    model, rows = Planned(), placed(ROWS[DrawKind.NUCLEUS][:2])
    inputs, batch = StepInputs(CPU, True, LastTokens(8, CPU)), step([1, 0], 0, [9, 8])
    others = rows.settings(DrawKind.NUCLEUS, batch.sample_slots, batch.sample_positions, 2)
    ids, _, index = inputs.send(batch, others, lambda sections: model.begin_with(batch, sections)[1])
    assert copies == ["packed"]
    assert ids.tolist() == [[9, 8]] and index.tolist() == [0, 1] and inputs.sample_slots.tolist() == [1, 0]
    assert DrawSettings.of(inputs.sent).top_k.tolist() == [[0], [-1]]


def test_attention_that_plans_on_its_own_carries_nothing() -> None:
    require_triton()
    assert isinstance(TritonAttention(), CarryingBackend)
    assert not isinstance(TorchAttention(), CarryingBackend)
