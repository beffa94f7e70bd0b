"""Linear layers in fp8, and models that are made of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from asyncengine import AsyncEngine, ConfigError, EngineConfig, GenerationConfig, ReloadError
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.quantised import fp8_linear
from asyncengine.model.quantised.fp8_linear import Fp8Linear, RowKernel, quantise, quantised
from asyncengine.model.runner import TorchModel
from asyncengine.step.model import LoadedModel
from tests.model.attention.triton_device import DEVICE, require_triton

pytestmark = pytest.mark.loops("either")

Checkpoint = Callable[..., Path]


def load(path: Path, **changes: Any) -> LoadedModel:
    config = EngineConfig(str(path), device="cpu", dtype="bfloat16", quantization="fp8", mode="interactive")
    loader = TransformersLoader()
    return loader.load(loader.check(config.replace(**changes), None))


def inner(loaded: LoadedModel) -> Any:
    assert isinstance(loaded.model, TorchModel)
    return loaded.model._model


def test_each_row_fills_the_range() -> None:
    numbers = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    numbers *= torch.tensor([1e-6, 1, 50, 1e6, 0])[:, None]
    codes, scales = quantised(numbers)
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (5, 1)
    assert codes.float().abs().amax(1).tolist() == [448.0] * 4 + [0.0]
    errors = (codes.float() * scales - numbers).norm(dim=1) / numbers.norm(dim=1).clamp_min(1e-12)
    assert (errors < 0.03).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [16, 96, 5000])
def test_the_kernel_quantises_as_torch_does(columns: int, dtype: torch.dtype) -> None:
    require_triton()
    numbers = torch.randn(4, columns + 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    numbers[1] *= 1e4
    numbers[2] = 0
    view = numbers[:, :columns].to(DEVICE)
    codes, scales = RowKernel()(view)
    wanted_codes, wanted_scales = quantised(view)
    torch.testing.assert_close(scales, wanted_scales)
    off = (codes.float() - wanted_codes.float()).abs()
    # A number that lies between two may fall on either side where the scale's last bit differs.
    assert (off > 0).float().mean() < 1e-3
    assert (off <= codes.float().abs() / 8 + 2**-9).all()


def test_without_scales_of_rows_numbers_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU with torch 2.11."""
    torch.manual_seed(0)
    layer = Fp8Linear.of(nn.Linear(64, 48).to(torch.bfloat16).requires_grad_(False))
    x = torch.randn(7, 64).to(torch.bfloat16)
    monkeypatch.setattr(fp8_linear, "_scales_rows_on_cpu", lambda: False)
    codes, scales = quantised(x)
    weight = layer.weight.float() * layer.weight_scale.T
    wanted = (codes.float() * scales) @ weight.T + layer.bias.float()
    found = layer(x)
    assert found.dtype is torch.bfloat16
    assert (found.float() - wanted).norm() < 4e-3 * wanted.norm()


def test_a_layer_is_near_what_it_was() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 7, 64).to(torch.bfloat16)
    wanted = linear(x)
    found = Fp8Linear.of(linear)(x)
    assert found.shape == wanted.shape and found.dtype == torch.bfloat16
    error = float((found - wanted).float().norm() / wanted.float().norm())
    assert 1e-3 < error < 0.05
    assert Fp8Linear.of(linear)(x[:, :0]).shape == (2, 0, 48)


class Tied(nn.Module):
    """One layer under two names, two layers of one weight, and layers that share theirs with something else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(32, 32, bias=False)
        self.again = self.one
        self.inner = nn.ModuleDict({"same": self.one, "weight": nn.Linear(32, 32)})
        self.inner["weight"].weight = self.one.weight
        self.alone = nn.Linear(32, 16)
        self.table = nn.Embedding(64, 32)
        self.lookup, self.head, self.like_head = (nn.Linear(32, 64, bias=False) for _ in range(3))
        self.lookup.weight = self.table.weight
        self.like_head.weight = self.head.weight
        self.to(torch.bfloat16).requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared: torch.Tensor = self.inner["weight"](self.inner["same"](self.again(self.one(x))))
        return shared


def test_layers_that_share_a_weight_share_it_in_fp8() -> None:
    model = Tied()
    x = torch.randn(3, 32).to(torch.bfloat16)
    wanted = model(x)
    assert quantise(model) == (32 * 32 + 32 * 16, 32 * 32 + 32 + 32 * 16 + 16 + 64 * 32 + 64 * 32)
    first, other = model.one, model.inner["weight"]
    assert isinstance(first, Fp8Linear) and isinstance(other, Fp8Linear)
    assert model.again is first and model.inner["same"] is first and other is not first
    assert other.weight is first.weight and other.bias is not None and first.bias is None
    assert isinstance(model.alone, Fp8Linear) and model.alone.weight is not first.weight
    assert all(type(layer) is nn.Linear for layer in (model.lookup, model.head, model.like_head))
    assert model.lookup.weight is model.table.weight and model.like_head.weight is model.head.weight
    assert float((model(x) - wanted).float().norm() / wanted.float().norm()) < 0.1


def test_new_weights_of_layers_that_share_them_reach_all_of_them() -> None:
    model, plain = Tied(), Tied()
    quantise(model)
    model.inner["weight"].weight_scale = model.inner["weight"].weight_scale.clone()  # as after a move to another device
    runner = TorchModel(model, None, None, torch.device("cpu"))  # type: ignore[arg-type]
    new = torch.randn(32, 32).to(torch.bfloat16) * 3
    plain.one.weight.copy_(new)
    x = torch.randn(3, 32).to(torch.bfloat16)
    for name in ("again.weight", "inner.weight.weight"):
        for layer in (model.one, model.inner["weight"]):
            layer.write(torch.zeros(32, 32))
        runner.update_weights({name: new})
        assert float((model(x) - plain(x)).float().norm() / plain(x).float().norm()) < 0.1
    with pytest.raises(ReloadError, match=r"'one\.weight' is \(32, 32\) of torch\.float32"):
        runner.update_weights({"one.weight": new.float()})


async def test_an_engine_serves_and_says_how_far_off_it_is(checkpoint: Checkpoint) -> None:
    config = EngineConfig(
        str(checkpoint("llama")), device="cpu", dtype="bfloat16", quantization="fp8", mode="interactive"
    )
    async with AsyncEngine(config) as engine:
        (note,) = [note for note in engine.health().notes if note.startswith("quantization")]
        assert "fp8" in note and "of their norm off; slow on cpu" in note
        result = await engine.generate([1, 2, 3], GenerationConfig(temperature=0, max_tokens=4, ignore_eos=True))
        assert len(result.token_ids) == 4


def test_everything_but_the_head_and_odd_sizes_is_in_fp8(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint("qwen2", intermediate_size=100))
    model = inner(loaded)
    kept = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    mlp = {f"model.layers.{i}.mlp.{name}_proj" for i in range(3) for name in ("gate", "up", "down")}
    assert kept == {*mlp, "lm_head"}
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.bias.dtype == torch.bfloat16
    whole = load(checkpoint("qwen2", intermediate_size=100), quantization="none", decoder_backend="transformers")
    assert loaded.memory_bytes < whole.memory_bytes
    loaded.model.close()
    whole.model.close()


def test_new_weights_are_those_of_a_new_model(checkpoint: Checkpoint) -> None:
    old, new = (load(checkpoint("llama", seed=seed)) for seed in (0, 1))
    weights = AutoModelForCausalLM.from_pretrained(checkpoint("llama", seed=1), dtype=torch.bfloat16).state_dict()
    old.model.update_weights(weights)
    for (name, mine), (_, theirs) in zip(inner(old).state_dict().items(), inner(new).state_dict().items(), strict=True):
        assert torch.equal(mine.float(), theirs.float()), name
    layers = zip(fp8_linear.layers(inner(old)).values(), fp8_linear.layers(inner(new)).values(), strict=True)
    assert all(torch.equal(a.weight_scale, b.weight_scale) for a, b in layers)
    with pytest.raises(ReloadError, match=r"of torch\.float32; the model's is \(64, 64\) of torch\.bfloat16"):
        old.model.update_weights({"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)})
    old.model.close()
    new.model.close()


def test_new_weights_that_fail_leave_the_old_ones(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(checkpoint("llama"))
    model = inner(loaded)
    before = [(layer.weight.float(), layer.weight_scale.clone()) for layer in fp8_linear.layers(model).values()]
    last = list(fp8_linear.layers(model).values())[-1]

    def fail(value: torch.Tensor) -> None:
        raise RuntimeError("the last one fails")

    monkeypatch.setattr(last, "write", fail)
    state = AutoModelForCausalLM.from_pretrained(checkpoint("llama", seed=3), dtype=torch.bfloat16).state_dict()
    with pytest.raises(ReloadError, match="none was replaced"):
        loaded.model.update_weights(state)
    after = [(layer.weight.float(), layer.weight_scale) for layer in fp8_linear.layers(model).values()]
    assert all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(before, after, strict=True))
    loaded.model.close()


def test_each_weight_is_let_go_before_the_next_one_is_quantised(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.bfloat16).requires_grad_(False)
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    weights = [weakref.ref(layer.weight) for layer in layers]
    del layers
    alive, made = [], fp8_linear.quantised

    def counted(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alive.append(sum(weight() is not None for weight in weights))
        return made(numbers)

    monkeypatch.setattr(fp8_linear, "quantised", counted)
    quantise(model)
    assert alive == list(range(len(weights), 0, -1))


def test_a_model_of_other_layers_alone_has_nothing_to_quantise(checkpoint: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("gpt2"), dtype=torch.bfloat16)
    assert quantise(model)[0] == 0
    with pytest.raises(ReloadError, match="has no linear layers that could be in fp8"):
        load(checkpoint("gpt2"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "float32"}, "quantization is 'fp8' with dtype float32; allowed: bfloat16"),
        ({"decoder_backend": "compiled"}, "with decoder_backend 'compiled', which has no products in fp8"),
    ],
)
def test_where_nothing_multiplies_it_it_is_refused(changes: dict[str, Any], said: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=said):
        load(checkpoint("llama"), **changes)


def test_older_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncengine.model.load_settings import check_fp8

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"compute capability 8\.0 \(NVIDIA A100\); allowed: 8\.9 and later"):
        check_fp8(EngineConfig("x", quantization="fp8"), torch.device("cuda"))
