"""Products with what stands before and after them, in one launch and in several, against plain torch in float64."""

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
from asyncengine.model.fused import tiles, wide_product
from asyncengine.model.fused.launches import Formula
from asyncengine.model.fused.product import Product
from asyncengine.model.fused.tiles import MOST_TOKENS, Tile
from asyncengine.model.fused.wide_product import merged
from asyncengine.model.quantised import fp8_linear
from tests.model.cuda.pretended import pretended
from tests.model.fused.interpreted import DEVICE, require_triton

require_triton()

INPUTS = 52
MANY = MOST_TOKENS + 1
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


@pytest.mark.parametrize("tokens", [1, MOST_TOKENS, MANY])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_matrices_of_different_sizes_behind_a_norm(dtype: torch.dtype, tokens: int) -> None:
    parts = [linear(outputs, dtype, bias=True) for outputs in (37, 16, 5)]
    before = norm("plain", dtype)
    x = random(tokens, INPUTS, dtype)
    wanted = torch.cat([product_of(normed(x.double(), before), part) for part in parts], 1)
    assert_near(Product(Formula(parts, before))(x), wanted, dtype)


@pytest.mark.parametrize("tokens", range(1, MANY + 1))
def test_each_number_of_tokens_with_a_residual(tokens: int) -> None:
    part = linear(33, torch.float32)
    x, residual = random(tokens, INPUTS, torch.float32), random(tokens, 33, torch.float32)
    wanted = residual.double() + 0.7 * product_of(x.double(), part)
    assert_near(Product(Formula([part], factor=0.7))(x, residual), wanted, torch.float32)


@pytest.mark.parametrize("kind", ["plain", "offset", "layer norm"])
@pytest.mark.parametrize("tokens", [1, 3, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norms(kind: str, tokens: int, dtype: torch.dtype) -> None:
    part, before = linear(20, dtype), norm(kind, dtype)
    x = random(tokens, INPUTS, dtype)
    assert_near(Product(Formula([part], before))(x), product_of(normed(x.double(), before), part), dtype)


@pytest.mark.parametrize("tokens", [1, 3, MANY])
def test_large_activations_do_not_overflow_in_float16(tokens: int) -> None:
    part, before = linear(20, torch.float16), norm("plain", torch.float16)
    before.module.weight.fill_(8.0)
    x = random(tokens, INPUTS, torch.float16)
    x[:, 3] = 60_000.0
    found = Product(Formula([part], before))(x)
    assert found.isfinite().all()
    assert_near(found, product_of(normed(x.double(), before), part), torch.float16)


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize(("gated", "tokens"), [(False, 1), (True, 1), (True, 3), (False, MANY), (True, MANY)])
def test_activations(name: str, gated: bool, tokens: int) -> None:
    parts = [linear(21, torch.float32, bias=True) for _ in range(1 + gated)]
    x = random(tokens, INPUTS, torch.float32)
    wanted = FUNCTIONS[name](product_of(x.double(), parts[0]))
    if gated:
        wanted = wanted * product_of(x.double(), parts[1])
    found = Product(Formula(parts, gated=gated, activation=ACTIVATIONS[name]))(x)
    assert_near(found, wanted, torch.float32)


def test_logits_are_scaled_and_capped_in_float32() -> None:
    part = linear(40, torch.bfloat16)
    x = random(2, INPUTS, torch.bfloat16)
    found = Product(Formula([part], factor=3.0, cap=5.0, dtype=torch.float32))(x)
    assert found.dtype is torch.float32
    assert_near(found, 5.0 * torch.tanh(3.0 * product_of(x.double(), part) / 5.0), torch.float32)


def test_a_part_of_a_fused_layer_is_read_where_it_is() -> None:
    whole = linear(60, torch.float32).linear
    parts = [Projection(whole, 0, 25), Projection(whole, 25, 60)]
    x = random(2, INPUTS, torch.float32)
    assert_near(Product(Formula(parts))(x), product_of(x.double(), Projection(whole)), torch.float32)


def test_new_weights_are_seen_at_once() -> None:
    part = linear(20, torch.float32)
    product = Product(Formula([part]))
    few, many = random(1, INPUTS, torch.float32), random(MANY, INPUTS, torch.float32)
    for _ in range(2):
        for x in (few, many):
            assert_near(product(x), product_of(x.double(), part), torch.float32)
        part.weight.mul_(-2.0)


@pytest.mark.parametrize("tokens", [1, MANY])
@pytest.mark.parametrize("residual", [False, True])
def test_what_no_single_launch_can_compute_is_computed_by_several(tokens: int, residual: bool) -> None:
    """Weights whose outputs are columns; siblings of which one has a bias; a bias beside a residual."""
    transposed = Projection(Conv1D(20, INPUTS).requires_grad_(False).to(DEVICE), transposed=True)
    siblings = [linear(8, torch.float32, bias=True), linear(12, torch.float32)]
    for parts in ([transposed], siblings[:1] if residual else siblings):
        x = random(tokens, INPUTS, torch.float32)
        wanted = torch.cat([product_of(x.double(), part) for part in parts], 1)
        added = random(*wanted.shape, torch.float32) if residual else None
        wanted = wanted if added is None else added.double() + 0.5 * wanted
        formula = Formula(parts, factor=0.5 if residual else 1.0)
        assert_near(Product(formula)(x, added), wanted, torch.float32)


@pytest.mark.parametrize("tokens", [1, MANY])
def test_layers_in_fp8_share_the_codes_of_their_input(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(64, width, bias=False, dtype=torch.bfloat16, device=DEVICE) for width in (32, 16)]
    narrow = [fp8_linear.Fp8Linear.of(layer) for layer in layers]
    x, calls = random(tokens, 64, torch.bfloat16), list[int]()
    wanted = torch.cat([layer(x) for layer in narrow], 1)
    codes_of = fp8_linear.codes_of
    monkeypatch.setattr(wide_product, "codes_of", lambda rows: calls.append(len(rows)) or codes_of(rows))
    found = Product(Formula([Projection(layer) for layer in narrow]))(x)
    assert torch.equal(found, wanted) and calls == [tokens]
    residual = random(tokens, 32, torch.bfloat16)
    wanted = residual + narrow[0](x)
    assert torch.equal(Product(Formula([Projection(narrow[0])]))(x, residual), wanted)


def test_neighbours_in_one_layer_are_one_product() -> None:
    whole, other = linear(60, torch.float32).linear, linear(8, torch.float32).linear
    parts = [Projection(whole, 0, 25), Projection(whole, 25, 60), Projection(other)]
    (one, widths), (rest, [width]) = merged(parts)
    assert (one.linear, one.start, one.stop) == (whole, 0, 60) and rest is parts[2]
    assert (widths, width) == ([25, 35], 8)
    for tokens in (1, MANY):
        x = random(tokens, INPUTS, torch.float32)
        for found, part in zip(Product(Formula(parts)).apart(x), parts, strict=True):
            assert_near(found, product_of(x.double(), part), torch.float32)
    assert len(merged([parts[1], parts[0]])) == 2  # not in this order
    assert len(merged([Projection(whole, 0, 25), Projection(whole, 26, 60)])) == 2


def test_weights_that_would_have_to_be_copied_are_refused() -> None:
    with pytest.raises(NotRecognised, match="alternate in one layer"):
        Product(Formula([Projection(nn.Linear(INPUTS, 24), 0, 4, 12)]))
    whole = fp8_linear.Fp8Linear.of(nn.Linear(64, 32, dtype=torch.bfloat16))
    with pytest.raises(NotRecognised, match="only a part is wanted"):
        Product(Formula([Projection(whole, 0, 16)]))
    with pytest.raises(NotRecognised, match="only a part is wanted"):
        Product(Formula([Projection(whole), linear(8, torch.bfloat16, inputs=64)]))


@pytest.mark.long
def test_layer_norms_are_launched_apart_where_triton_takes_minutes_to_compile_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pretended() as device:
        norm = NormPart(nn.LayerNorm(64, device="cuda").requires_grad_(False), 1e-5, 0.0, centred=True)
        projection = Projection(nn.Linear(64, 32, device="cuda").requires_grad_(False))
        x = torch.randn(1, 64, device="cuda")
        for version, centred, launched in (
            ("3.6.0", True, "norm_rows"), ("3.6.0", False, "project"), ("3.9.1", True, "project")
        ):  # fmt: skip
            monkeypatch.setattr("triton.__version__", version)
            before = device.kernels.copy()
            with torch.inference_mode():
                Product(Formula([projection], dataclasses.replace(norm, centred=centred)))(x)
            assert set(device.kernels - before) == {launched}
        del x, norm, projection
