"""Adapters that each token looks up: what the kernels add, and when what was captured with them no longer holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncengine.model import architecture
from asyncengine.model.adapters import adapted_modules
from asyncengine.model.adapters.adapted_modules import AdaptedModules, groups_of, places_of
from asyncengine.model.adapters.factor_table import COLUMNS, FactorTable
from asyncengine.model.adapters.lora import LowRank
from asyncengine.model.buckets import padding
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.model.recorded import Recorded
from asyncengine.model.runner import TorchModel
from tests.model.adapters import save_adapter
from tests.model.attention.triton_device import require_triton

CPU = torch.device("cpu")
LAYERS = {"wide": (70, COLUMNS + 30), "narrow": (300, 24)}


def low_rank(layer: str, rank: int, scaling: float = 1.0, dtype: torch.dtype = torch.float32) -> LowRank:
    outputs, inputs = LAYERS[layer]
    up = torch.randn(rank, outputs, dtype=dtype).t()
    return LowRank(torch.randn(rank, inputs, dtype=dtype), up, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_token_gets_what_its_own_adapter_adds(dtype: torch.dtype) -> None:
    require_triton()
    torch.manual_seed(0)
    table = FactorTable(LAYERS, CPU)
    adapters = {
        0: {"wide": low_rank("wide", 3, 0.5, dtype)},
        17: {"wide": low_rank("wide", 20, 2.0, dtype), "narrow": low_rank("narrow", 9, -1.0, dtype)},
    }
    for place, adapter in adapters.items():
        table.put(place, adapter)
    places = [0, -1, 17, 17, 0]
    for name, (outputs, inputs) in LAYERS.items():
        x = torch.randn(inputs, len(places), dtype=dtype).t()  # stored as its transpose
        results = torch.randn(len(places), 2 * outputs, dtype=dtype)[:, :outputs]  # rows apart
        expected = results.double()
        for token, place in enumerate(places):
            if (factors := adapters.get(place, {}).get(name)) is not None:
                inner = factors.down.double() @ x[token].double()
                expected[token] += factors.scaling * (factors.up.double() @ inner)
        before = results.clone()
        table.add(name, x, results, torch.tensor(places, dtype=torch.int32))
        assert torch.equal(results[1], before[1])
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
        torch.testing.assert_close(results.double(), expected, rtol=tolerance, atol=tolerance)


def test_what_was_captured_holds_until_there_are_more_layers_larger_ranks_or_more_places() -> None:
    require_triton()
    table, seen = FactorTable(LAYERS, CPU), set[int]()

    def changed(change: Callable[[], object]) -> bool:
        before = table.generation
        change()
        assert table.generation not in seen or table.generation == before
        seen.add(table.generation)
        return table.generation != before

    assert changed(lambda: table.put(0, {"wide": low_rank("wide", 4)}))
    assert not changed(lambda: table.put(0, {"wide": low_rank("wide", 8)}))
    assert not changed(lambda: table.put(15, {"wide": low_rank("wide", 1)}))
    assert changed(lambda: table.put(1, {"wide": low_rank("wide", 9)}))
    assert changed(lambda: table.put(1, {"narrow": low_rank("narrow", 9)}))
    assert not changed(lambda: table.remove(1))
    assert changed(lambda: table.put(16, {"wide": low_rank("wide", 9)}))
    assert changed(table.clear)
    assert not table.layers


def test_without_memory_for_more_places_all_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    require_triton()
    table = FactorTable(LAYERS, CPU)
    table.put(0, {"narrow": low_rank("narrow", 2)})

    def added() -> torch.Tensor:
        results = torch.zeros(1, 300)
        table.add("narrow", torch.ones(1, 24), results, torch.zeros(1, dtype=torch.int32))
        return results

    before, zeros, made = added(), torch.zeros, []

    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(args)
        if len(made) == 4:  # the second table
            raise torch.OutOfMemoryError("full")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(torch.OutOfMemoryError):
        table.put(16, {"narrow": low_rank("narrow", 200)})
    monkeypatch.undo()
    assert torch.equal(added(), before)
    table.put(0, {"narrow": low_rank("narrow", 3)})
    assert not torch.equal(added(), before)


def test_who_goes_or_is_replaced_adds_nothing_any_more() -> None:
    require_triton()
    table = FactorTable(LAYERS, CPU)
    table.put(0, {"wide": low_rank("wide", 4)})
    table.put(1, {"wide": low_rank("wide", 4), "narrow": low_rank("narrow", 2)})
    which, x = torch.tensor([0, 1], dtype=torch.int32), torch.randn(2, 24)

    def added() -> list[bool]:
        results = torch.zeros(2, 300)
        table.add("narrow", x, results, which)
        return results.bool().any(1).tolist()

    assert added() == [False, True]
    table.put(1, {"wide": low_rank("wide", 4)})
    assert added() == [False, False]
    table.put(1, {"narrow": low_rank("narrow", 2)})
    assert added() == [False, True]
    table.remove(1)
    assert added() == [False, False]


def rows(*sizes: int, adapters: list[int] | None) -> Any:
    step = padding(sum(sizes))
    start = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
    own = None if adapters is None else np.array(adapters, np.int32)
    return dataclasses.replace(step, query_start=start, context_lens=np.zeros(len(sizes), np.int32), adapters=own)


def test_places_are_those_of_rows_and_none_of_padding() -> None:
    assert places_of(rows(1, 3, 2, adapters=[4, -1, 0]), 8).tolist() == [4, -1, -1, -1, 0, 0, -1, -1]
    assert places_of(rows(1, 1, adapters=None), 2).tolist() == [-1, -1]


def recorded(path: Path) -> Recorded:
    return architecture.record(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=architecture.ATTENTION)
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_adds_the_same_as_adapter_by_adapter(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear layers, and those that store their weights as columns."""
    require_triton()
    model = AutoModelForCausalLM.from_pretrained(path := checkpoint(name), dtype=torch.float32)
    adapted = AdaptedModules(model, recorded(path), CPU, torch.float32, by_token=True)
    for index, (rank, only) in enumerate(((2, None), (11, "v_proj" if name == "llama" else "c_attn"))):
        save_adapter(tmp_path / str(index), model, index, rank=rank, only=only)
        adapted.put(index, adapted.format.prepare(tmp_path / str(index), None))
    step = rows(1, 3, 2, 1, adapters=[1, -1, 0, 1])
    ids = torch.arange(7)[None]
    order, groups = groups_of(step)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits[0]

    plain = run()
    with adapted.applied(groups, torch.from_numpy(order), 7):
        expected = run()
    with adapted.looked_up(torch.from_numpy(places_of(step, 7))):
        found = run()
    assert adapted.by_token(7) and not adapted.by_token(2000)
    assert adapted.capturable
    monkeypatch.setattr(adapted_modules, "MOST_RANK", 8)
    assert not adapted.by_token(7) and not adapted.capturable
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3) and torch.equal(run(), plain)


def test_where_triton_is_not_there_adapters_go_one_by_one(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("asyncengine.model.adapters.factor_table.importlib.import_module", nothing)
    model = AutoModelForCausalLM.from_pretrained(path := checkpoint("llama"), dtype=torch.float32)
    adapted = AdaptedModules(model, recorded(path), CPU, torch.float32, by_token=True)
    assert not adapted.by_token(1) and not adapted.capturable


def test_fused_kernels_leave_steps_with_adapters_to_the_modules(checkpoint: Callable[..., Path]) -> None:
    require_triton()
    model = AutoModelForCausalLM.from_pretrained(path := checkpoint("llama"), dtype=torch.float32)
    fused, runner = Fused(), TorchModel(model, PagedLayers([], None, None, None, CPU), None, CPU)
    adapted = AdaptedModules(model, recorded(path), CPU, torch.float32, by_token=True)
    runner.use_fused(fused)
    runner.use_adapters(adapted)
    inputs = torch.arange(3)[None], torch.arange(3)[None], torch.tensor([2])
    with torch.inference_mode():
        runner.forward(*inputs)
        with adapted.looked_up(torch.full((3,), -1, dtype=torch.int32)):
            logits = runner.forward(*inputs)
        torch.testing.assert_close(logits, model(input_ids=inputs[0]).logits[0, 2:])
        with adapted.applied([], torch.empty(0, dtype=torch.long), 3):
            assert torch.equal(runner.forward(*inputs), logits)
    assert fused.ran == 1


class Fused:
    ran = 0

    def serves(self, tokens: int) -> bool:
        return True

    def forward(self, *inputs: torch.Tensor) -> None:
        self.ran += 1
