"""Linear layers multiplied by the compiled code, beside torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from asyncengine.config import Quantization
from asyncengine.model.attention import kernel
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.decoder.compiled_layers import compile_layers
from asyncengine.model.decoder.compiled_linear import CompiledLinear, Products
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.quantised.four_bits import FourBits, nearest

KINDS: list[tuple[torch.dtype, Quantization, float]] = [
    (torch.float32, "none", 1e-6),
    (torch.bfloat16, "none", 4e-3),
    (torch.float16, "none", 6e-4),
    (torch.bfloat16, "int8", 1e-2),
    (torch.bfloat16, "int4", 1e-1),
]
"""And how far from torch's product of the numbers as they were one may be."""
each_kind = pytest.mark.parametrize(
    ("dtype", "quantization", "most"), KINDS, ids=[f"{kernel.DTYPES[kind[0]]}-{kind[1]}" for kind in KINDS]
)


def products(dtype: torch.dtype, quantization: Quantization = "none") -> Products:
    kind = kernel.kind_of(dtype, quantization)
    return Products(CpuAttention(kind).library(kind), dtype, quantization)


class Model(nn.Module):
    """Some layers by their names, and a head, if one is called so."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.requires_grad_(False)

    def get_output_embeddings(self) -> Any:
        return self._modules.get("head")


def compiled(layer: nn.Module, of: Products) -> CompiledLinear:
    model = Model(layer=layer)
    compile_layers(model, of)
    assert isinstance(model.layer, CompiledLinear)
    return model.layer


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).norm() / wanted.norm())


@each_kind
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 1), (48, 37), (96, 64), (704, 1000)])
def test_a_layer_computes_what_it_did(
    inputs: int, outputs: int, bias: bool, dtype: torch.dtype, quantization: Quantization, most: float
) -> None:
    linear = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    x = torch.randn(23, inputs).to(dtype)
    wanted = functional.linear(x.float(), linear.weight.float(), None if linear.bias is None else linear.bias.float())
    layer = compiled(linear, products(dtype, quantization))
    found = layer(x)
    assert found.shape == wanted.shape and found.dtype is dtype
    assert off(found, wanted) < (most if outputs > 1 else 2 * most)


@each_kind
def test_a_row_has_the_same_bits_alone_and_beside_others(
    dtype: torch.dtype, quantization: Quantization, most: float
) -> None:
    layer = compiled(nn.Linear(320, 200).to(dtype), products(dtype, quantization))
    x = torch.randn(70, 320).to(dtype)
    with on_threads(1):
        wanted = torch.cat([layer(row) for row in x.split(1)])
    for threads in (1, 2, 3):
        with on_threads(threads):
            for rows in (2, 5, 16, 70):
                assert torch.equal(torch.cat([layer(some) for some in x.split(rows)]), wanted)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 5, 64), (5, 1, 64), (2, 3, 4, 64), (0, 64), (1, 0, 64)], ids=str)
def test_any_shape_is_taken(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(64, 24)
    x, weight, bias = torch.randn(shape), linear.weight, linear.bias
    found = compiled(linear, products(torch.float32))(x)
    torch.testing.assert_close(found, functional.linear(x, weight, bias))


def test_an_input_lies_anywhere_and_is_of_any_dtype() -> None:
    linear = nn.Linear(64, 24)
    weight, bias = linear.weight, linear.bias
    layer = compiled(linear, products(torch.float32))
    for x in (torch.randn(64, 7).T, torch.randn(7, 128)[:, ::2], torch.randn(9, 64)[2:], torch.randn(64).expand(3, 64)):
        torch.testing.assert_close(layer(x), functional.linear(x, weight, bias))
    short = torch.randn(3, 64).bfloat16()
    assert torch.equal(layer(short), layer(short.float()).bfloat16())
    for wrong in (torch.randn(3, 32), torch.randn(3, 128), torch.randn(64, 2)):
        with pytest.raises(ValueError, match=r"64 inputs was given \d"):
            layer(wrong)


@pytest.mark.parametrize("zeros", [False, True])
def test_codes_of_four_bits_are_multiplied_as_they_are(zeros: bool) -> None:
    codes = nearest(torch.randn(200, 320), 64)
    if zeros:
        codes = FourBits(codes.codes, codes.scales, torch.randint(-3, 4, codes.scales.shape).float())
    layer = FourBitLinear(codes, nn.Parameter(torch.randn(200).bfloat16()), torch.bfloat16)
    x = torch.randn(9, 320).bfloat16()
    assert layer.bias is not None
    wanted = functional.linear(x.float(), codes.weight(torch.float32), layer.bias.float())
    assert off(compiled(layer, products(torch.bfloat16, "int4"))(x), wanted) < 3e-3


def test_numbers_are_rounded_to_the_nearest_codes() -> None:
    linear = nn.Linear(320, 200, bias=False).bfloat16()
    x = torch.randn(9, 320).bfloat16()
    wanted = functional.linear(x.float(), nearest(linear.weight).weight(torch.float32))
    assert off(compiled(linear, products(torch.bfloat16, "int4"))(x), wanted) < 3e-3


@each_kind
def test_a_new_weight_takes_the_place_of_the_old_one(
    dtype: torch.dtype, quantization: Quantization, most: float
) -> None:
    old, new = (nn.Linear(96, 40, bias=False).to(dtype) for _ in range(2))
    x, of = torch.randn(3, 96).to(dtype), products(dtype, quantization)
    layer = compiled(old, of)
    before = layer(x)
    restore = layer.matrix.restorer()
    layer.matrix.write(0, new.weight)
    assert torch.equal(layer(x), compiled(new, of)(x))
    restore()
    assert torch.equal(layer(x), before)
