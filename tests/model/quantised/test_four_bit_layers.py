"""Linear layers and experts whose weights have four bits, as modules of a model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from asyncengine.model.quantised import new_values
from asyncengine.model.quantised.four_bit_experts import NAMES, FourBitExperts, hold, round_experts, share_of
from asyncengine.model.quantised.four_bit_linear import FourBitLinear, round_layers
from asyncengine.model.quantised.four_bits import nearest

Make = Callable[..., Path]
IDS = torch.arange(2, 26)[None]


def model_of(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def test_a_layer_computes_with_the_numbers_that_its_codes_stand_for() -> None:
    layer = nn.Linear(64, 48, dtype=torch.bfloat16)
    held = FourBitLinear(nearest(layer.weight.detach()), layer.bias, layer.weight.dtype)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    weight = held.four_bits.weight(torch.bfloat16)
    assert torch.equal(held(x), nn.functional.linear(x, weight, layer.bias))
    assert held.weight.nbytes + held.weight_scale.nbytes < layer.weight.nbytes / 2


def test_zeros_do_not_outlive_the_weight_that_had_them() -> None:
    first, second = (torch.randn(48, 64, dtype=torch.bfloat16) for _ in range(2))
    codes = nearest(first)
    held = FourBitLinear(replace(codes, zeros=torch.ones_like(codes.scales)), None, first.dtype)
    before, restore = held.four_bits.weight(torch.float32), held.keep()
    held.write(second)
    assert torch.equal(held.four_bits.weight(torch.float32), nearest(second).weight(torch.float32))
    restore()
    assert torch.equal(held.four_bits.weight(torch.float32), before)


def test_every_layer_but_the_head_is_replaced(checkpoint: Make) -> None:
    model = model_of(checkpoint("llama"))
    of = sum(each.numel() for each in model.parameters())
    done, total = round_layers(model)
    assert total == of
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert left == ["lm_head"]
    assert share_of(model) == pytest.approx(done / of)


def test_inputs_that_are_no_whole_groups_stay(checkpoint: Make) -> None:
    model = model_of(checkpoint("llama", intermediate_size=80))
    round_layers(model)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is FourBitLinear


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_compute_with_the_numbers_that_their_codes_stand_for(kind: str, checkpoint: Make) -> None:
    rounded, plain = (model_of(checkpoint(kind, num_hidden_layers=1)) for _ in range(2))
    assert round_experts(rounded) == 4 * 3 * 64 * 96
    experts, other = (each.model.layers[0].mlp.experts for each in (rounded, plain))
    assert isinstance(experts, FourBitExperts)
    assert experts.gate_up_proj.shape == other.gate_up_proj.shape
    for name in NAMES:
        weight = experts.four_bits(name).weight(torch.bfloat16)
        own = getattr(other, name).data
        weight = weight.view(4, -1, weight.shape[1])
        own.copy_(weight.transpose(1, 2) if kind == "gpt_oss" else weight)
    assert torch.equal(logits(rounded), logits(plain))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_one_of_the_weights_of_experts_may_be_codes_alone(kind: str, name: str, checkpoint: Make) -> None:
    """As llama.cpp stores some layers: down projections with more bits."""
    held, plain = (model_of(checkpoint(kind, num_hidden_layers=1)) for _ in range(2))
    experts, other = (each.model.layers[0].mlp.experts for each in (held, plain))
    transposed = kind == "gpt_oss"
    own = getattr(experts, name).data
    codes = nearest((own.transpose(1, 2) if transposed else own).flatten(0, 1))
    hold(experts, {name: codes}, transposed)
    weight = codes.weight(torch.bfloat16).view(4, -1, codes.shape[1])
    getattr(other, name).data.copy_(weight.transpose(1, 2) if transposed else weight)
    assert torch.equal(logits(held), logits(plain))
    assert experts.kernel_gate is None
    names = new_values.taken_for(held)
    assert [id(experts._parameters[each]) in names for each in NAMES] == [each == name for each in NAMES]


def test_experts_move_and_are_counted_as_other_modules(checkpoint: Make) -> None:
    model = model_of(checkpoint("mixtral", num_hidden_layers=1))
    before = {name for name, _ in model.named_parameters()}
    round_experts(model)
    assert {name for name, _ in model.named_parameters()} == before
    found = logits(model)
    assert torch.equal(logits(model.to("cpu")), found)
    experts = model.model.layers[0].mlp.experts
    experts.release("down_proj")
    assert experts._parameters["down_proj"].is_meta
    assert experts.down_proj.shape == (4, 64, 96)  # its name and shape stay


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_new_values_are_rounded_and_can_be_taken_back(kind: str, checkpoint: Make) -> None:
    model, other = model_of(checkpoint(kind)), model_of(checkpoint(kind, seed=1))
    round_experts(model)
    round_layers(model)
    before = logits(model)
    values = dict(other.named_parameters())
    wanted, writers = new_values.taken_for(model), new_values.writers(model)
    restores = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = values[name].detach()
            shape, dtype = wanted.get(id(parameter), (parameter.shape, parameter.dtype))
            assert (value.shape, value.dtype) == (shape, dtype)
            for writer in writers.get(id(parameter), []):
                restores.append(writer.keep())
                writer.write(value)
    changed = logits(model)
    round_experts(other)
    round_layers(other)
    for mine, others in zip(layers(model), layers(other), strict=True):
        assert torch.equal(mine, others)
    assert not torch.equal(before, changed)
    for restore in reversed(restores):
        restore()
    assert torch.equal(logits(model), before)


def layers(model: Any) -> list[torch.Tensor]:
    """All numbers in four bits."""
    modules = list(model.modules())
    linear = [each.four_bits.weight(torch.float32) for each in modules if isinstance(each, FourBitLinear)]
    experts = [each for each in modules if isinstance(each, FourBitExperts)]
    return linear + [each.four_bits(name).weight(torch.float32) for each in experts for name in NAMES]
