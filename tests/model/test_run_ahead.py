"""Steps that are launched ahead draw what steps one by one draw: the code of CUDA, with the CPU as its device."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, LogitsRow, RequestResult
from asyncengine.model import runner
from asyncengine.model.buckets import Buckets, padding
from asyncengine.model.graphs import StepGraphs
from asyncengine.model.last_tokens import LastTokens, sources_of
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.sampler import Sampler
from asyncengine.model.step_inputs import StepInputs
from asyncengine.model.way_back import WayBack
from asyncengine.step.batch import StepBatch
from tests.model.test_graphs import Replayer, capture_all
from tests.step.core_case import params

pytestmark = pytest.mark.loops("either")

CPU = torch.device("cpu")
STORY = [7, 19, 3, 44, 120, 65, 9, 9, 31, 150, 77, 8, 101, 5, 60, 12, 90, 33, 2, 71, 18, 55, 140, 27]


def wishes() -> list[tuple[list[int], GenerationConfig]]:
    """Whatever may be launched ahead, and some that may not, beside each other."""
    greedy = GenerationConfig(temperature=0.0, max_tokens=10, ignore_eos=True)
    drawn = GenerationConfig(temperature=1.1, seed=5, max_tokens=11, ignore_eos=True)
    return [
        (STORY[:3], greedy),
        (STORY[:20], greedy.replace(max_tokens=24)),
        ([*STORY[:20], 1, 2], drawn),
        (STORY[:7], drawn.replace(n=3, top_k=9)),
        (STORY[:12], drawn.replace(top_p=0.8, min_p=0.01, n=2)),
        (STORY[:9], drawn.replace(frequency_penalty=0.8, presence_penalty=0.4, repetition_penalty=1.3)),
        (STORY[:5], greedy.replace(repetition_penalty=1.5, logprobs=True, top_logprobs=3)),
        (STORY[:8], drawn.replace(logprobs=True, top_logprobs=2, logprobs_mode="processed")),
        (STORY[:11], drawn.replace(stop_token_ids=list(range(0, 199, 9)), min_tokens=3)),
        (STORY[:4], drawn.replace(logit_bias={17: 4.0, 20: 4.0})),
        (STORY[:6], drawn.replace(allowed_token_ids=list(range(20, 60)))),
        (STORY[:2], greedy.replace(max_tokens=1)),
        (STORY[:10], greedy.replace(max_tokens=0, prompt_logprobs=2)),
        (STORY[:15], drawn.replace(max_tokens=4, bad_words=[[17, 18]])),
    ]


def config_of(path: Path, **changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "prefill_chunk_size": 16, "kv_cache_page_size": 8, "max_num_sequence": 9,
        "max_single_sequence_length": 96, "max_total_sequence_length": 96,
    }  # fmt: skip
    return EngineConfig.from_dict({"model": str(path)} | values | changes)


async def served(config: EngineConfig, run_ahead: bool) -> tuple[list[RequestResult], int, int]:
    launches = 0
    launch = runner.TorchModel.launch

    def counted(self: runner.TorchModel, batch: StepBatch) -> runner.Flight:
        nonlocal launches
        launches += 1
        return launch(self, batch)

    runner.TorchModel.launch = counted  # type: ignore[method-assign]
    try:
        async with AsyncEngine(config, loader=TransformersLoader(run_ahead=run_ahead)) as engine:
            results = await asyncio.gather(*(engine.generate(prompt, wish) for prompt, wish in wishes()))
            results += [await engine.generate(*wishes()[1])]  # after all, with a prefix hit
            metrics = engine.metrics()
            assert metrics.kv_blocks_used == 0
            return results, launches, metrics.counters.preemptions
    finally:
        runner.TorchModel.launch = launch  # type: ignore[method-assign]


def summary(results: list[RequestResult]) -> list[Any]:
    return [
        [(branch.token_ids, branch.finish_reason, branch.stop_reason, branch.logprobs) for branch in result.outputs]
        for result in results
    ]


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [("llama", "cpu"), ("gemma2", "torch"), ("mixtral", "cpu")],
)
@pytest.mark.in_short("mixtral-cpu", "llama-cpu")
def test_tokens_are_the_same(architecture: str, backend: str, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(architecture)
    config = config_of(path, attention_backend=backend)
    one_by_one, none, _ = asyncio.run(served(config, run_ahead=False))
    ahead, launches, preemptions = asyncio.run(served(config, run_ahead=True))
    assert none == 0 and launches > 20
    assert preemptions > 0
    assert ahead[-1].usage.cached_tokens > 0
    if architecture == "llama":  # a compiled step: the same bits in any batch
        assert summary(ahead) == summary(one_by_one)
    tokens = [[branch.token_ids for branch in result.outputs] for result in ahead]
    assert tokens == [[branch.token_ids for branch in result.outputs] for result in one_by_one]


def test_it_is_off_on_the_cpu_and_with_speculation(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    plain, drafting = config_of(path), config_of(path, speculative_mode="ngram")
    for loader, config, launches in (
        (TransformersLoader(), plain, False),
        (TransformersLoader(run_ahead=True), plain, True),
        (TransformersLoader(run_ahead=True), drafting, False),
    ):
        loaded = loader.load(loader.check(config, None))
        assert (loaded.launching is not None) == launches
        assert isinstance(loaded.model, runner.TorchModel)
        assert (loaded.model._last is not None) == (loaded.model._back is not None) == launches
        loaded.model.close()


async def test_a_model_sleeps_wakes_and_is_reloaded_in_the_middle(checkpoint: Callable[..., Path]) -> None:
    config = config_of(checkpoint("llama"), max_total_sequence_length=200)
    wish = GenerationConfig(temperature=0.9, seed=3, max_tokens=24, ignore_eos=True, frequency_penalty=0.5)
    async with AsyncEngine(config, loader=TransformersLoader(run_ahead=True)) as engine:
        expected = (await engine.generate(STORY, wish)).token_ids
        await engine.reset()
        stream = await engine.add_request(STORY, wish)
        first = await anext(stream)
        await engine.sleep()
        await engine.wake()
        await anext(stream)
        await engine.reload(config, "carry")
        rest = [token async for output in stream for token in output.token_ids]
        assert (await stream).token_ids == expected
        assert expected[: len(first.token_ids)] == first.token_ids and rest


def of_rows(unknown: list[bool], slots: list[int], chunk: int = 0) -> StepBatch:
    """Rows that decode, token 100 + row each, and a prefill of `chunk` tokens 200, 201 ... after them."""
    rows = len(unknown)
    tokens = rows + chunk
    starts = [*range(rows + 1), *([tokens] if chunk else [])]
    return dataclasses.replace(
        padding(tokens),
        token_ids=np.array([*range(100, 100 + rows), *range(200, 200 + chunk)], np.int32),
        query_start=np.array(starts, np.int32),
        context_lens=np.zeros(len(starts) - 1, np.int32),
        slot_mapping=np.arange(tokens),
        sample_index=np.arange(rows),
        sample_slots=np.array(slots),
        sample_positions=np.zeros(rows, np.int64),
        num_decodes=rows,
        unknown=np.array(unknown) if any(unknown) else None,
    )


class TestLastTokens:
    def last(self) -> LastTokens:
        last = LastTokens(6, CPU)
        last.store(torch.tensor([4, 1, 5]), torch.tensor([44, 11, 55]))
        return last

    def test_unknown_tokens_have_their_slot_as_source(self) -> None:
        batch = of_rows([True, False, True], [4, 0, 1], chunk=2)
        assert sources_of(batch).tolist() == [4, -1, 1, -1, -1]
        assert sources_of(of_rows([False], [4])).tolist() == [-1]

    def test_a_batch_for_the_host_has_all_its_tokens(self) -> None:
        batch = self.last().known(of_rows([True, False, True], [4, 0, 1], chunk=2))
        assert batch.token_ids.tolist() == [44, 101, 11, 200, 201]
        assert batch.token_ids.dtype == np.int32 and batch.unknown is None
        known = of_rows([False], [4])
        assert self.last().known(known) is known

    @pytest.mark.parametrize("packed", [False, True])
    def test_inputs_take_them_on_the_device(self, packed: bool) -> None:
        inputs = StepInputs(CPU, packed, self.last())
        ids, _, index = inputs.send(of_rows([True, False, True], [4, 0, 1], chunk=2))
        slots = inputs.sample_slots
        inputs.send(of_rows([True], [5]))
        assert ids.tolist() == [[44, 101, 11, 200, 201]]
        assert index.tolist() == [0, 1, 2] and slots.tolist() == [4, 0, 1]
        assert inputs.sample_slots.tolist() == [5]

    def test_captured_steps_take_them_too(self) -> None:
        class Model:
            def begin_with(
                self, batch: StepBatch, sections: object, captured: bool = False, mixed: bool = False
            ) -> tuple[None, None]:
                return None, None

            def forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
                return ids[0, index].float()[:, None]

        last, recorder = self.last(), Replayer()
        graphs = StepGraphs(Model(), Buckets((1, 2, 4)), CPU, recorder, last)
        capture_all(graphs)
        for unknown, slots, expected in (
            ([True, False, True], [4, 0, 1], [44, 101, 11]),
            ([False, False], [4, 5], [100, 101]),
            ([True], [5], [55]),
        ):
            ran = graphs.run(of_rows(unknown, slots))
            assert ran is not None and ran.logits[:, 0].tolist() == expected
            assert ran.slots.tolist() == slots
            last.store(ran.slots, torch.tensor([11 * slot for slot in slots]))
        last.store(torch.tensor([5]), torch.tensor([66]))
        ran = graphs.run(of_rows([True], [5]))
        assert ran is not None and ran.logits.tolist() == [[66.0]]
        assert recorder.replayed == 4


class Event:
    """Of a device that is asked in order; `Device.log` has the order."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.recorded_on: Any = None

    def record(self, stream: Any) -> None:
        self.recorded_on = stream
        self.device.log.append(("record", stream))

    def synchronize(self) -> None:
        self.device.log.append(("synchronize", self.recorded_on))


class Device:
    """Stands in for `torch.cuda`, so that the order of what is queued where can be looked at."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.current = "compute"

    def Event(self, blocking: bool = False) -> Event:
        return Event(self)

    def Stream(self, device: torch.device) -> Any:
        return Side(self)

    def current_stream(self, device: torch.device) -> str:
        return self.current

    def stream(self, stream: Any) -> Any:
        return stream


class Side:
    def __init__(self, device: Device) -> None:
        self.device = device

    def __repr__(self) -> str:
        return "side"

    def wait_event(self, event: Event) -> None:
        self.device.log.append(("wait", event.recorded_on))

    def __enter__(self) -> None:
        self.device.current = "side"

    def __exit__(self, *_: object) -> None:
        self.device.current = "compute"


class TestWayBack:
    def test_on_the_cpu_what_was_computed_is_there(self) -> None:
        tensor = torch.arange(3)
        assert [array.tolist() for array in WayBack(CPU).send([tensor]).wait()] == [[0, 1, 2]]
        assert WayBack(CPU).send(()).wait() == []

    def test_copies_are_queued_beside_the_compute_stream_behind_the_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = Device()
        monkeypatch.setattr(torch, "cuda", device)
        back = WayBack(CPU)
        back._cuda, back._stream = True, device.Stream(CPU)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
        on_its_way = [
            back.send([torch.arange(3) + step, torch.full((2, 2), step, dtype=torch.float64)]) for step in range(2)
        ]
        assert [what for what, _ in device.log] == ["record", "wait", "record"] * 2
        assert device.log[0][1] == device.log[1][1] == "compute" and str(device.log[2][1]) == "side"
        found = [one.wait() for one in on_its_way]
        back.send([torch.arange(9), torch.zeros(1)])
        back.send([torch.arange(99)])  # a place that is used again leaves what was taken from it alone
        for step, (tokens, values) in enumerate(found):
            assert tokens.tolist() == [step, step + 1, step + 2]
            assert values.tolist() == [[step, step]] * 2 and values.dtype == np.float64
        assert [str(of) for what, of in device.log if what == "synchronize"] == ["side", "side"]


def test_a_slot_may_have_another_sequence_before_the_tokens_of_the_last_one_are_there() -> None:
    """As after an abort while a step is under way."""
    sampler, rows = Sampler(2, 8, CPU), []

    def look(logits: torch.Tensor, row: LogitsRow) -> None:
        rows.append(row.token_ids.tolist())

    empty, slots = np.empty(0, np.int32), np.array([0, 1])
    for slot in slots.tolist():
        sampler.place(slot, params(allowed_token_ids=(3, 4)), 0, np.array([1], np.int32), empty)
    logits = torch.arange(16.0).reshape(2, 8)
    drawn = sampler.draw(logits, slots, np.zeros(2, np.int64), follows=False)
    sampler.place(0, params(logits_processors=(look,)), 0, np.array([2], np.int32), empty)
    sampler.place(1, params(), 0, np.array([2], np.int32), empty)
    tokens = sampler.finish(drawn, [tensor.numpy() for tensor in drawn.tensors])
    assert tokens.token_ids.tolist() == [4, 4] and not tokens.failed
    sampler.sample(torch.zeros(1, 8), slots[:1], np.zeros(1, np.int64))
    assert rows == [[]]  # the new one has not seen the old one's token
