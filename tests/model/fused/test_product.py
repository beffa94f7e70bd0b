"""The fused product against plain torch in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from asyncengine.model.decoder.blueprint import ACTIVATIONS
from asyncengine.model.decoder.parts import NormPart, NotRecognised, Projection
from asyncengine.model.fused import tiles
from asyncengine.model.fused.product import Product
from asyncengine.model.fused.tiles import MOST_TOKENS, Tile
from tests.model.cuda.pretended import pretended
from tests.model.fused.interpreted import DEVICE, require_triton

require_triton()

INPUTS = 52
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FUNCTIONS: dict[str, Any] = {
    "silu": functional.silu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs for each matrix and several turns for the inputs; neither comes out even."""
    monkeypatch.setattr(tiles, "tile_for", lambda *_: Tile(32, 32))


def linear(outputs: int, dtype: torch.dtype, bias: bool = False, inputs: int = INPUTS) -> Projection:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype, device=DEVICE)
    nn.init.normal_(layer.weight, std=0.2)
    return Projection(layer.requires_grad_(False))


def norm(kind: str, dtype: torch.dtype) -> NormPart:
    """By the root mean square, the same with weights less one (Gemma), or LayerNorm."""
    module = nn.LayerNorm(INPUTS, bias=kind == "layer norm", dtype=dtype, device=DEVICE).requires_grad_(False)
    module.weight.normal_(1.0 - (kind == "offset"), 0.3)
    if kind == "layer norm":
        module.bias.normal_()
    return NormPart(module, 1e-5, float(kind == "offset"), kind == "layer norm")


def normed(x: torch.Tensor, part: NormPart) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True) if part.centred else x
    x = x / (x.square().mean(-1, keepdim=True) + part.epsilon).sqrt() * (part.weight.double() + part.offset)
    return x if part.bias is None else x + part.bias.double()


def product_of(x: torch.Tensor, part: Projection) -> torch.Tensor:
    return functional.linear(x, part.weight.double(), None if part.bias is None else part.bias.double())


def random(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(tokens, width, device=DEVICE) + 0.5).to(dtype)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, MOST_TOKENS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_matrices_of_different_sizes_behind_a_norm(dtype: torch.dtype, tokens: int) -> None:
    parts = [linear(outputs, dtype, bias=True) for outputs in (37, 16, 5)]
    before = norm("plain", dtype)
    x = random(tokens, INPUTS, dtype)
    wanted = torch.cat([product_of(normed(x.double(), before), part) for part in parts], 1)
    assert_near(Product(parts, before)(x), wanted, dtype)


@pytest.mark.parametrize("tokens", range(1, MOST_TOKENS + 1))
def test_each_number_of_tokens_with_a_residual(tokens: int) -> None:
    part = linear(33, torch.float32)
    x, residual = random(tokens, INPUTS, torch.float32), random(tokens, 33, torch.float32)
    wanted = residual.double() + 0.7 * product_of(x.double(), part)
    assert_near(Product([part], factor=0.7)(x, residual), wanted, torch.float32)


@pytest.mark.parametrize("kind", ["plain", "offset", "layer norm"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norms(kind: str, tokens: int, dtype: torch.dtype) -> None:
    part, before = linear(20, dtype), norm(kind, dtype)
    x = random(tokens, INPUTS, dtype)
    assert_near(Product([part], before)(x), product_of(normed(x.double(), before), part), dtype)


@pytest.mark.parametrize("tokens", [1, 3])
def test_large_activations_do_not_overflow_in_float16(tokens: int) -> None:
    part, before = linear(20, torch.float16), norm("plain", torch.float16)
    before.module.weight.fill_(8.0)
    x = random(tokens, INPUTS, torch.float16)
    x[:, 3] = 60_000.0
    found = Product([part], before)(x)
    assert found.isfinite().all()
    assert_near(found, product_of(normed(x.double(), before), part), torch.float16)


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize(("gated", "tokens"), [(False, 1), (True, 1), (True, 3)])
def test_activations(name: str, gated: bool, tokens: int) -> None:
    parts = [linear(21, torch.float32, bias=True) for _ in range(1 + gated)]
    x = random(tokens, INPUTS, torch.float32)
    wanted = FUNCTIONS[name](product_of(x.double(), parts[0]))
    if gated:
        wanted = wanted * product_of(x.double(), parts[1])
    found = Product(parts, gated=gated, activation=ACTIVATIONS[name])(x)
    assert_near(found, wanted, torch.float32)


def test_logits_are_scaled_and_capped_in_float32() -> None:
    part = linear(40, torch.bfloat16)
    x = random(2, INPUTS, torch.bfloat16)
    found = Product([part], factor=3.0, cap=5.0, dtype=torch.float32)(x)
    assert found.dtype is torch.float32
    assert_near(found, 5.0 * torch.tanh(3.0 * product_of(x.double(), part) / 5.0), torch.float32)


def test_a_part_of_a_fused_layer_is_read_where_it_is() -> None:
    whole = linear(60, torch.float32).linear
    parts = [Projection(whole, 0, 25), Projection(whole, 25, 60)]
    x = random(2, INPUTS, torch.float32)
    assert_near(Product(parts)(x), product_of(x.double(), Projection(whole)), torch.float32)


def test_new_weights_are_seen_at_once() -> None:
    part = linear(20, torch.float32)
    product, x = Product([part]), random(1, INPUTS, torch.float32)
    product(x)
    part.weight.mul_(-2.0)
    assert_near(product(x), product_of(x.double(), part), torch.float32)


def test_weights_that_lie_otherwise_are_refused() -> None:
    with pytest.raises(NotRecognised, match="not rows that follow each other"):
        Product([Projection(Conv1D(8, INPUTS), transposed=True)])
    with pytest.raises(NotRecognised, match="not rows that follow each other"):
        Product([Projection(nn.Linear(INPUTS, 24), 0, 4, 12)])


def test_siblings_of_which_one_has_a_bias_are_refused() -> None:
    with pytest.raises(NotRecognised, match="whether they have a bias"):
        Product([linear(8, torch.float32, bias=True), linear(8, torch.float32)])


def test_layer_norms_are_left_alone_where_triton_takes_minutes_to_compile_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended():
        norm = NormPart(nn.LayerNorm(64, device="cuda"), 1e-5, 0.0, centred=True)
        projection = Projection(nn.Linear(64, 32, device="cuda").requires_grad_(False))
        monkeypatch.setattr("triton.__version__", "3.6.0")
        with pytest.raises(NotRecognised, match=r"triton 3\.6 takes minutes to compile layer norms"):
            Product([projection], norm)
        Product([projection], dataclasses.replace(norm, centred=False))
        monkeypatch.setattr("triton.__version__", "3.9.1")
        Product([projection], norm)
