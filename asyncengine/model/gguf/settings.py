"""A model's configuration in transformers' words, from the metadata of a GGUF file.

One function for each architecture that needs more than all have, each given `Facts`.
"""

from __future__ import annotations

import re
from typing import Any

from asyncengine.model.gguf.facts import Facts

_PLAIN = {0: "float32", 1: "float16", 30: "bfloat16"}
"""By ggml's number of the type."""


def none(facts: Facts) -> dict[str, Any]:
    """Nothing more."""
    return {}


def common(facts: Facts) -> dict[str, Any]:
    """What all have."""
    embedding = facts.tensors.get("token_embd.weight")
    heads = facts.one("attention.head_count")
    stated: dict[str, Any] = {
        "vocab_size": facts("vocab_size") if embedding is None else embedding.shape[0],
        "hidden_size": facts("embedding_length"),
        "num_hidden_layers": facts.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": facts.one("attention.head_count_kv", heads),
        "head_dim": facts.head_dim,
        "max_position_embeddings": facts("context_length"),
        "rms_norm_eps": facts.get("attention.layer_norm_rms_epsilon"),
        "intermediate_size": facts.one("feed_forward_length", 0) or None,
        "rope_parameters": rope(facts),
        "tie_word_embeddings": not facts.has("output.weight"),
        "bos_token_id": facts.token("bos"),
        "eos_token_id": facts.token("eos"),
        "pad_token_id": facts.token("padding"),
        "dtype": _dtype(facts),
    }
    return {key: value for key, value in stated.items() if value is not None or key.endswith("token_id")}


def rope(facts: Facts) -> dict[str, Any]:
    """How positions rotate. Frequencies that are stored one by one become those of "longrope", short and long alike."""
    found: dict[str, Any] = {"rope_theta": facts.get("rope.freq_base", 10000.0), "rope_type": "default"}
    longest, original = facts("context_length"), facts.get("rope.scaling.original_context_length")
    kind, factor = facts.get("rope.scaling.type", "none"), facts.get("rope.scaling.factor")
    factors = facts.numbers("rope_freqs.weight") or facts.numbers("blk.0.rope_freqs.weight")
    short, long = (facts.numbers(f"rope_factors_{each}.weight") for each in ("short", "long"))
    if short and long:
        attention = facts.get("rope.scaling.attn_factor")
        found |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        found |= {"original_max_position_embeddings": original or longest}
        found |= {} if attention is None else {"attention_factor": attention}
    elif factors:
        found |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
        found |= {"original_max_position_embeddings": longest}
    elif kind == "linear" and factor:
        found |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and factor:
        more = {
            "attention_factor": facts.get("rope.scaling.yarn_attn_factor"),
            "beta_fast": facts.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": facts.get("rope.scaling.yarn_beta_slow"),
            "original_max_position_embeddings": original,
        }
        found |= {"rope_type": "yarn", "factor": factor}
        found |= {key: value for key, value in more.items() if value is not None}
    return found


def biases(facts: Facts) -> dict[str, Any]:
    """Of models that may have biases in their attention or behind it."""
    return {"attention_bias": facts.has("blk.0.attn_q.bias"), "mlp_bias": facts.has("blk.0.ffn_up.bias")}


def windows(facts: Facts) -> dict[str, Any]:
    """Of models some of whose layers attend to a window: which ones."""
    window = facts.get("attention.sliding_window")
    pattern = facts.get("attention.sliding_window_pattern")
    if not window:
        return {"sliding_window": None, "layer_types": ["full_attention"] * facts.layers}
    if not isinstance(pattern, list):
        every = int(pattern or 4)
        pattern = [(layer + 1) % every != 0 for layer in range(facts.layers)]
    types = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
    return {"sliding_window": window, "layer_types": types[: facts.layers]}


def mixtral(facts: Facts) -> dict[str, Any]:
    """Experts among the layers of llama."""
    return {"num_local_experts": facts("expert_count"), "num_experts_per_tok": facts("expert_used_count")}


def _routed(facts: Facts) -> dict[str, Any]:
    plain = [layer for layer in range(facts.layers) if not facts.has(f"blk.{layer}.ffn_gate_inp.weight")]
    width = _outputs(facts, "ffn_gate_exps", 1) or (_outputs(facts, "ffn_gate_up_exps", 1) or 0) // 2
    return {
        "num_experts": facts("expert_count"),
        "num_experts_per_tok": facts("expert_used_count"),
        "moe_intermediate_size": facts.get("expert_feed_forward_length") or width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": plain,
    }


def _outputs(facts: Facts, name: str, dimension: int = 0) -> int | None:
    """Of a kind of matrix, in whatever layer has it first."""
    ending = f".{name}.weight"
    return next((each.shape[dimension] for key, each in facts.tensors.items() if key.endswith(ending)), None)


def qwen2_moe(facts: Facts) -> dict[str, Any]:
    """A further expert is always there."""
    shared = {"shared_expert_intermediate_size": _outputs(facts, "ffn_gate_shexp")}
    return _routed(facts) | shared | {"norm_topk_prob": False}


def qwen3_moe(facts: Facts) -> dict[str, Any]:
    """Shares of experts add up to 1."""
    return _routed(facts) | {"norm_topk_prob": True} | biases(facts)


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


def qwen3_5_moe(facts: Facts) -> dict[str, Any]:
    """As `qwen3_5`, with experts."""
    more = _routed(facts) | {"shared_expert_intermediate_size": _outputs(facts, "ffn_gate_shexp")}
    return qwen3_5(facts) | {key: value for key, value in more.items() if key != "decoder_sparse_step"}


def gemma2(facts: Facts) -> dict[str, Any]:
    """Soft caps, and windows in every other layer."""
    return {
        "query_pre_attn_scalar": _scaled_by(facts, 46),
        "sliding_window": facts("attention.sliding_window"),
        "attn_logit_softcapping": facts.get("attn_logit_softcapping"),
        "final_logit_softcapping": facts.get("final_logit_softcapping"),
    }


def gemma3(facts: Facts) -> dict[str, Any]:
    """Windows in five of six layers, which rotate by themselves."""
    near = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", 10000.0)}
    far = rope(facts) | {"rope_theta": facts.get("rope.freq_base", 1000000.0)}
    pattern = {"attention.sliding_window_pattern": 6}
    every = int(facts.get("attention.sliding_window_pattern", pattern["attention.sliding_window_pattern"]))
    sliding = [(layer + 1) % every != 0 for layer in range(facts.layers)]
    return {
        "query_pre_attn_scalar": _scaled_by(facts, 62),
        "sliding_window": facts.get("attention.sliding_window", 1024),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in sliding],
        "final_logit_softcapping": facts.get("final_logit_softcapping"),
        "rope_parameters": {"full_attention": far, "sliding_attention": near},
    }


def _scaled_by(facts: Facts, layers: int) -> int:
    """What attention is scaled by the root of: the largest model of each kind, told by its layers, has one of its own."""
    if facts.layers == layers:
        return int(facts("embedding_length") // facts.one("attention.head_count"))
    return facts.head_dim


def phi3(facts: Facts) -> dict[str, Any]:
    """A window in all layers, and a table of frequencies for short and for long texts."""
    found = rope(facts)
    found["partial_rotary_factor"] = partial = facts.get("rope.dimension_count", facts.head_dim) / facts.head_dim
    pad, end = facts.token("padding"), facts.token("eos")
    return {
        "sliding_window": facts.get("attention.sliding_window") or None,
        "original_max_position_embeddings": facts.get("rope.scaling.original_context_length", facts("context_length")),
        "rope_parameters": found,
        "partial_rotary_factor": partial,
        "pad_token_id": end if pad is None else pad,
    }


def starcoder2(facts: Facts) -> dict[str, Any]:
    """Biases everywhere."""
    return {"norm_epsilon": facts("attention.layer_norm_epsilon"), "use_bias": True, "sliding_window": None}


def granite(facts: Facts) -> dict[str, Any]:
    """Four factors."""
    return biases(facts) | {
        "embedding_multiplier": facts.get("embedding_scale", 1.0),
        "residual_multiplier": facts.get("residual_scale", 1.0),
        "attention_multiplier": facts.get("attention.scale", 1.0),
        "logits_scaling": facts.get("logit_scale", 1.0),
    }


def granite_moe(facts: Facts) -> dict[str, Any]:
    """As `granite`, with experts."""
    return granite(facts) | mixtral(facts)


def smollm3(facts: Facts) -> dict[str, Any]:
    """Every fourth layer does not rotate."""
    return biases(facts) | {"no_rope_layer_interval": 4, "use_sliding_window": False}


def cohere(facts: Facts) -> dict[str, Any]:
    """Layer norms, and a factor for logits."""
    return {
        "layer_norm_eps": facts("attention.layer_norm_epsilon"),
        "logit_scale": facts("logit_scale"),
        "use_qk_norm": facts.has("blk.0.attn_q_norm.weight"),
        "attention_bias": facts.has("blk.0.attn_q.bias"),
    }


def cohere2(facts: Facts) -> dict[str, Any]:
    """As `cohere`, with windows in three of four layers."""
    return {key: value for key, value in cohere(facts).items() if key != "use_qk_norm"} | windows(facts)


def glm4(facts: Facts) -> dict[str, Any]:
    """Heads rotate in part."""
    found = rope(facts)
    found["partial_rotary_factor"] = partial = facts("rope.dimension_count") / facts.head_dim
    pad, end = facts.token("padding"), facts.token("eos")
    return {
        "attention_bias": facts.has("blk.0.attn_q.bias"),
        "rope_parameters": found,
        "partial_rotary_factor": partial,
        "pad_token_id": end if pad is None else pad,
    }


def lfm2(facts: Facts) -> dict[str, Any]:
    """Short convolutions in layers that have no keys."""
    heads = facts("attention.head_count_kv")
    convolves = re.compile(r"blk\.\d+\.shortconv\.in_proj\.bias")
    return {
        "layer_types": ["full_attention" if each else "conv" for each in heads],
        "norm_eps": facts("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": facts("shortconv.l_cache"),
        "conv_bias": any(convolves.fullmatch(name) for name in facts.tensors),
        "block_auto_adjust_ff_dim": False,
    }


def gpt_oss(facts: Facts) -> dict[str, Any]:
    """Experts, learned sinks, and windows in every other layer."""
    types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(facts.layers)]
    return mixtral(facts) | {
        "sliding_window": facts("attention.sliding_window"),
        "layer_types": types,
        "intermediate_size": facts("expert_feed_forward_length"),
        "rope_parameters": rope(facts) | {"truncate": False},
        "attention_bias": True,
    }


def _dtype(facts: Facts) -> str:
    """Of what most of the numbers are stored in; codes were made of bfloat16."""
    sizes: dict[int, int] = {}
    for tensor in facts.tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.type_id] = sizes.get(tensor.type_id, 0) + tensor.rows * tensor.row_bytes
    most = max(sizes, key=lambda kind: sizes[kind], default=-1)
    return _PLAIN.get(most, "bfloat16")
