"""Which parts are found in a model, and which models are not taken for what they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from asyncengine.model import architecture
from asyncengine.model.decoder.blueprint import Blueprint, NotRecognised, recognise
from tests.model.checkpoints import config


def model_of(name: str, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_config(
        config(name, **changes), dtype=torch.float32, attn_implementation=architecture.ATTENTION
    ).eval()


def found(model: Any, max_length: int = 64) -> Blueprint:
    return recognise(model, architecture.record(model), max_length)


@pytest.mark.parametrize(
    ("name", "parallel", "gated", "rotary", "pairs"),
    [
        ("llama", False, True, 16, False),
        ("gpt2", False, False, 0, False),
        ("opt", False, False, 0, False),
        ("starcoder2", False, False, 16, False),
        ("gpt_neox", True, False, 4, False),
        ("cohere", True, True, 16, True),
        ("phi", True, False, 8, False),
        ("glm4", False, True, 8, True),
    ],
)
def test_how_a_layer_is_built(name: str, parallel: bool, gated: bool, rotary: int, pairs: bool) -> None:
    blueprint = found(model_of(name))
    assert {layer.parallel for layer in blueprint.layers} == {parallel}
    assert {len(layer.gate_up) for layer in blueprint.layers} == {2 if gated else 1}
    assert (blueprint.rotary, blueprint.pairs) == (rotary, pairs)
    assert (blueprint.positions is None) == (rotary > 0)


def test_the_second_norm_of_a_sequential_layer_is_before_its_mlp() -> None:
    layer = found(model_of("gpt_neox", use_parallel_residual=False)).layers[0]
    assert not layer.parallel and layer.before_mlp is not None and layer.before_mlp.centred


def test_positions_may_begin_later_in_their_table() -> None:
    assert found(model_of("opt")).first_position == 2
    assert found(model_of("gpt2")).first_position == 0


def test_a_table_of_positions_that_is_too_short_is_not_read_past_its_end() -> None:
    with pytest.raises(NotRecognised, match="fewer than 513"):
        found(model_of("gpt2"), max_length=513)


def test_queries_keys_and_values_of_each_head_are_told_apart() -> None:
    model = model_of("gpt_neox")
    whole = model.gpt_neox.layers[0].attention.query_key_value.weight.view(4, 3, 16, 64)
    for index, part in enumerate(found(model).layers[0].qkv):
        assert torch.equal(part.weight, whole[:, index].reshape(64, 64))


def test_weights_that_are_stored_the_other_way_round_are_turned() -> None:
    model = model_of("gpt2")
    part = found(model).layers[0].down
    assert torch.equal(part.weight, model.transformer.h[0].mlp.c_proj.weight.T)


def test_a_norm_that_computes_something_else_is_refused() -> None:
    class Tripled(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(x)

    model = model_of("gpt_neox")
    model.gpt_neox.layers[1].input_layernorm = Tripled(64)
    with pytest.raises(NotRecognised, match="neither by the root mean square nor by the deviation"):
        found(model)


def test_an_activation_that_is_not_known_is_refused() -> None:
    with pytest.raises(NotRecognised, match="its activation is 'tanh'"):
        found(model_of("gpt_neox", hidden_act="tanh"))
