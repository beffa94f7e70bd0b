"""Which parts are found in a model, and which models are not taken for what they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from asyncengine.model import architecture
from asyncengine.model.decoder.blueprint import Blueprint, NotRecognised, recognise
from asyncengine.model.decoder.experts import CLAMPED
from tests.model.checkpoints import config


def model_of(name: str, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_config(
        config(name, **changes), dtype=torch.float32, attn_implementation=architecture.ATTENTION
    ).eval()


def found(model: Any, max_length: int = 64) -> Blueprint:
    return recognise(model, architecture.record(model).attention, max_length)


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


def test_what_embeddings_are_multiplied_by_is_told_from_answers_of_few_digits() -> None:
    model = model_of("gemma3_text", hidden_size=80).bfloat16()
    assert found(model).embedding_scale == float(torch.tensor(80**0.5).bfloat16())


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


@pytest.mark.parametrize(
    ("name", "changes", "chosen_first", "normalised", "activation", "alternating", "transposed"),
    [
        ("mixtral", {}, False, True, 0, False, False),
        ("qwen3_moe", {"norm_topk_prob": False}, False, False, 0, False, False),
        ("qwen3_moe", {"norm_topk_prob": True, "hidden_act": "gelu"}, False, True, 2, False, False),
        ("gpt_oss", {}, True, True, CLAMPED, True, True),
    ],
)
def test_experts_are_told_by_what_they_do(
    name: str,
    changes: dict[str, Any],
    chosen_first: bool,
    normalised: bool,
    activation: int,
    alternating: bool,
    transposed: bool,
) -> None:
    for layer in found(shaken(model_of(name, **changes))).layers:
        experts = layer.experts
        assert experts is not None and layer.down is None and not layer.gate_up
        routing = experts.routing
        assert routing is not None
        assert (experts.count, routing.top, experts.activation) == (4, 2, activation)
        assert (experts.alternating, experts.transposed) == (alternating, transposed)
        # Those that were chosen first add up to 1 by themselves; which way is named does not matter then.
        assert (routing.chosen_first or routing.normalised) == (chosen_first or normalised)


def shaken(model: Any) -> Any:
    """With routers that have preferences: new ones are zero, or nearly."""
    for parameter in model.parameters():
        if parameter.ndim < 3 and parameter.shape[0] == 4:
            nn.init.normal_(parameter)
    return model


def test_layers_with_experts_and_without_may_alternate() -> None:
    layers = found(shaken(model_of("qwen3_moe", mlp_only_layers=[1]))).layers
    assert [layer.experts is None for layer in layers] == [False, True, False]
    assert layers[1].down is not None


def test_a_router_that_does_something_else_is_refused() -> None:
    model = shaken(model_of("mixtral"))
    router = model.model.layers[1].mlp.gate
    forward = router.forward

    def squared(x: torch.Tensor) -> Any:
        logits, scores, indices = forward(x)
        return logits, scores.square(), indices

    router.forward = squared
    with pytest.raises(NotRecognised, match="weighs experts otherwise than by a softmax"):
        found(model)
    router.forward = lambda x: (lambda logits, scores, indices: (logits, scores, (indices + 1) % 4))(*forward(x))
    with pytest.raises(NotRecognised, match="does not choose by its products alone"):
        found(model)


def test_a_gate_that_does_something_else_is_refused() -> None:
    model = shaken(model_of("mixtral"))
    model.model.layers[2].mlp.experts.act_fn = nn.Tanh()
    with pytest.raises(NotRecognised, match="its experts are gated in another way"):
        found(model)


def test_experts_with_a_neighbour_are_refused() -> None:
    model = shaken(model_of("mixtral"))
    model.model.layers[0].mlp.neighbour = nn.Linear(64, 64)
    with pytest.raises(NotRecognised, match="an MLP with experts has a part called neighbour"):
        found(model)


GROUPED = {
    "num_local_experts": 8, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "sigmoid", "normalised", "scale", "corrected", "groups"),
    [
        ("qwen2_moe", {}, False, False, 1.0, False, (1, 1)),
        ("qwen2_moe", {"norm_topk_prob": True}, False, True, 1.0, False, (1, 1)),
        ("glm4_moe", GROUPED, True, True, 2.5, True, (4, 2)),
        ("dots1", {"norm_topk_prob": False}, True, False, 1.0, True, (1, 1)),
        ("ernie4_5_moe", {}, False, True, 1.0, True, (1, 1)),
        ("cohere2_moe", {}, True, True, 0.5, False, (1, 1)),
    ],
)
def test_routers_are_told_by_whom_they_send_tokens_to(
    name: str,
    changes: dict[str, Any],
    sigmoid: bool,
    normalised: bool,
    scale: float,
    corrected: bool,
    groups: tuple[int, int],
) -> None:
    layers = [layer for layer in found(shaken(model_of(name, **changes))).layers if layer.experts is not None]
    assert layers
    for layer in layers:
        experts = layer.experts
        assert experts is not None and experts.routing is not None and experts.beside is not None
        assert layer.down is not None and len(layer.gate_up) == 2
        routing, beside = experts.routing, experts.beside
        assert (routing.sigmoid, routing.normalised, routing.scale) == (sigmoid, normalised, scale)
        assert (routing.correction is not None, routing.groups, routing.groups_asked) == (corrected, *groups)
        assert (beside.gate is not None, beside.scale) == (name == "qwen2_moe", 0.5 if name == "cohere2_moe" else 1.0)


def test_logits_that_are_cut_off_where_they_are_large_are_noticed() -> None:
    model = shaken(model_of("mixtral"))
    router = model.model.layers[1].mlp.gate

    def cut(x: torch.Tensor) -> Any:
        logits = torch.nn.functional.linear(x, router.weight).clamp(-8, 8)
        shares, indices = logits.softmax(-1).topk(2, -1)
        return logits, shares / shares.sum(-1, keepdim=True), indices

    router.forward = cut
    with pytest.raises(NotRecognised, match=r"its router (weighs experts otherwise|does not choose by its products)"):
        found(model)


@pytest.mark.parametrize("seed", range(6))
def test_groups_that_are_chosen_by_their_best_expert_alone_are_noticed(seed: int) -> None:
    torch.manual_seed(seed)
    count, groups, asked, top = 16, 4, 3, 2
    model = model_of(
        "glm4_moe", **GROUPED | {"n_routed_experts": count, "num_experts_per_tok": top, "topk_group": asked}
    )
    for layer in model.model.layers:
        if (router := getattr(layer.mlp, "gate", None)) is not None:
            nn.init.normal_(router.weight)
    router = model.model.layers[1].mlp.gate
    count = router.weight.shape[0]

    def by_the_best(x: torch.Tensor) -> Any:
        logits = torch.nn.functional.linear(x.float(), router.weight.float())
        scores = logits.sigmoid() + router.e_score_correction_bias
        chosen = scores.view(-1, groups, count // groups).amax(-1).topk(asked, -1).indices
        shut = torch.ones(len(x), groups, dtype=torch.bool).scatter(1, chosen, False)
        scores = scores.masked_fill(shut.repeat_interleave(count // groups, 1), -torch.inf)
        indices = scores.topk(top, -1).indices
        shares = logits.sigmoid().gather(1, indices)
        return indices, shares / shares.sum(-1, keepdim=True) * 2.5

    mlp = model.model.layers[1].mlp
    mlp.route_tokens_to_experts = lambda *_: by_the_best(_[0])
    mlp.forward = lambda x: (
        mlp.experts(flat := x.reshape(-1, x.shape[-1]), *by_the_best(flat)) + mlp.shared_experts(flat)
    ).view(x.shape)
    with pytest.raises(NotRecognised, match="does not choose by its products"):
        found(model)


def test_a_correction_is_left_as_it_was() -> None:
    model = shaken(model_of("glm4_moe"))
    router = model.model.layers[1].mlp.gate
    bias, before = router.e_score_correction_bias, router.e_score_correction_bias.clone()
    found(model)
    assert router.e_score_correction_bias is bias and torch.equal(bias, before)
    assert "forward" not in model.model.layers[1].mlp.experts.__dict__


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda mlp, x: mlp.experts(x, *_sent(mlp, x)), "its shared expert is not added"),
        (lambda mlp, x: mlp.experts(x, *_sent(mlp, x)) + mlp.shared_experts(x) * x[:, :1], "its shared expert is not"),
        (lambda mlp, x: mlp.experts(x, *_sent(mlp, x)) + mlp.shared_experts(x) + x, "is not added up alone"),
        (lambda mlp, x: mlp.experts(x, *_sent(mlp, x)) * x[:, :1] + mlp.shared_experts(x), "is not added up alone"),
        (lambda mlp, x: mlp.shared_experts(x), "asked in another way"),
    ],
)
def test_experts_that_are_put_together_in_another_way_are_refused(forward: Any, message: str) -> None:
    model = shaken(model_of("glm4_moe"))
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: forward(mlp, x.view(-1, 64)).view(x.shape)
    with pytest.raises(NotRecognised, match=message):
        found(model)


def _sent(mlp: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _, shares, indices = mlp.gate(x)
    return indices, shares
