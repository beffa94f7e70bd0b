"""Captured steps over FlashInfer and FlashAttention-3, with stand-ins for both.

What is replayed launches what it launched when it was captured, from the addresses that it had then. So here a later
step is attended to with the plan of the step that was captured, after its own was made.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attention_case import CPU, dense, layer, random_row, shuffled_tables, step_batch
from fake_libraries import modules
from transformers import LlamaConfig

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.model import capacity, graph_memory, graphs, loader
from asyncengine.model import capturing as capturing_module
from asyncengine.model.attention import flashinfer
from asyncengine.model.attention.flash_attention import FlashAttention3
from asyncengine.model.attention.flashinfer import FlashInferAttention
from asyncengine.model.attention.select import Selection
from asyncengine.model.buckets import Buckets, padded, padding
from asyncengine.model.graph_recorder import Tensors
from asyncengine.model.graphs import StepGraphs, graphs_for
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.model.token_draw import FILTERED
from asyncengine.step.batch import StepBatch
from asyncengine.step.limits import Limits

pytestmark = pytest.mark.loops("either")

Backend = FlashInferAttention | FlashAttention3
CUDA = torch.device("cuda")
PAGE = 4
LIMITS = Limits(max_num_sequence=6, max_single_sequence_length=64, prefill_chunk_size=16, page_size=PAGE, num_blocks=80)
SPECS = [layer(key_dim=64), layer(key_dim=64, sliding_window=9), layer(key_dim=128, kv_heads=4, soft_cap=3.0)]


@pytest.fixture(params=["flashinfer", "flash_attention_3"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 1 << 10)
    return FlashInferAttention() if request.param == "flashinfer" else FlashAttention3()


class Layers:
    """One layer of each kind, over the same rows."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.caches = [backend.allocate(spec, LIMITS.num_blocks, PAGE, torch.float16, CPU) for spec in SPECS]
        for cache in self.caches:
            cache.keys.fill_(torch.nan)
            cache.values.fill_(torch.nan)
        backend.reserve(LIMITS, CPU)

    def step(self, contexts: list[int], size: int, seed: int) -> tuple[StepBatch, list[list[Any]]]:
        """A step of decodes, and the rows of each layer, whose contexts are in its cache."""
        tables, _ = shuffled_tables([context + 1 for context in contexts], PAGE, seed)
        batch = padded(step_batch([1] * len(contexts), contexts, tables, PAGE), size)
        rows = []
        for spec, cache in zip(SPECS, self.caches, strict=True):
            rows.append([random_row(spec, context, 1, torch.float16, seed + i) for i, context in enumerate(contexts)])
            for row, table in zip(rows[-1], tables, strict=True):
                at = np.arange(row.context)
                for stored, given in ((cache.keys, row.keys), (cache.values, row.values)):
                    stored[np.asarray(table)[at // PAGE], at % PAGE] = given[: row.context].half()
        return batch, rows

    def attend(self, plan: Any, rows: list[list[Any]], size: int) -> None:
        """By one plan, over all layers; compared with dense attention."""
        for spec, cache, given in zip(SPECS, self.caches, rows, strict=True):
            query, keys, values = (
                torch.ones(size, heads, spec.key_dim).half()
                for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
            )
            for i, row in enumerate(given):
                query[i], keys[i], values[i] = row.query[0], row.keys[-1], row.values[-1]
            output = self.backend.attend(spec, cache, plan, query, keys, values, None)
            assert output.shape == (size, spec.num_heads, spec.value_dim) and output.isfinite().all()
            for i, row in enumerate(given):
                expected = dense(spec, row, None)[0]
                torch.testing.assert_close(output[i].double(), expected, rtol=1e-3, atol=2e-3)


def addresses(plan: Any) -> list[int]:
    """Of all that launches read of a plan."""
    if isinstance(plan, flashinfer.FlashInferDecodes):
        wrappers: list[Any] = list(plan.planned.values())
        tensors = [plan.writes.slots]
        tensors += [tensor for each in wrappers for tensor in (each.start, each.indices, each.last, each.schedule)]
    else:
        tensors = [plan.writes.slots, plan.query_start, plan.lengths, plan.tables]
    return [tensor.data_ptr() for tensor in tensors]


def test_a_captured_launch_finds_the_rows_of_every_later_step(backend: Backend) -> None:
    layers = Layers(backend)
    captured = {}
    for size in (6, 4):  # the largest is captured first
        plan = captured[size] = backend.plan_captured(padding(size), PAGE, CPU)
        layers.attend(plan, [[], [], []], size)
    where = {size: addresses(plan) for size, plan in captured.items()}
    for seed, (size, contexts) in enumerate([(4, [9]), (6, [0, 3, 4, 55, 1]), (4, [63, 7, 8, 20]), (6, [5] * 6)]):
        batch, rows = layers.step(contexts, size, seed)
        plan = backend.plan_captured(batch, PAGE, CPU)
        assert plan is not captured[size] and addresses(plan) == where[size]
        assert plan.graph_key == captured[size].graph_key
        layers.attend(captured[size], rows, size)
        eager = backend.plan(batch, PAGE, CPU)  # of a step between that is not captured
        layers.attend(eager, rows, size)
        assert eager.graph_key is None
    assert captured[4].graph_key != captured[6].graph_key


@pytest.mark.parametrize("backend", ["flashinfer"], indirect=True)
def test_flashinfer_plans_every_kind_of_layer_before_a_graph_is_replayed(backend: Backend) -> None:
    layers = Layers(backend)
    layers.attend(backend.plan_captured(padding(2), PAGE, CPU), [[], [], []], 2)
    made = sys.modules["flashinfer"].BatchDecodeWithPagedKVCacheWrapper.made
    for steps in range(2, 5):
        plan = backend.plan_captured(layers.step([steps, 1], 2, steps)[0], PAGE, CPU)
        assert list(plan.planned.values()) == made and len(made) == len(SPECS)
        assert [wrapper.plans for wrapper in made] == [steps] * len(SPECS)
    layers.attend(backend.plan_captured(padding(3), PAGE, CPU), [[], [], []], 3)
    assert len(made) == 2 * len(SPECS)
    assert len({wrapper.schedule.data_ptr() for wrapper in made}) == len(SPECS)  # they take 8 MiB each


def test_a_step_with_drafts_is_planned_as_it_is_and_fits_no_graph(backend: Backend) -> None:
    layers = Layers(backend)
    tables, _ = shuffled_tables([4, 1], PAGE, 0)
    batch = padded(step_batch([3, 1], [1, 0], tables, PAGE), 6)
    plan = backend.plan_captured(batch, PAGE, CPU)
    assert plan.graph_key is None
    spec = SPECS[0]
    ones = torch.ones(6, spec.num_kv_heads, spec.key_dim).half()
    layers.caches[0].keys.fill_(1), layers.caches[0].values.fill_(1)
    output = backend.attend(spec, layers.caches[0], plan, torch.ones(6, 4, 64).half(), ones, ones, None)
    assert torch.equal(output, torch.cat((torch.ones(4, 4, 64), torch.zeros(2, 4, 64))).half())


def test_what_is_large_enough_stays_and_what_is_not_gets_another_key(backend: Backend) -> None:
    layers = Layers(backend)
    first = backend.plan_captured(padding(2), PAGE, CPU)
    layers.attend(first, [[], [], []], 2)
    backend.reserve(dataclasses.replace(LIMITS, max_num_sequence=2), CPU)
    assert addresses(backend.plan_captured(padding(2), PAGE, CPU)) == addresses(first)
    backend.reserve(dataclasses.replace(LIMITS, max_single_sequence_length=4096), CPU)
    again = backend.plan_captured(padding(2), PAGE, CPU)
    layers.attend(again, [[], [], []], 2)
    assert again.graph_key != first.graph_key
    assert not set(addresses(again)[:1]) & set(addresses(first))


def test_graphs_are_made_and_their_memory_is_set_aside(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "StepGraphs", lambda *args, **others: "graphs")
    assert graphs_for(None, backend, 4, CUDA) == ("graphs", ())  # type: ignore[arg-type]
    text = LlamaConfig(vocab_size=64, hidden_size=64)
    details: Any = SimpleNamespace(device=CUDA, draft=None, hf_config=text, dtype=torch.bfloat16)
    config = EngineConfig("m")
    ours = graph_memory.reserve(text, torch.bfloat16, 16, draws=True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 128 << 20)
    found = capacity.graph_reserve(config, details, backend, 16, SPECS)
    assert found is not None
    # Schedules of three kinds, and one more; parts of 16 tokens with two heads of 64 or one of 128 for each KV head.
    more = 4 * (8 << 20) if backend.name == "flashinfer" else 132 * 16 * 4 * 130
    assert found.nbytes - ours.nbytes == more and found.graphs == ours.graphs


@pytest.mark.parametrize("backend", ["flashinfer"], indirect=True)
def test_pinned_memory_of_a_plan_is_written_when_the_copy_before_is_done(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(backend, FlashInferAttention)
    layers, said = Layers(backend), list[str]()
    layers.attend(backend.plan_captured(padding(2), PAGE, CPU), [[], [], []], 2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    for planner in backend._decoders.values():
        planner.copied = SimpleNamespace(  # type: ignore[assignment]
            synchronize=lambda: said.append("waited"), record=lambda stream: said.append(f"recorded on {stream}")
        )
        plan = planner.wrapper.plan
        planner.wrapper.plan = lambda *args, plan=plan, **others: (said.append("planned"), plan(*args, **others))[0]
    backend.plan_captured(padding(2), PAGE, CPU)
    assert said == ["waited", "planned", "recorded on stream"] * len(SPECS)


@pytest.mark.parametrize("backend", ["flashinfer"], indirect=True)
def test_flashinfer_gets_the_work_space_that_its_scheduler_asks_for(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its arithmetic: heads x tiles x rows of a tile x (a value and its sum), in float32."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 128 << 20)
    schedules, llama = 2 * (8 << 20), layer(heads=32, kv_heads=8, key_dim=128)
    assert backend.capture_bytes([llama], 256, CUDA) == schedules  # 319 tiles: 84 MB
    tiles = 1024 * 4 // 16 + 1023
    assert backend.capture_bytes([llama], 1024, CUDA) == schedules + 32 * tiles * 16 * 129 * 4 + 256 - (128 << 20)
    one_head = layer(heads=48, kv_heads=1, key_dim=128)  # 264 tiles of 64 rows
    assert backend.capture_bytes([one_head], 1, CUDA) == schedules + 48 * 264 * 64 * 129 * 4 + 256 - (128 << 20)
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 1 << 10)
    layers = Layers(backend)
    layers.attend(backend.plan_captured(padding(2), PAGE, CPU), [[], [], []], 2)
    (made, *_) = sys.modules["flashinfer"].BatchDecodeWithPagedKVCacheWrapper.made
    assert len(made.workspace) >= 4 * 6 * 4 * 16 * 65


class Baking:
    """Stands in for CUDA graphs: what was recorded runs again with the attention's plan of that time."""

    def __init__(self, layers: PagedLayers) -> None:
        self.layers = layers
        self.replayed = 0

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        function()  # so that the attention knows all kinds of layers, as the recorder for CUDA does
        plan, outputs = self.layers.plan, tuple(output.clone() for output in function())

        def replay() -> None:
            self.replayed += 1
            present, self.layers.plan = self.layers.plan, plan
            with torch.inference_mode():
                for output, again in zip(outputs, function(), strict=True):
                    output.copy_(again)
            self.layers.plan = present

        return replay, outputs


@pytest.mark.parametrize("run_ahead", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.in_short("flashinfer")
async def test_an_engine_generates_the_same_with_captured_steps(
    backend: Backend, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, run_ahead: bool
) -> None:
    config = EngineConfig(
        str(checkpoint("gemma3_text", num_hidden_layers=2, head_dim=64)), device="cpu", dtype="bfloat16",
        attention_backend=backend.name, max_num_sequence=4, prefill_chunk_size=16, graph_capture="load",
    )  # fmt: skip
    monkeypatch.setattr(loader, "select_attention", lambda config, device, dtype: Selection(type(backend)()))
    recorders: list[Baking] = []

    async def tokens() -> list[list[int]]:
        greedy = GenerationConfig(temperature=0, max_tokens=12, ignore_eos=True)
        async with AsyncEngine(config, loader=TransformersLoader(run_ahead=run_ahead)) as engine:
            prompts = [[5, 6, 7], [8], list(range(1, 40))]
            first = [result.token_ids for result in await engine.generate_many(prompts, greedy)]
            await engine.sleep()
            await engine.wake()
            assert [result.token_ids for result in await engine.generate_many(prompts, greedy)] == first
            assert not [note for note in engine.health().notes if note.startswith("graphs:")]
            return first

    expected = await tokens()

    def made(
        model: Any, attention: Any, sequences: int, device: torch.device, last: Any, waits: str | None, states: Any
    ) -> Any:
        recorders.append(Baking(model._layers))
        kinds = () if last is None else FILTERED
        return StepGraphs(model, Buckets.upto(sequences), device, recorders[-1], last, kinds, states=states), ()

    monkeypatch.setattr(graphs, "graphs_for", made)
    monkeypatch.setattr(capturing_module, "FIRST_SECONDS", 600.0)
    assert await tokens() == expected
    (recorder,) = recorders
    assert recorder.replayed >= 2 * 11
