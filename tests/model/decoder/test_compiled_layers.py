"""Models whose layers the compiled code multiplies."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.decoder import compiled_layers
from asyncengine.model.decoder.byte_matrix import ByteMatrix
from asyncengine.model.decoder.compiled_layers import compile_layers, narrow_share, rounded_to, weight_bytes, writers
from asyncengine.model.decoder.compiled_linear import CompiledLinear
from asyncengine.model.decoder.four_bit_matrix import FourBitMatrix
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.quantised.four_bits import nearest
from tests.model.decoder.test_compiled_linear import Model, products


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_names_shapes_and_dtypes_stay_and_memory_is_let_go() -> None:
    model = Model(layer=nn.Linear(32, 8), head=nn.Linear(32, 16, bias=False)).bfloat16()
    before = {name: (each.shape, each.dtype) for name, each in model.named_parameters()}
    compile_layers(model, products(torch.bfloat16, "int8"))
    assert {name: (each.shape, each.dtype) for name, each in model.named_parameters()} == before
    assert [each.is_meta for each in model.parameters()] == [True, False, True]
    assert (model.layer.in_features, model.layer.out_features) == (32, 8)


def test_what_does_not_fill_vectors_and_subclasses_stay() -> None:
    class Other(nn.Linear):
        pass

    model = Model(odd=nn.Linear(24, 8), other=Other(32, 8), short=nn.Linear(32, 8).half(), even=nn.Linear(32, 8))
    compile_layers(model, products(torch.float32))
    assert [type(layer) for layer in model.children()] == [nn.Linear, Other, nn.Linear, CompiledLinear]


class Tied(Model):
    def __init__(self) -> None:
        super().__init__(embedding=nn.Embedding(40, 32), head=nn.Linear(32, 40, bias=False))
        self.head.weight = self.embedding.weight


def test_a_tied_weight_is_written_in_both_places_and_put_back() -> None:
    model = Tied()
    weight: Any = model.embedding.weight
    before = weight.clone()
    compile_layers(model, products(torch.float32))
    assert model.head.weight is weight
    value, x = torch.randn(40, 32), torch.randn(2, 32)
    places = writers(model)[id(weight)]
    restores = [writer.keep() for writer in places]
    for writer in places:
        writer.write(value)
    assert torch.equal(weight, value)
    close(model.head(x), functional.linear(x, value))
    for restore in reversed(restores):
        restore()
    assert torch.equal(weight, before)
    close(model.head(x), functional.linear(x, before))


def test_a_bias_is_written_where_it_is_added() -> None:
    model = Model(layer=nn.Linear(32, 9))
    weight = model.layer.weight.clone()
    compile_layers(model, products(torch.float32))
    bias, value, x = model.layer.bias, torch.randn(9), torch.randn(2, 32)
    before = model.layer(x)
    places = writers(model)[id(bias)]
    restores = [writer.keep() for writer in places]
    for writer in places:
        writer.write(value)
    assert torch.equal(bias, value)
    close(model.layer(x), functional.linear(x, weight, value))
    for restore in reversed(restores):
        restore()
    assert torch.equal(model.layer(x), before)


def shared() -> Model:
    """Two layers with one weight, and a layer under two names."""
    one, two, three = (nn.Linear(32, 16) for _ in range(3))
    two.weight = one.weight
    return Model(first=one, second=two, third=three, fourth=three)


@pytest.mark.parametrize("names", [("first", "second"), ("second", "first"), ("third", "fourth"), ("fourth", "third")])
def test_a_weight_of_several_layers_is_packed_once_and_written_for_all_of_them(names: tuple[str, str]) -> None:
    model = shared()
    biases = {name: getattr(model, name).bias.clone() for name in names}
    compile_layers(model, products(torch.float32))
    assert model.third is model.fourth
    assert model.first.matrix is model.second.matrix
    value, x = torch.randn(16, 32), torch.randn(2, 32)
    for writer in writers(model)[id(getattr(model, names[0]).weight)]:
        writer.write(value)
    for name in names:
        close(getattr(model, name)(x), functional.linear(x, value, biases[name]))


def test_each_weight_is_let_go_before_the_next_one_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {name: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for name in ("first", "second")}
    model = Model(**blocks, head=nn.Linear(32, 32))
    weights = [weakref.ref(parameter) for parameter in model.parameters() if parameter.dim() == 2]
    del blocks
    alive, made = [], compiled_layers.packed

    def packed(*arguments: Any) -> Any:
        alive.append(sum(weight() is not None for weight in weights))
        return made(*arguments)

    monkeypatch.setattr(compiled_layers, "packed", packed)
    compile_layers(model, products(torch.float32))
    assert sorted(alive) == [1, 2, 3, 4, 5]
    assert not any(weight() is not None for weight in weights)


def test_the_head_has_eight_bits_beside_layers_of_four() -> None:
    model = Model(layer=nn.Linear(32, 16), head=nn.Linear(32, 16)).bfloat16()
    assert rounded_to(model, "int4") == "int4"
    compile_layers(model, products(torch.bfloat16, "int4"))
    assert isinstance(model.layer.matrix, FourBitMatrix)
    assert model.head.matrix.weights.dtype is torch.int8


def test_nothing_is_rounded_to_four_bits_beside_codes() -> None:
    codes = FourBitLinear(nearest(torch.randn(16, 32)), None, torch.bfloat16)
    model = Model(codes=codes, layer=nn.Linear(32, 16).bfloat16())
    assert rounded_to(model, "int4") == "bytes"
    compile_layers(model, products(torch.bfloat16, "int4"))
    assert isinstance(model.codes.matrix, FourBitMatrix)
    assert isinstance(model.layer.matrix, ByteMatrix)


def test_bytes_and_shares_are_those_of_what_was_packed() -> None:
    plain, model = Tied().bfloat16(), Tied().bfloat16()
    assert weight_bytes(plain) == 2 * 40 * 32 and narrow_share(plain) == 0
    compile_layers(model, products(torch.bfloat16, "int8"))
    lanes = int(products(torch.bfloat16, "int8").library.decoder_lanes())
    filled = -(-40 // lanes) * lanes  # whole vectors
    assert weight_bytes(model) == 2 * 40 * 32 + filled * 32 + 4 * filled
    assert narrow_share(model) == 0.5
    apart = Model(layer=nn.Linear(32, 64, bias=False), odd=nn.Linear(24, 32, bias=False)).bfloat16()
    compile_layers(apart, products(torch.bfloat16, "int8"))
    assert narrow_share(apart) == pytest.approx(2048 / (2048 + 768))
