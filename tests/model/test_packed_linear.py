"""Linear layers in oneDNN's order, and models that are made of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, ReloadError
from asyncengine.model import packed_linear
from asyncengine.model.packed_linear import PackedLinear, pack, supports, writers

pytestmark = pytest.mark.loops("either")

Checkpoint = Callable[..., Path]
CPU = torch.device("cpu")
WIDE = {"hidden_size": 512, "intermediate_size": 512, "tie_word_embeddings": True}

if not supports(torch.float32, CPU):
    pytest.skip("torch has no oneDNN here", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1,), (1, 16), (3, 100), (0,)], ids=str)
def test_a_layer_computes_what_it_did(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    if not supports(dtype, CPU):
        pytest.skip(f"this processor has no products in {dtype}")
    torch.manual_seed(0)
    linear = nn.Linear(700, 400).to(dtype).requires_grad_(False)
    x = torch.randn(*rows, 700).to(dtype)
    wanted = linear(x)
    found = PackedLinear(linear)(x)
    assert found.shape == wanted.shape and found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-2)


def test_small_layers_and_subclasses_stay() -> None:
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(512, 512), Other(512, 512)).requires_grad_(False)
    assert pack(model) == 1
    assert [type(layer) for layer in model] == [nn.Linear, PackedLinear, Other]


def test_short_numbers_are_packed_only_where_the_processor_multiplies_them() -> None:
    assert not supports(torch.float16, CPU)
    assert not supports(torch.float32, torch.device("meta"))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1024, 512)
        self.head = nn.Linear(512, 1024, bias=False)
        self.head.weight = self.embedding.weight
        self.requires_grad_(False)


def test_a_tied_weight_is_written_in_both_places_and_put_back() -> None:
    model = Tied()
    before = model.embedding.weight.clone()
    assert pack(model) == 1
    value, x = torch.randn(1024, 512), torch.randn(2, 512)
    places = writers(model)[id(model.embedding.weight)]
    assert writers(model)[id(model.head.weight)]
    restores = [writer.keep() for writer in places]
    for writer in places:
        writer.write(value)
    assert torch.equal(model.embedding.weight, value)
    torch.testing.assert_close(model.head(x), functional.linear(x, value), rtol=1e-4, atol=1e-4)
    for restore in restores:
        restore()
    assert torch.equal(model.embedding.weight, before)
    torch.testing.assert_close(model.head(x), functional.linear(x, before), rtol=1e-4, atol=1e-4)


def test_each_weight_is_let_go_before_the_next_one_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)) for _ in range(2)]
    model = nn.Sequential(*blocks).requires_grad_(False)
    weights = [weakref.ref(parameter) for parameter in model.parameters() if parameter.dim() == 2]
    del blocks
    alive, made = [], packed_linear._packed

    def packed(weight: torch.Tensor) -> Any:
        alive.append(sum(weight() is not None for weight in weights))
        return made(weight)

    monkeypatch.setattr(packed_linear, "_packed", packed)
    assert pack(model) == 4
    assert alive == [4, 3, 2, 1]


class Shared(nn.Module):
    """Two heads with one weight, and a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(512, 1024, bias=False) for _ in range(2))
        self.second.weight = self.first.weight
        self.third = self.fourth = nn.Linear(512, 1024, bias=False)
        self.requires_grad_(False)


@pytest.mark.parametrize("names", [("first", "second"), ("second", "first"), ("third", "fourth"), ("fourth", "third")])
def test_a_weight_of_several_layers_is_written_for_all_of_them(names: tuple[str, str]) -> None:
    model = Shared()
    assert pack(model) == 3
    value, x = torch.randn(1024, 512), torch.randn(2, 512)
    for writer in writers(model)[id(dict(model.named_parameters(remove_duplicate=False))[f"{names[0]}.weight"])]:
        writer.write(value)
    for name in names:
        torch.testing.assert_close(getattr(model, name)(x), functional.linear(x, value), rtol=1e-4, atol=1e-4)


def _packed(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


async def test_an_engine_serves_packed_layers_and_replaces_their_weights(checkpoint: Checkpoint) -> None:
    """After new weights it generates what an engine does that was loaded with them; after refused ones, what it did."""
    first, second = checkpoint("llama", seed=1, **WIDE), checkpoint("llama", seed=2, **WIDE)
    greedy = GenerationConfig(temperature=0, max_tokens=8, ignore_eos=True)
    config = EngineConfig(str(first), device="cpu", dtype="float32", attention_backend="torch", mode="interactive")

    async def tokens(engine: AsyncEngine) -> list[int]:
        return list((await engine.generate([1, 2, 3], greedy)).token_ids)

    async with AsyncEngine(config) as engine:
        before = await tokens(engine)
        (names,) = await engine.debug_call_func_on_all_workers("tests.model.test_packed_linear:_packed")
        assert "model.layers.0.mlp.gate_proj" in names
        weights = _weights(second)
        with pytest.raises(ReloadError, match="model's is"):
            await engine.update_weights({**weights, "model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2)})
        assert await tokens(engine) == before
        await engine.update_weights(weights)
        after = await tokens(engine)
    async with AsyncEngine(config.replace(model=str(second))) as engine:
        assert await tokens(engine) == after != before


def _weights(path: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return dict(model.named_parameters())


async def test_sleep_and_wake_keep_packed_layers(checkpoint: Checkpoint) -> None:
    config = EngineConfig(str(checkpoint("llama", **WIDE)), device="cpu", dtype="float32", attention_backend="torch")
    greedy = GenerationConfig(temperature=0, max_tokens=8, ignore_eos=True)
    async with AsyncEngine(config) as engine:
        before = (await engine.generate([1, 2, 3], greedy)).token_ids
        await engine.sleep()
        await engine.wake()
        assert (await engine.generate([1, 2, 3], greedy)).token_ids == before
