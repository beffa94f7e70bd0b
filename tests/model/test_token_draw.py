"""Draws that can be captured: the same bits as the sampler's own, and nothing that would wait for a device."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from asyncengine.generation import SamplingParams
from asyncengine.model import device_copy, token_draw
from asyncengine.model.buckets import Buckets, padding
from asyncengine.model.graphs import StepGraphs
from asyncengine.model.last_tokens import LastTokens
from asyncengine.model.packed_buffer import PackedBuffer
from asyncengine.model.sampler import Sampler
from asyncengine.model.token_draw import FILTERED, DrawKind, DrawSettings
from asyncengine.model.token_ranking import argmax
from asyncengine.step.batch import StepBatch
from tests.model.test_graphs import Replayer, capture_all
from tests.model.test_sampler import params

CPU = torch.device("cpu")
VOCAB = 700
NONE = np.empty(0, np.int32)
GREEDY = params(temperature=0.0, top_k=600, top_p=0.3)
ROWS = {
    DrawKind.GREEDY: [GREEDY, params(temperature=0.0)],
    DrawKind.PLAIN: [GREEDY, params(), params(temperature=0.6), params(temperature=1.7, min_p=0.05)],
    DrawKind.NARROW: [
        GREEDY,
        params(top_k=1),
        params(top_k=128, temperature=3.0),
        params(top_k=20, top_p=0.7),
        params(),
    ],
    DrawKind.NUCLEUS: [GREEDY, params(top_p=0.9), params(top_p=0.2, temperature=2.0, min_p=0.01), params(min_p=0.1)],
}


@pytest.fixture
def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for a device whose values the host cannot look at without waiting."""
    monkeypatch.setattr(device_copy, "_AT_HAND", "none")


def placed(rows: list[SamplingParams], spare: int = 0) -> Sampler:
    sampler = Sampler(len(rows) + spare, VOCAB, CPU)
    for slot, row in enumerate(rows):
        sampler.place(slot, dataclasses.replace(row, seed=31 + slot), slot % 3, NONE, NONE)
    return sampler


def logits_of(rows: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    logits[-1, :40] = logits[-1].max()  # equals, for those that must break ties
    if seed % 5 == 0:
        logits[rows // 2, 3] = torch.nan
    if seed % 7 == 0:
        logits[0] = -torch.inf
    return logits.to(dtype)


@pytest.mark.usefixtures("out_of_reach")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(DrawKind))
@pytest.mark.in_short("torch.float32")
def test_the_tokens_are_those_of_the_sampler(kind: DrawKind, dtype: torch.dtype) -> None:
    sampler, buffer, different = placed(ROWS[kind] * 3), PackedBuffer(CPU), set()
    slots = np.random.default_rng(0).permutation(3 * len(ROWS[kind]))
    for position in range(25):
        positions = np.full(len(slots), position)
        logits = logits_of(len(slots), position, dtype)
        expected = sampler.draw(logits.clone(), slots, positions, follows=False).tokens
        assert sampler.kind(slots, positions) is kind
        padded = len(slots) + 2
        settings = DrawSettings.of(buffer.send_sections(sampler.settings(kind, slots, positions, padded)))
        logits = torch.cat([logits, torch.full((2, VOCAB), torch.nan, dtype=dtype)])
        tokens = token_draw.draw(kind, logits, argmax(logits), settings)
        assert tokens[: len(slots)].tolist() == expected.tolist()
        different.update(expected.tolist())
    assert len(different) > 20


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": ((3, 1.0),)},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"num_logprobs": 0},
        {"allowed_token_ids": (1, 2)},
        {"bad_words": ((1, 2),)},
        {"min_tokens": 5, "stop_token_ids": (4,)},
        {"logits_processors": (lambda logits, row: None,)},
        {"top_k": token_draw.MOST_CANDIDATES + 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_needs_more_has_no_kind_and_leaves_none_behind(changes: dict[str, Any]) -> None:
    sampler = placed([params(), params(**changes)])
    both, first = np.arange(2), np.zeros(2, np.int64)
    assert sampler.kind(both, first) is None
    assert sampler.kind(both[:1], first[:1]) is DrawKind.PLAIN
    sampler.place(1, params(top_k=4), 0, NONE, NONE)
    assert sampler.kind(both, first) is DrawKind.NARROW
    sampler.release(1)
    assert sampler.kind(both[1:], first[1:]) is DrawKind.GREEDY


def test_min_tokens_matter_until_they_are_there() -> None:
    sampler, slot = placed([params(min_tokens=5, stop_token_ids=(4,))]), np.zeros(1, np.int64)
    assert [sampler.kind(slot, np.array([n])) for n in (0, 4, 5)] == [None, None, DrawKind.PLAIN]


def test_top_k_beside_top_p_alone_has_no_kind() -> None:
    assert placed([params(top_k=4), params(top_p=0.5)]).kind(np.arange(2), np.zeros(2, np.int64)) is None


class NoWaiting(TorchDispatchMode):
    """Fails on what makes the host wait for a device, if its tensors were there."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(self.WAITS) and name != "equal_":
            raise AssertionError(f"{func} waits for the device")
        if name.startswith(("index", "_index_put")) and len(args) > 1 and isinstance(args[1], (list, tuple)):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise AssertionError(f"{func} with a mask waits for the device")
        if name.startswith("repeat_interleave") and "output_size" not in (kwargs or {}):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.where(x > 0),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
    ],
)
def test_the_watch_sees_what_waits(waits: Any) -> None:
    x = torch.arange(4.0)
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        waits(x)


class Echo:
    """Logits that depend on the id; brings nothing to the device itself."""

    def __init__(self) -> None:
        self.table = torch.randn(256, VOCAB, generator=torch.Generator().manual_seed(1)) * 3

    def begin_with(
        self, batch: StepBatch, sections: object, captured: bool = False, mixed: bool = False
    ) -> tuple[None, None]:
        return None, None

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.table[ids[0, index] % 256]


def decodes(slots: list[int], position: int, ids: list[int] | None = None) -> StepBatch:
    rows = np.arange(len(slots))
    return dataclasses.replace(
        padding(len(slots)),
        token_ids=np.array(ids or [0] * len(slots), np.int32),
        query_start=np.arange(len(slots) + 1, dtype=np.int32),
        context_lens=np.zeros(len(slots), np.int32),
        slot_mapping=rows,
        sample_index=rows,
        sample_slots=np.array(slots),
        sample_positions=np.full(len(slots), position),
        num_decodes=len(slots),
        unknown=None if ids else np.ones(len(slots), np.bool_),
    )


@pytest.fixture
def graphs() -> tuple[StepGraphs, Replayer, LastTokens]:
    last, recorder = LastTokens(8, CPU), Replayer()
    made = StepGraphs(Echo(), Buckets((1, 2, 4)), CPU, recorder, last, FILTERED)
    capture_all(made)
    return made, recorder, last


class TestCapturedDraws:
    def test_there_is_one_for_each_bucket_and_kind(self, graphs: tuple[StepGraphs, Replayer, LastTokens]) -> None:
        assert graphs[0].captured_draws == tuple((size, kind) for size in (1, 2, 4) for kind in FILTERED)
        assert graphs[1].recorded == 3 + 9
        graphs[0].clear()
        assert graphs[0].captured_draws == ()

    @pytest.mark.usefixtures("out_of_reach")
    @pytest.mark.parametrize("kind", list(DrawKind))
    def test_steps_follow_each_other_on_the_device(
        self, kind: DrawKind, graphs: tuple[StepGraphs, Replayer, LastTokens]
    ) -> None:
        """Three rows in a bucket of four; each step's ids are the tokens of the one before, never seen by the host."""
        captured, recorder, last = graphs
        sampler, slots, ids = placed(ROWS[kind][:3], spare=5), [2, 0, 1], [5, 6, 7]
        assert sampler.kind(np.array(slots), np.zeros(3, np.int64)) is kind
        drawn, before = [], recorder.replayed
        with torch.inference_mode(), NoWaiting():
            for position in range(6):
                ran = captured.run(decodes(slots, position, None if position else ids), sampler)
                assert ran is not None and ran.tokens is not None
                drawn.append(ran.tokens)
        assert recorder.replayed - before == 6 * (1 if kind is DrawKind.GREEDY else 2)
        model = Echo()
        for position, tokens in enumerate(drawn):  # what was drawn first is not written over by what came later
            expected = sampler.draw(model.table[torch.tensor(ids) % 256], np.array(slots), np.full(3, position))
            ids = expected.tokens.tolist()
            assert tokens.tolist() == ids
        assert last.tensor[slots].tolist() == ids
        assert last.tensor[3 : last.nowhere].tolist() == [0] * 5  # rows of padding store nothing

    def test_what_has_no_kind_gets_logits_alone(self, graphs: tuple[StepGraphs, Replayer, LastTokens]) -> None:
        sampler = placed([params(num_logprobs=1), params()])
        ran = graphs[0].run(decodes([0, 1], 0, [5, 6]), sampler)
        assert ran is not None and ran.tokens is None
        assert ran.slots.tolist() == [0, 1]
        assert torch.equal(ran.logits, Echo().table[[5, 6]])

    @pytest.mark.usefixtures("out_of_reach")
    def test_draws_that_cannot_be_captured_are_launched_and_noted(self) -> None:
        last, recorder = LastTokens(4, CPU), Replayer(fails_at=2)
        captured = StepGraphs(Echo(), Buckets((1, 2, 4)), CPU, recorder, last, FILTERED)
        capture_all(captured)
        assert captured.captured == (1, 2, 4) and captured.captured_draws == ()
        assert captured.notes == [
            "graphs: draws cannot be captured, they are launched: operation not permitted when stream is capturing"
        ]
        sampler = placed(ROWS[DrawKind.NUCLEUS])
        with torch.inference_mode():
            ran = captured.run(decodes([1, 2], 3, [5, 6]), sampler)
        expected = sampler.draw(Echo().table[[5, 6]], np.array([1, 2]), np.full(2, 3)).tokens
        assert ran is not None and ran.tokens is not None and torch.equal(ran.tokens, expected)
        assert torch.equal(last.tensor[[1, 2]], expected)

    @pytest.mark.usefixtures("out_of_reach")
    def test_those_that_are_captured_stay_where_others_cannot_be(self) -> None:
        last, recorder = LastTokens(4, CPU), Replayer(fails_at=3)
        captured = capture_all(StepGraphs(Echo(), Buckets((1, 2, 4)), CPU, recorder, last, FILTERED))
        assert captured.captured == (1, 2, 4) and captured.captured_draws == ((4, DrawKind.PLAIN),)
        assert captured.notes[0].startswith("graphs: no further draws are captured, they are launched: operation not")
        sampler = placed(ROWS[DrawKind.PLAIN])
        for slots in ([0, 1, 2], [1, 2]):
            with torch.inference_mode():
                ran = captured.run(decodes(slots, 3, [5, 6, 7][: len(slots)]), sampler)
            rows = Echo().table[[5, 6, 7][: len(slots)]]
            expected = sampler.draw(rows, np.array(slots), np.full(len(slots), 3)).tokens
            assert ran is not None and ran.tokens is not None and torch.equal(ran.tokens, expected)

    @pytest.mark.usefixtures("out_of_reach")
    def test_a_capture_in_a_step_draws_nothing_twice(self) -> None:
        """It runs the step several times; the ids of the next run must not be the tokens of the one before."""

        class Grows(Echo):
            key = 0

            def begin_with(
                self, batch: StepBatch, sections: object, captured: bool = False, mixed: bool = False
            ) -> Any:
                return type("Plan", (), {"graph_key": self.key}), None

        model, last, recorder = Grows(), LastTokens(4, CPU), Replayer()
        captured = StepGraphs(model, Buckets((1, 2)), CPU, recorder, last, FILTERED)
        capture_all(captured)
        sampler = placed(ROWS[DrawKind.PLAIN])
        first = captured.run(decodes([1, 2], 0, [5, 6]), sampler)
        model.key = 1
        second = captured.run(decodes([1, 2], 1), sampler)
        assert first is not None and second is not None and first.tokens is not None
        logits, own = model.table[first.tokens % 256], placed(ROWS[DrawKind.PLAIN])
        assert second.tokens is not None
        assert torch.equal(second.tokens, own.draw(logits, np.array([1, 2]), np.full(2, 1)).tokens)
        assert torch.equal(last.tensor[[1, 2]], second.tokens)
        assert recorder.recorded == 8 + 4  # the bucket of two, and its three draws
