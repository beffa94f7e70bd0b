"""What llama.cpp's converter says of each architecture, for `files`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def _nothing(config: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Kind:
    """How one architecture is written.

    Attributes:
        name: llama.cpp's.
        metadata: What is said of it beside what is said of all.
        permuted: Whether queries and keys are reordered.
        shifted: Whether norms are stored with one added.
    """

    name: str
    metadata: Callable[[Any], dict[str, Any]] = _nothing
    permuted: bool = False
    shifted: bool = False


def _windows(config: Any) -> dict[str, Any]:
    pattern = [kind == "sliding_attention" for kind in config.layer_types]
    return {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": pattern}


def _olmo(config: Any) -> dict[str, Any]:
    return {"attention.clamp_kqv": config.clip_qkv, "attention.layer_norm_epsilon": 1e-5}


def _olmo3(config: Any) -> dict[str, Any]:
    far = config.rope_parameters["full_attention"]
    return (
        _windows(config)
        | _yarn(far)
        | {
            "rope.freq_base": far["rope_theta"],
            "rope.scaling.yarn_attn_factor": far["attention_factor"],
        }
    )


def _yarn(rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": rope["beta_fast"],
        "rope.scaling.yarn_beta_slow": rope["beta_slow"],
    }


def _gemma(config: Any) -> dict[str, Any]:
    stated = {"attention.sliding_window": config.sliding_window, "attention.value_length": config.head_dim}
    caps = {"attn_logit_softcapping": config.attn_logit_softcapping}
    return stated | caps | {"final_logit_softcapping": config.final_logit_softcapping}


def _gemma3(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    far = [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"]
    return _gemma(config) | {
        "attention.sliding_window_pattern": far[0] + 1,
        "rope.freq_base": rope["full_attention"]["rope_theta"],
        "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
    }


def _experts(config: Any) -> dict[str, Any]:
    count = getattr(config, "num_experts", None) or config.num_local_experts
    found = {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
    if width := getattr(config, "moe_intermediate_size", None):
        found["expert_feed_forward_length"] = width
    return found


def _layer_norms(config: Any) -> dict[str, Any]:
    names = ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps")
    return {"attention.layer_norm_epsilon": next(getattr(config, name) for name in names if hasattr(config, name))}


def _partial(config: Any) -> dict[str, Any]:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"rope.dimension_count": int(width * config.rope_parameters["partial_rotary_factor"])}


def _granite(config: Any) -> dict[str, Any]:
    return {
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _cohere(config: Any) -> dict[str, Any]:
    return _layer_norms(config) | {"logit_scale": config.logit_scale}


def _gpt_oss(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return (
        _experts(config)
        | _yarn(rope)
        | {
            "attention.sliding_window": config.sliding_window,
            "expert_feed_forward_length": config.intermediate_size,
        }
    )


def _deepseek(config: Any) -> dict[str, Any]:
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_gating_func": 2,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
    }


def _delta(config: Any) -> dict[str, Any]:
    found = {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
    }
    if config.model_type != "qwen3_next":
        found["rope.dimension_sections"] = [*config.rope_parameters.get("mrope_section", [11, 11, 10]), 0]
    return found | _partial(config) | (_experts(config) if hasattr(config, "num_experts") else {})


def _lfm2(config: Any) -> dict[str, Any]:
    heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
    found = {"attention.head_count_kv": heads, "shortconv.l_cache": config.conv_L_cache}
    found["attention.layer_norm_rms_epsilon"] = config.norm_eps
    if config.model_type == "lfm2_moe":
        dense = {"leading_dense_block_count": config.num_dense_layers, "expert_gating_func": 2}
        return found | _experts(config) | dense
    return found


def _states(config: Any) -> dict[str, Any]:
    """Of either Mamba, in models that call its fields differently."""

    def field(*names: str) -> Any:
        return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)

    heads = field("mamba_n_heads", "mamba_num_heads", "num_heads")
    inner = field("mamba_d_ssm")
    if inner is None and heads is not None:
        inner = heads * field("mamba_d_head", "mamba_head_dim", "head_dim")
    stated = {
        "ssm.conv_kernel": field("mamba_d_conv", "conv_kernel"),
        "ssm.state_size": field("mamba_d_state", "ssm_state_size", "state_size"),
        "ssm.group_count": field("mamba_n_groups", "n_groups"),
        "ssm.inner_size": inner or config.intermediate_size,
        "ssm.time_step_rank": heads or config.time_step_rank,
    }
    if heads is None or config.model_type == "mamba2":
        stated |= {"attention.head_count": 0, "feed_forward_length": 0, "context_length": 1 << 20}
        stated |= dict.fromkeys(("attention.key_length", "attention.value_length"))
    if (epsilon := field("layer_norm_epsilon")) is not None:
        stated["attention.layer_norm_rms_epsilon"] = epsilon
    return stated


def _nemotron_h(config: Any) -> dict[str, Any]:
    types = config.layers_block_type
    heads = [config.num_key_value_heads if kind == "attention" or "full" in kind else 0 for kind in types]
    return _states(config) | {"attention.head_count_kv": heads, "block_count": len(types)}


def _granite_hybrid(config: Any) -> dict[str, Any]:
    attends = [kind in ("attention", "full_attention") for kind in config.layer_types]
    heads = [config.num_key_value_heads if each else 0 for each in attends]
    shared = {"expert_shared_feed_forward_length": config.shared_intermediate_size}
    stated = {"attention.head_count_kv": heads, "rope.scaling.finetuned": False, "context_length": 1 << 20}
    return _granite(config) | _experts(config) | _states(config) | shared | stated


def _grouped(config: Any) -> dict[str, Any]:
    return {
        "expert_count": getattr(config, "n_routed_experts", None) or config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": getattr(config, "n_shared_experts", None) or config.num_shared_experts,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_gating_func": 2,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
    }


def _ernie(config: Any) -> dict[str, Any]:
    return {
        "expert_count": config.moe_num_experts,
        "expert_used_count": config.moe_k,
        "interleave_moe_layer_step": config.moe_layer_interval,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.moe_num_shared_experts,
    }


def _near_and_far(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return _windows(config) | {
        "rope.freq_base": rope["full_attention"]["rope_theta"],
        "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _gemma3n(config: Any) -> dict[str, Any]:
    normal = torch.distributions.Normal(0, 1)
    scales = [float(normal.icdf(torch.tensor(each))) for each in config.activation_sparsity_pattern]
    altup = {"altup.active_idx": config.altup_active_idx, "altup.num_inputs": config.altup_num_inputs}
    return _near_and_far(config) | altup | {"activation_sparsity_scale": scales}


def _gemma4(config: Any) -> dict[str, Any]:
    far = config.per_layer_config[config.layer_types.index("full_attention")]
    near = config.per_layer_config[config.layer_types.index("sliding_attention")]
    first = config.num_hidden_layers - config.num_kv_shared_layers
    wide = [config.intermediate_size * (2 if layer >= first else 1) for layer in range(config.num_hidden_layers)]
    kinds = {"full_attention": far, "sliding_attention": near}
    return _near_and_far(config) | {
        "attention.key_length": far.head_dim,
        "attention.value_length": far.head_dim,
        "attention.key_length_swa": near.head_dim,
        "attention.value_length_swa": near.head_dim,
        "attention.head_count_kv": [kinds[kind].num_key_value_heads for kind in config.layer_types],
        "feed_forward_length": wide if config.use_double_wide_mlp else config.intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.top_k_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def _gpt_neox(config: Any) -> dict[str, Any]:
    parallel = {"use_parallel_residual": config.use_parallel_residual}
    return _layer_norms(config) | _partial(config) | parallel


def _stablelm(config: Any) -> dict[str, Any]:
    return _gpt_neox(config)


def _granite_shared(config: Any) -> dict[str, Any]:
    shared = {"expert_shared_feed_forward_length": config.shared_intermediate_size}
    return _granite(config) | _experts(config) | shared


def _ministral3(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return _yarn(rope) | {
        "rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"],
        "attention.temperature_scale": rope["llama_4_scaling_beta"],
    }


KINDS: dict[str, Kind] = {
    "llama": Kind("llama", permuted=True),
    "mixtral": Kind("llama", _experts, permuted=True),
    "qwen2": Kind("qwen2"),
    "qwen3": Kind("qwen3"),
    "qwen3_moe": Kind("qwen3moe", _experts),
    "gemma2": Kind("gemma2", _gemma, shifted=True),
    "gemma3_text": Kind("gemma3", _gemma3, shifted=True),
    "phi3": Kind("phi3"),
    "gpt2": Kind("gpt2", _layer_norms),
    "olmo2": Kind("olmo2"),
    "olmo3": Kind("olmo2", _olmo3),
    "granite": Kind("granite", _granite, permuted=True),
    "cohere": Kind("command-r", _cohere),
    "starcoder2": Kind("starcoder2", _layer_norms),
    "gpt_oss": Kind("gpt-oss", _gpt_oss),
    "deepseek_v3": Kind("deepseek2", _deepseek),
    "glm4": Kind("glm4", _partial),
    "smollm3": Kind("smollm3", permuted=True),
    "phi": Kind("phi2", lambda config: _layer_norms(config) | _partial(config)),
    "qwen3_next": Kind("qwen3next", _delta, shifted=True),
    "qwen3_5": Kind("qwen35", _delta, shifted=True),
    "qwen3_5_moe": Kind("qwen35moe", _delta, shifted=True),
    "lfm2": Kind("lfm2", _lfm2),
    "lfm2_moe": Kind("lfm2moe", _lfm2),
    "granitemoehybrid": Kind("granitehybrid", _granite_hybrid),
    "falcon_h1": Kind("falcon-h1", _states),
    "nemotron_h": Kind("nemotron_h", _nemotron_h),
    "mamba": Kind("mamba", _states),
    "falcon_mamba": Kind("mamba", lambda config: _states(config) | {"ssm.dt_b_c_rms": True}),
    "mamba2": Kind("mamba2", _states),
    "apertus": Kind("apertus"),
    "arcee": Kind("arcee", permuted=True),
    "cohere2": Kind("cohere2", lambda config: _cohere(config) | {"attention.sliding_window": config.sliding_window}),
    "deepseek_v2": Kind("deepseek2", lambda config: _deepseek(config) | {"expert_gating_func": None}),
    "dots1": Kind("dots1", _grouped),
    "ernie4_5": Kind("ernie4_5"),
    "ernie4_5_moe": Kind("ernie4_5-moe", _ernie),
    "exaone4": Kind("exaone4", _windows),
    "exaone_moe": Kind("exaone-moe", lambda config: _windows(config) | _grouped(config)),
    "gemma": Kind("gemma", shifted=True),
    "gemma3n_text": Kind("gemma3n", _gemma3n),
    "gemma4_text": Kind("gemma4", _gemma4),
    "gemma4_moe": Kind("gemma4", _gemma4),
    "glm4_moe": Kind("glm4moe", lambda config: _grouped(config) | _partial(config)),
    "gpt_neox": Kind("gptneox", _gpt_neox),
    "granitemoe": Kind("granitemoe", lambda config: _granite(config) | _experts(config), permuted=True),
    "granitemoeshared": Kind("granitemoe", _granite_shared, permuted=True),
    "hunyuan_v1_dense": Kind("hunyuan-dense"),
    "minimax_m2": Kind("minimax-m2", lambda config: _experts(config) | _partial(config)),
    "ministral3": Kind("mistral3", _ministral3, permuted=True),
    "nemotron": Kind("nemotron", lambda config: _layer_norms(config) | _partial(config), shifted=True),
    "olmo": Kind("olmo", _olmo, permuted=True),
    "olmoe": Kind("olmoe", _experts),
    "phimoe": Kind("phimoe", _experts),
    "qwen2_moe": Kind("qwen2moe", _experts),
    "seed_oss": Kind("seed_oss"),
    "stablelm": Kind("stablelm", _stablelm),
}
"""By what `tests.model.checkpoints` calls them."""


def common(config: Any) -> dict[str, Any]:
    fields = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    }
    stated = {key: getattr(config, name, None) for key, name in fields.items()}
    if stated["feed_forward_length"] is None and stated["attention.head_count"]:
        stated["feed_forward_length"] = 4 * config.hidden_size
    rope = getattr(config, "rope_parameters", None) or {}
    return stated | {"rope.freq_base": rope.get("rope_theta")}


def frequencies(config: Any) -> list[float]:
    """What frequencies are divided by, where that is stored one by one."""
    rope = getattr(config, "rope_parameters", None) or {}
    if (far := rope.get("full_attention", {})).get("rope_type") == "proportional":
        half = config.per_layer_config[config.layer_types.index("full_attention")].head_dim // 2
        rotated = int(half * far["partial_rotary_factor"])
        return [1.0] * rotated + [1e30] * (half - rotated)
    if rope.get("rope_type") != "llama3":
        return []
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    found = []
    for index in range(0, width, 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (index / width))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found
