"""As `settings`, of models with layers that keep a state."""

from __future__ import annotations

from typing import Any

from asyncengine.errors import UnsupportedModelError
from asyncengine.model.gguf import settings
from asyncengine.model.gguf.facts import Facts


def qwen3_5(facts: Facts) -> dict[str, Any]:
    """Gated delta rules in most layers."""
    heads = facts("ssm.time_step_rank")
    recurs = [facts.has(f"blk.{layer}.ssm_out.weight") for layer in range(facts.layers)]
    sections = [section for section in facts.get("rope.dimension_sections", []) if section]
    partial = facts("rope.dimension_count") / facts.head_dim
    return {
        "layer_types": ["linear_attention" if each else "full_attention" for each in recurs],
        "linear_num_value_heads": heads,
        "linear_num_key_heads": facts("ssm.group_count"),
        "linear_key_head_dim": facts("ssm.state_size"),
        "linear_value_head_dim": facts("ssm.inner_size") // heads,
        "linear_conv_kernel_dim": facts("ssm.conv_kernel"),
        "rope_parameters": {
            "rope_theta": facts("rope.freq_base"),
            "rope_type": "default",
            "mrope_section": sections,
            "mrope_interleaved": True,
            "partial_rotary_factor": partial,
        },
        "partial_rotary_factor": partial,
    }


def qwen3_next(facts: Facts) -> dict[str, Any]:
    """As `qwen3_5`, with one kind of positions."""
    return qwen3_5(facts) | settings.partly_rotated(facts)


def lfm2(facts: Facts) -> dict[str, Any]:
    """Short convolutions in layers that have no keys."""
    return {
        "layer_types": ["conv" if each else "full_attention" for each in facts.layers_with("shortconv.conv.weight")],
        "norm_eps": facts("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": facts("shortconv.l_cache"),
        "conv_bias": facts.shape("shortconv.in_proj.bias") is not None,
        "block_auto_adjust_ff_dim": False,
    }


def granite_hybrid(facts: Facts) -> dict[str, Any]:
    """Mamba 2 in most layers; the others do not rotate."""
    if facts.get("rope.scaling.finetuned"):
        raise UnsupportedModelError("layers with states beside layers that rotate are not known of this architecture")
    heads, keys = facts("ssm.time_step_rank"), facts.shape("attn_k.weight")
    shared = facts.shape("ffn_gate_shexp.weight") or facts.shape("ffn_gate.weight")
    return (
        settings.granite(facts)
        | _mixers(facts)
        | {
            "num_key_value_heads": keys[0] // facts.head_dim if keys else facts.one("attention.head_count"),
            "num_local_experts": facts.get("expert_count", 0),
            "num_experts_per_tok": facts.get("expert_used_count", 0),
            "shared_intermediate_size": shared and shared[0],
            "position_embedding_type": "nope",
            "mamba_n_heads": heads,
            "mamba_d_head": facts("ssm.inner_size") // heads,
            "mamba_d_state": facts("ssm.state_size"),
            "mamba_d_conv": facts("ssm.conv_kernel"),
            "mamba_n_groups": facts("ssm.group_count"),
            "mamba_expand": facts("ssm.inner_size") // facts("embedding_length"),
            "mamba_conv_bias": facts.shape("ssm_conv1d.bias") is not None,
        }
    )


def falcon_h1(facts: Facts) -> dict[str, Any]:
    """Mamba 2 beside attention in all layers. What multiplies is in the weights already."""
    heads = facts("ssm.time_step_rank")
    ones = ("attention_in", "attention_out", "embedding", "key", "lm_head", "ssm_in", "ssm_out")
    return {f"{name}_multiplier": 1.0 for name in ones} | {
        "mlp_multipliers": [1.0] * 2,
        "ssm_multipliers": [1.0] * 5,
        "mamba_n_heads": heads,
        "mamba_d_head": facts("ssm.inner_size") // heads,
        "mamba_d_ssm": facts("ssm.inner_size"),
        "mamba_d_state": facts("ssm.state_size"),
        "mamba_d_conv": facts("ssm.conv_kernel"),
        "mamba_n_groups": facts("ssm.group_count"),
        "mamba_conv_bias": facts.has("blk.0.ssm_conv1d.bias"),
        "mamba_rms_norm": facts.has("blk.0.ssm_norm.weight"),
    }


def nemotron_h(facts: Facts) -> dict[str, Any]:
    """Mamba 2, attention, experts, or a network: one of these in each layer."""
    kinds = {"ssm_in": "linear_attention", "attn_q": "full_attention", "ffn_gate_inp": "moe", "ffn_up": "mlp"}
    types = [
        next((kind for name, kind in kinds.items() if facts.has(f"blk.{layer}.{name}.weight")), "none")
        for layer in range(facts.layers)
    ]
    heads, plain, routed = facts("ssm.time_step_rank"), facts.shape("ffn_up.weight"), facts.shape("ffn_up_exps.weight")
    shared = facts.shape("ffn_up_shexp.weight")
    found = {
        "layers_block_type": types,
        "layer_norm_epsilon": facts.get("attention.layer_norm_epsilon") or facts("attention.layer_norm_rms_epsilon"),
        "intermediate_size": plain[0] if plain else facts.get("expert_feed_forward_length", 0),
        "mamba_num_heads": heads,
        "mamba_head_dim": facts("ssm.inner_size") // heads,
        "ssm_state_size": facts("ssm.state_size"),
        "conv_kernel": facts("ssm.conv_kernel"),
        "n_groups": facts("ssm.group_count"),
        "use_conv_bias": facts.shape("ssm_conv1d.bias") is not None,
        "attention_bias": facts.shape("attn_q.bias") is not None,
        "mlp_bias": facts.shape("ffn_up.bias") is not None,
    }
    if routed and shared:
        found |= {
            "moe_intermediate_size": routed[1],
            "moe_shared_expert_intermediate_size": shared[0],
            "n_routed_experts": facts("expert_count"),
            "n_shared_experts": facts.get("expert_shared_count", 1),
            "num_experts_per_tok": facts("expert_used_count"),
            "norm_topk_prob": facts.get("expert_weights_norm", False),
            "routed_scaling_factor": facts.get("expert_weights_scale", 1.0),
            "n_group": facts.get("expert_group_count", 1),
            "topk_group": facts.get("expert_group_used_count", 1),
        }
    return found


def mamba(facts: Facts) -> dict[str, Any]:
    """States in all layers. How long texts may be is not in the file; what it says of that is arbitrary."""
    return {
        "state_size": facts("ssm.state_size"),
        "conv_kernel": facts("ssm.conv_kernel"),
        "expand": facts("ssm.inner_size") // facts("embedding_length"),
        "intermediate_size": facts("ssm.inner_size"),
        "time_step_rank": facts("ssm.time_step_rank"),
        "layer_norm_epsilon": facts("attention.layer_norm_rms_epsilon"),
        "use_conv_bias": facts.has("blk.0.ssm_conv1d.bias"),
        "use_bias": facts.has("blk.0.ssm_in.bias"),
        "max_position_embeddings": None,
    }


def mamba2(facts: Facts) -> dict[str, Any]:
    """As `mamba`, with heads."""
    heads = facts("ssm.time_step_rank")
    found = mamba(facts) | {
        "num_heads": heads,
        "head_dim": facts("ssm.inner_size") // heads,
        "n_groups": facts("ssm.group_count"),
    }
    return {key: value for key, value in found.items() if key != "time_step_rank"}


def _mixers(facts: Facts) -> dict[str, Any]:
    recurs = facts.layers_with("ssm_in.weight")
    return {"layer_types": ["linear_attention" if each else "full_attention" for each in recurs]}
