"""Linear layers of eight bits, as modules."""

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.quantised import byte_linear, new_values
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.eight_bits import nearest_bytes
from tests.model.quantised.test_eight_bits import random_bytes


def layer_of(zeros: bool = False) -> ByteLinear:
    bias = nn.Parameter(torch.randn(24).bfloat16(), requires_grad=False)
    return ByteLinear(random_bytes(24, 64, 16, zeros), bias, torch.bfloat16)


def test_a_layer_computes_with_the_numbers_that_its_codes_stand_for() -> None:
    layer, x = layer_of(zeros=True), torch.randn(2, 3, 64).bfloat16()
    wanted = functional.linear(x, layer.eight_bits.weight(torch.bfloat16), layer.bias)
    assert torch.equal(layer(x), wanted)


def test_new_values_are_rounded_and_can_be_taken_back() -> None:
    model = nn.Sequential(layer_of(zeros=True), layer_of())
    layer = model[0]
    before, restore = layer.eight_bits.weight(torch.float32), layer.keep()
    assert new_values.taken_for(model)[id(layer.weight)] == (torch.Size((24, 64)), torch.bfloat16)
    [writer] = new_values.writers(model)[id(layer.weight)]
    value = torch.randn(24, 64).bfloat16()
    writer.write(value)
    assert torch.equal(layer.eight_bits.weight(torch.float32), nearest_bytes(value, 16).weight(torch.float32))
    restore()
    assert torch.equal(layer.eight_bits.weight(torch.float32), before)
    assert len(byte_linear.writers(model)) == 2


def test_codes_that_were_taken_leave_the_shape() -> None:
    layer = layer_of(zeros=True)
    layer.release()
    assert layer.weight.is_meta and layer.weight_scale.is_meta and layer.weight_zero is None
    assert byte_linear.layers(nn.Sequential(layer))[id(layer.weight)] == (torch.Size((24, 64)), torch.bfloat16)
