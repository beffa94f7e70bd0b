"""As `settings`, of models with experts."""

from __future__ import annotations

from typing import Any

from asyncengine.errors import UnsupportedModelError
from asyncengine.model.gguf import recurrent_settings, settings
from asyncengine.model.gguf.facts import Facts

_SOFTMAX, _SIGMOID = 1, 2
"""How scores of experts become shares, as llama.cpp numbers it."""


def mixtral(facts: Facts) -> dict[str, Any]:
    """Experts among the layers of llama."""
    return {"num_local_experts": facts("expert_count"), "num_experts_per_tok": facts("expert_used_count")}


def _routed(facts: Facts) -> dict[str, Any]:
    plain = [layer for layer, routed in enumerate(facts.layers_with("ffn_gate_inp.weight")) if not routed]
    return {
        "num_experts": facts("expert_count"),
        "num_experts_per_tok": facts("expert_used_count"),
        "moe_intermediate_size": _width(facts),
        "decoder_sparse_step": 1,
        "mlp_only_layers": plain,
    }


def _width(facts: Facts) -> int:
    """Of an expert; older files do not state it."""
    if stated := facts.one("expert_feed_forward_length", 0):
        return int(stated)
    for name in ("ffn_down_exps.weight", "ffn_down.0.weight"):
        if shape := facts.shape(name):
            return shape[-1]
    return int(facts.one("feed_forward_length"))


def _shared(facts: Facts) -> dict[str, Any]:
    shape = facts.shape("ffn_gate_shexp.weight")
    return {"shared_expert_intermediate_size": shape and shape[0]}


def qwen2_moe(facts: Facts) -> dict[str, Any]:
    """A further expert is always there."""
    return _routed(facts) | _shared(facts) | {"norm_topk_prob": False}


def qwen3_moe(facts: Facts) -> dict[str, Any]:
    """Shares of experts add up to 1."""
    return _routed(facts) | {"norm_topk_prob": True} | settings.biases(facts)


def qwen3_5_moe(facts: Facts) -> dict[str, Any]:
    """As `qwen3_5`, with experts."""
    more = _routed(facts) | _shared(facts)
    return recurrent_settings.qwen3_5(facts) | {
        key: value for key, value in more.items() if key != "decoder_sparse_step"
    }


def granite_moe(facts: Facts) -> dict[str, Any]:
    """As `granite`, with experts."""
    return settings.granite(facts) | mixtral(facts)


def granite_moe_shared(facts: Facts) -> dict[str, Any]:
    """As `granite_moe`, with an expert that is always there."""
    shape = facts.tensors["blk.0.ffn_gate_shexp.weight"].shape
    return granite_moe(facts) | {"shared_intermediate_size": shape[0]}


def olmoe(facts: Facts) -> dict[str, Any]:
    """All layers have experts."""
    return {
        "num_experts": facts("expert_count"),
        "num_experts_per_tok": facts("expert_used_count"),
        "norm_topk_prob": False,
        "intermediate_size": _width(facts),
        "clip_qkv": facts.get("attention.clamp_kqv"),
    }


def qwen3_next(facts: Facts) -> dict[str, Any]:
    """As `recurrent_settings.qwen3_next`, with experts."""
    return recurrent_settings.qwen3_next(facts) | _routed(facts) | _shared(facts) | {"norm_topk_prob": True}


def gpt_oss(facts: Facts) -> dict[str, Any]:
    """Experts, learned sinks, and windows in every other layer."""
    return (
        mixtral(facts)
        | settings.windows(facts, 2)
        | {
            "intermediate_size": _width(facts),
            "rope_parameters": settings.rope(facts) | {"truncate": False},
            "attention_bias": True,
        }
    )


def lfm2_moe(facts: Facts) -> dict[str, Any]:
    """Short convolutions, and experts behind the first layers."""
    _demand_gating(facts, _SIGMOID)
    return recurrent_settings.lfm2(facts) | {
        "moe_intermediate_size": _width(facts),
        "num_dense_layers": _leading(facts),
        "num_experts": facts("expert_count"),
        "num_experts_per_tok": facts("expert_used_count"),
        "norm_topk_prob": True,
        "routed_scaling_factor": facts.get("expert_weights_scale", 1.0),
        "use_expert_bias": facts.shape("exp_probs_b.bias") is not None,
    }


def ernie4_5_moe(facts: Facts) -> dict[str, Any]:
    """Experts behind the first layers, some of which are always there."""
    shared = facts.shape("ffn_gate_shexp.weight")
    return settings.ernie4_5(facts) | {
        "moe_intermediate_size": _width(facts),
        "moe_k": facts("expert_used_count"),
        "moe_num_experts": facts("expert_count"),
        "moe_num_shared_experts": shared[0] // _width(facts) if shared else 0,
        "moe_layer_start_index": _leading(facts),
        "moe_layer_end_index": facts.layers - 1,
        "moe_layer_interval": facts.get("interleave_moe_layer_step", 1),
    }


def minimax_m2(facts: Facts) -> dict[str, Any]:
    """Heads rotate in part."""
    _demand_gating(facts, _SIGMOID)
    return settings.partly_rotated(facts) | mixtral(facts) | {"intermediate_size": _width(facts)}


def dots1(facts: Facts) -> dict[str, Any]:
    """Experts as those of DeepSeek."""
    _demand_gating(facts, _SIGMOID)
    return _grouped(facts) | settings.biases(facts)


def exaone_moe(facts: Facts) -> dict[str, Any]:
    """Experts as those of DeepSeek, and windows in three of four layers."""
    _demand_gating(facts, _SIGMOID)
    found = _grouped(facts)
    counts = {"num_experts": found.pop("n_routed_experts"), "num_shared_experts": found.pop("n_shared_experts")}
    return settings.windows(facts) | found | counts


def cohere2_moe(facts: Facts) -> dict[str, Any]:
    """As `settings.cohere2`, with experts behind the first layers."""
    routed = facts.layers_with("ffn_gate_inp.weight")
    return settings.cohere2(facts) | {
        "expert_selection_fn": "sigmoid" if sigmoid(facts) else "softmax",
        "intermediate_size": _width(facts),
        "mlp_layer_types": ["sparse" if each else "dense" for each in routed],
        "norm_topk_prob": facts.get("expert_weights_norm", False),
        "num_experts": facts("expert_count"),
        "num_experts_per_tok": facts("expert_used_count"),
        "num_shared_experts": 0,
        "prefix_dense_intermediate_size": facts.one("feed_forward_length"),
    }


def phimoe(facts: Facts) -> dict[str, Any]:
    """Layer norms with biases, whose small number is stated as that of others."""
    window = {"sliding_window": facts.get("attention.sliding_window") or None}
    return mixtral(facts) | window | {"attention_bias": facts.has("blk.0.attn_q.bias"), "lm_head_bias": True}


def glm4_moe(facts: Facts) -> dict[str, Any]:
    """Experts as those of DeepSeek, and heads that rotate in part."""
    _demand_gating(facts, _SIGMOID)
    normed = {"use_qk_norm": facts.has("blk.0.attn_q_norm.weight")}
    return _grouped(facts) | settings.glm4(facts) | normed


def deepseek_v2(facts: Facts) -> dict[str, Any]:
    """Latent attention, and experts that share 1 or less."""
    grouped = facts.get("expert_group_count", 1) > 1
    method = {"topk_method": "group_limited_greedy" if grouped else "greedy"}
    return _latent(facts) | _grouped(facts) | method


def deepseek_v3(facts: Facts) -> dict[str, Any]:
    """Latent attention, and experts with a bias for their choice."""
    return _latent(facts) | _grouped(facts) | {"rope_interleave": True}


def sigmoid(facts: Facts) -> bool:
    """Whether scores of experts become shares each by itself."""
    return bool(facts.get("expert_gating_func") == _SIGMOID)


def _grouped(facts: Facts) -> dict[str, Any]:
    shared = facts.shape("ffn_gate_shexp.weight")
    return {
        "first_k_dense_replace": _leading(facts),
        "moe_intermediate_size": _width(facts),
        "n_group": facts.get("expert_group_count", 1),
        "topk_group": facts.get("expert_group_used_count", 1),
        "n_routed_experts": facts("expert_count"),
        "n_shared_experts": shared[0] // _width(facts) if shared else None,
        "norm_topk_prob": facts.get("expert_weights_norm", False),
        "num_experts_per_tok": facts("expert_used_count"),
        "routed_scaling_factor": facts.get("expert_weights_scale", 1.0),
    }


def _latent(facts: Facts) -> dict[str, Any]:
    rotated, heads = facts("rope.dimension_count"), facts.one("attention.head_count")
    keys = facts.get("attention.key_length_mla") or facts("attention.key_length")
    found = settings.rope(facts)
    if (factor := facts.get("rope.scaling.yarn_log_multiplier")) is not None:
        found |= dict.fromkeys(("mscale", "mscale_all_dim"), round(factor / 0.1, 6))
    return {
        "num_key_value_heads": heads,
        "head_dim": rotated,
        "kv_lora_rank": facts("attention.kv_lora_rank"),
        "q_lora_rank": facts.get("attention.q_lora_rank"),
        "qk_nope_head_dim": keys - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": facts.get("attention.value_length_mla") or facts("attention.value_length"),
        "rope_parameters": found,
    }


def _leading(facts: Facts) -> int:
    """How many layers at the beginning have no experts."""
    routed = facts.layers_with("ffn_gate_inp.weight")
    return routed.index(True) if True in routed else facts.layers


def _demand_gating(facts: Facts, kind: int) -> None:
    if (stated := facts.get("expert_gating_func", kind)) != kind:
        raise UnsupportedModelError(f"{facts.architecture}.expert_gating_func is {stated}, where {kind} is known")
