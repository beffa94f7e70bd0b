"""Experts asked by the compiled code, beside transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncengine.config import Quantization
from asyncengine.model.decoder.byte_matrix import ByteMatrix
from asyncengine.model.decoder.compiled_experts import CompiledExperts
from asyncengine.model.decoder.compiled_layers import compile_layers, narrow_share, writers
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.four_bit_experts import FourBitExperts, round_experts
from tests.model import checkpoints
from tests.model.decoder.test_compiled_linear import Model, each_kind, off, on_threads, products
from tests.model.quantised.test_eight_bits import random_bytes

HIDDEN, COUNT = 64, 4


def experts_of(architecture: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """Those of a tiny model, with numbers."""
    torch.manual_seed(seed)
    config = checkpoints.config(architecture, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    experts = model.model.layers[1].mlp.experts
    for parameter in experts.parameters():
        parameter.data.normal_(0.0, 0.12)
    return experts.to(dtype).requires_grad_(False)


def compiled(experts: Any, dtype: torch.dtype, quantization: Quantization = "none") -> CompiledExperts:
    model = Model(experts=experts)
    compile_layers(model, products(dtype, quantization))
    assert isinstance(model.experts, CompiledExperts)
    return model.experts


def sent(tokens: int, dtype: torch.dtype, top: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, to whom they are sent, and what answers weigh."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(COUNT, generator=generator)[:top] for _ in range(tokens)])
    shares = torch.rand(tokens, top, generator=generator)
    return torch.randn(tokens, HIDDEN, generator=generator).to(dtype), chosen, shares.to(dtype)


@each_kind
@pytest.mark.parametrize("architecture", ["deepseek_v3", "mixtral", "gpt_oss"])
def test_they_answer_what_they_did(
    architecture: str, dtype: torch.dtype, quantization: Quantization, most: float
) -> None:
    experts = experts_of(architecture, dtype)
    x, chosen, shares = sent(19, dtype)
    wanted = copy.deepcopy(experts).float()(x.float(), chosen, shares.float())
    found = compiled(experts, dtype, quantization)(x, chosen, shares)
    assert found.dtype is dtype
    assert off(found, wanted) < 3 * most


@pytest.mark.parametrize(("dtype", "quantization"), [(torch.float32, "none"), (torch.bfloat16, "int4")])
def test_a_token_gets_the_same_bits_alone_and_beside_others(dtype: torch.dtype, quantization: Quantization) -> None:
    model = Model(experts=experts_of("deepseek_v3", dtype))
    assert quantization == "none" or round_experts(model)
    compile_layers(model, products(dtype, quantization))
    experts = model.experts
    assert isinstance(experts, CompiledExperts)
    x, chosen, shares = sent(40, dtype)
    alone = [experts(x[i : i + 1], chosen[i : i + 1], shares[i : i + 1]) for i in range(40)]
    turned = experts(x, chosen.flip(1), shares.flip(1))
    for threads in (1, 2):
        with on_threads(threads):
            assert torch.equal(experts(x, chosen, shares), torch.cat(alone))
    assert torch.equal(turned, torch.cat(alone))


def test_no_tokens_are_answered_by_none_and_strange_experts_are_refused() -> None:
    experts = compiled(experts_of("mixtral", torch.float32), torch.float32)
    x, chosen, shares = sent(3, torch.float32)
    assert experts(x[:0], chosen[:0], shares[:0]).shape == (0, HIDDEN)
    for strange in (-1, COUNT):
        with pytest.raises(IndexError, match="not there"):
            experts(x, torch.full_like(chosen, strange), shares)
    with pytest.raises(ValueError, match=r"\(3, 64\) are sent to \(2, 2\)"):
        experts(x, chosen[:2], shares[:2])


def test_codes_of_four_bits_stay_codes() -> None:
    model = Model(experts=experts_of("mixtral", torch.bfloat16))
    assert round_experts(model)
    assert isinstance(model.experts, FourBitExperts)
    x, chosen, shares = sent(9, torch.bfloat16)
    wanted = model.experts(x, chosen, shares)
    compile_layers(model, products(torch.bfloat16, "int4"))
    assert isinstance(model.experts, CompiledExperts)
    assert off(model.experts(x, chosen, shares), wanted) < 0.02
    assert tuple(model.experts.down_proj.shape) == (COUNT, HIDDEN, 96)
    assert narrow_share(model) == 1


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_beside_codes_they_get_a_scale_for_32_inputs(quantization: Quantization) -> None:
    coded = ByteLinear(random_bytes(16, HIDDEN, 32, False), None, torch.bfloat16)
    model = Model(experts=experts_of("mixtral", torch.bfloat16), coded=coded)
    x, chosen, shares = sent(19, torch.bfloat16)
    wanted = copy.deepcopy(model.experts).float()(x.float(), chosen, shares.float())
    compile_layers(model, products(torch.bfloat16, quantization))
    experts = model.experts.experts
    assert type(experts.gate_up) is type(experts.down) is type(model.coded.matrix) is ByteMatrix
    found = model.experts(x, chosen, shares)
    assert off(found, wanted) < 0.012
    assert torch.equal(model.experts(x[4:5], chosen[4:5], shares[4:5]), found[4:5])


@pytest.mark.parametrize("architecture", ["deepseek_v3", "gpt_oss"])
def test_new_weights_take_the_places_of_the_old_ones(architecture: str) -> None:
    model, other = (Model(experts=experts_of(architecture, torch.float32, seed)) for seed in (0, 1))
    new = {name: each.clone() for name, each in other.named_parameters()}
    for each in (model, other):
        compile_layers(each, products(torch.float32))
    known = dict(model.named_parameters())
    assert {name: each.shape for name, each in known.items()} == {name: each.shape for name, each in new.items()}
    before, wanted = model.experts(*sent(5, torch.float32)), other.experts(*sent(5, torch.float32))
    restores = []
    for name, value in new.items():
        [writer] = writers(model)[id(known[name])]
        restores.append(writer.keep())
        writer.write(value)
    assert torch.equal(model.experts(*sent(5, torch.float32)), wanted)
    for restore in reversed(restores):
        restore()
    assert torch.equal(model.experts(*sent(5, torch.float32)), before)
