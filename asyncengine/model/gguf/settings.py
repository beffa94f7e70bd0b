"""A model's configuration in transformers' words, from the metadata of a GGUF file.

One function for each architecture that needs more than all have, each given `Facts`; those with experts are in
`sparse_settings`, those with states in `recurrent_settings`.
"""

from __future__ import annotations

import math
from typing import Any

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.gguf.facts import Facts

_PLAIN = {0: "float32", 1: "float16", 30: "bfloat16"}
"""By ggml's number of the type."""


def none(facts: Facts) -> dict[str, Any]:
    """Nothing more."""
    return {}


def common(facts: Facts, differs: tuple[str, ...] = ()) -> dict[str, Any]:
    """What all have.

    Args:
        facts: What the file says.
        differs: What may differ between layers, by its key; it is left out.
    """
    embedding = facts.tensors.get("token_embd.weight")

    def one(key: str, otherwise: Any = None) -> Any:
        return None if key in differs else facts.one(key, otherwise) or None

    stated: dict[str, Any] = {
        "vocab_size": facts("vocab_size") if embedding is None else embedding.shape[0],
        "hidden_size": facts("embedding_length"),
        "num_hidden_layers": facts.layers,
        "max_position_embeddings": facts("context_length"),
        "rms_norm_eps": facts.get("attention.layer_norm_rms_epsilon"),
        "intermediate_size": one("feed_forward_length", 0),
        "tie_word_embeddings": not facts.has("output.weight"),
        "bos_token_id": facts.token("bos"),
        "eos_token_id": facts.token("eos"),
        "pad_token_id": facts.token("padding"),
        "dtype": _dtype(facts),
    }
    if stated["rms_norm_eps"] is None:
        facts("attention.layer_norm_epsilon")
    if heads := one("attention.head_count"):
        stated |= {
            "num_attention_heads": heads,
            "num_key_value_heads": one("attention.head_count_kv", heads),
            "head_dim": facts.head_dim,
            "rope_parameters": rope(facts),
        }
    return {key: value for key, value in stated.items() if value is not None or key.endswith("token_id")}


def without_padding(facts: Facts) -> dict[str, Any]:
    """Of models whose own default would be a token that a smaller vocabulary does not have."""
    pad, end = facts.token("padding"), facts.token("eos")
    return {"pad_token_id": end if pad is None else pad}


def partly_rotated(facts: Facts, width: int | None = None) -> dict[str, Any]:
    """As `rope`, of models that rotate the first numbers of a head only.

    Args:
        facts: What the file says.
        width: How wide heads are, for what is stated of a share of that; as wide as they are.
    """
    width = facts.head_dim if width is None else width
    partial = facts.get("rope.dimension_count", width) / width
    found = rope(facts) | {"partial_rotary_factor": partial}
    return {"rope_parameters": found, "partial_rotary_factor": partial}


def rope(facts: Facts) -> dict[str, Any]:
    """How positions rotate. Frequencies that are stored one by one become those of "longrope", short and long alike.

    Raises:
        CheckpointError: A table of frequencies is missing.
        UnsupportedModelError: They are scaled in a way that is not known.
    """
    found: dict[str, Any] = {"rope_theta": facts.get("rope.freq_base", 10000.0), "rope_type": "default"}
    longest, original = facts("context_length"), facts.get("rope.scaling.original_context_length")
    factor = facts.get("rope.scaling.factor") or facts.get("rope.scale_linear")
    kind = facts.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModelError(f"positions that are scaled by {kind!r}")
    factors = facts.numbers("rope_freqs.weight") or facts.numbers("blk.0.rope_freqs.weight")
    short, long = (facts.numbers(f"rope_factors_{each}.weight") for each in ("short", "long"))
    if bool(short) != bool(long):
        raise CheckpointError("frequencies are stored for short or for long texts alone")
    if short and long:
        attention = facts.get("rope.scaling.attn_factor")
        found |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        found |= {"original_max_position_embeddings": original or longest}
        found |= {} if attention is None else {"attention_factor": attention}
    elif factors:
        found |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
        found |= {"original_max_position_embeddings": longest}
    elif kind == "linear" and factor and factor != 1.0:
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


def windows(facts: Facts, every: int = 4, otherwise: int | None = None) -> dict[str, Any]:
    """Of models some of whose layers attend to a window: which ones.

    Args:
        facts: What the file says.
        every: Which layers do not, if it does not say so.
        otherwise: How long windows are, if it does not say so; None if there are none then.
    """
    window = facts.get("attention.sliding_window", otherwise)
    pattern = facts.get("attention.sliding_window_pattern", every)
    if not window:
        return {"sliding_window": None, "layer_types": ["full_attention"] * facts.layers}
    if not isinstance(pattern, list):
        pattern = [(layer + 1) % pattern != 0 for layer in range(facts.layers)]
    types = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
    return {"sliding_window": window, "layer_types": types[: facts.layers]}


def olmo3(facts: Facts) -> dict[str, Any]:
    """Windows, whose layers rotate without scaling."""
    far = rope(facts)
    near = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", far["rope_theta"])}
    return windows(facts) | {"rope_parameters": {"full_attention": far, "sliding_attention": near}}


def gemma2(facts: Facts) -> dict[str, Any]:
    """Soft caps, and windows in every other layer."""
    return windows(facts, 2, 4096) | {
        "query_pre_attn_scalar": _scaled_by(facts, 46),
        "attn_logit_softcapping": facts.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": facts.get("final_logit_softcapping", 30.0),
    }


def gemma3(facts: Facts) -> dict[str, Any]:
    """Windows in five of six layers, which rotate by themselves."""
    near = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", 10000.0)}
    far = rope(facts) | {"rope_theta": facts.get("rope.freq_base", 1000000.0)}
    return windows(facts, 6) | {
        "query_pre_attn_scalar": _scaled_by(facts, 62),
        "final_logit_softcapping": facts.get("final_logit_softcapping"),
        "rope_parameters": {"full_attention": far, "sliding_attention": near},
    }


def _scaled_by(facts: Facts, layers: int) -> int:
    """What attention is scaled by the root of: the largest model of a kind, told by its layers, has its own."""
    if facts.layers == layers:
        return int(facts("embedding_length") // facts.one("attention.head_count"))
    return facts.head_dim


def phi3(facts: Facts) -> dict[str, Any]:
    """A window in all layers, and a table of frequencies for short and for long texts."""
    return (
        partly_rotated(facts)
        | without_padding(facts)
        | {
            "sliding_window": facts.get("attention.sliding_window") or None,
            "original_max_position_embeddings": facts.get(
                "rope.scaling.original_context_length", facts("context_length")
            ),
        }
    )


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
    return partly_rotated(facts) | without_padding(facts) | {"attention_bias": facts.has("blk.0.attn_q.bias")}


def seed_oss(facts: Facts) -> dict[str, Any]:
    """Biases may be before the attention, behind it, or in both places."""
    return biases(facts) | {"attention_out_bias": facts.has("blk.0.attn_output.bias")}


def ernie4_5(facts: Facts) -> dict[str, Any]:
    """Biases everywhere, or nowhere."""
    return {"use_bias": facts.has("blk.0.attn_q.bias")}


def nemotron(facts: Facts) -> dict[str, Any]:
    """Layer norms, and heads that rotate in part."""
    width = facts("embedding_length") // facts.one("attention.head_count")
    return partly_rotated(facts, width) | biases(facts) | {"norm_eps": facts("attention.layer_norm_epsilon")}


def phi(facts: Facts) -> dict[str, Any]:
    """Layer norms, and heads that rotate in part."""
    return partly_rotated(facts) | {"layer_norm_eps": facts("attention.layer_norm_epsilon")}


def olmo(facts: Facts) -> dict[str, Any]:
    """Queries, keys and values may be limited."""
    return {"clip_qkv": facts.get("attention.clamp_kqv")}


def stablelm(facts: Facts) -> dict[str, Any]:
    """Heads rotate in part; attention and network may be side by side."""
    return phi(facts) | {
        "use_parallel_residual": facts.get("use_parallel_residual", True),
        "use_qkv_bias": facts.has("blk.0.attn_q.bias") or facts.has("blk.0.attn_qkv.bias"),
        "qk_layernorm": facts.has("blk.0.attn_q_norm.weight"),
    }


def gpt_neox(facts: Facts) -> dict[str, Any]:
    """Attention and network may be side by side."""
    return phi(facts) | {"use_parallel_residual": facts.get("use_parallel_residual", True)}


def ministral3(facts: Facts) -> dict[str, Any]:
    """Queries grow with positions that are far behind those of the training."""
    more = {"llama_4_scaling_beta": facts("attention.temperature_scale")}
    if (factor := facts.get("rope.scaling.yarn_log_multiplier")) is not None:
        more |= dict.fromkeys(("mscale", "mscale_all_dim"), factor)
    return {"rope_parameters": rope(facts) | more, "sliding_window": None}


def mistral(facts: Facts) -> dict[str, Any]:
    """No windows: later ones have none, and files do not say of earlier ones."""
    return {"sliding_window": None}


def gpt2(facts: Facts) -> dict[str, Any]:
    """Positions are learned."""
    return {
        "n_inner": facts("feed_forward_length"),
        "layer_norm_epsilon": facts("attention.layer_norm_epsilon"),
    }


def gemma3n(facts: Facts) -> dict[str, Any]:
    """Several streams, embeddings of each layer's own, and layers that share keys."""
    sparse = [round(0.5 * (1 + math.erf(each / math.sqrt(2))), 6) for each in facts.each("activation_sparsity_scale")]
    return _near_and_far(facts, "default") | {
        "activation_sparsity_pattern": sparse,
        "altup_active_idx": facts("altup.active_idx"),
        "altup_num_inputs": facts("altup.num_inputs"),
        "final_logit_softcapping": facts.get("final_logit_softcapping"),
        "hidden_size_per_layer_input": facts("embedding_length_per_layer_input"),
        "intermediate_size": facts.each("feed_forward_length"),
        "laurel_rank": facts.tensors["blk.0.laurel_l.weight"].shape[0],
        "num_kv_shared_layers": facts("attention.shared_kv_layers"),
        "vocab_size_per_layer_input": facts.tensors["per_layer_token_embd.weight"].shape[0],
    }


def gemma4(facts: Facts) -> dict[str, Any]:
    """Heads of two widths, and perhaps embeddings of each layer's own, layers that share keys, or experts."""
    found = _near_and_far(facts, "proportional")
    shared = facts.get("attention.shared_kv_layers", 0)
    widths, heads = facts.each("feed_forward_length"), facts.each("attention.head_count_kv")
    far = [layer for layer, kind in enumerate(found["layer_types"]) if kind == "full_attention"]
    near = [layer for layer in range(facts.layers) if layer not in far]
    valued = [facts.has(f"blk.{layer}.attn_v.weight") for layer in far if layer < facts.layers - shared]
    frequencies = facts.numbers("rope_freqs.weight")
    rotated = sum(each < 1e29 for each in frequencies) / len(frequencies) if frequencies else 1.0
    found["rope_parameters"]["full_attention"] |= {"partial_rotary_factor": rotated}
    embedding = facts.tensors.get("per_layer_token_embd.weight")
    found |= {
        "head_dim": facts("attention.key_length_swa"),
        "global_head_dim": facts.head_dim,
        "num_key_value_heads": heads[near[0]],
        "num_global_key_value_heads": heads[far[0]],
        "attention_k_eq_v": not all(valued),
        "num_kv_shared_layers": shared,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "hidden_size_per_layer_input": facts.get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": 0 if embedding is None else embedding.shape[0],
        "final_logit_softcapping": facts.get("final_logit_softcapping"),
    }
    if facts.get("expert_count"):
        found |= {
            "enable_moe_block": True,
            "num_experts": facts("expert_count"),
            "top_k_experts": facts("expert_used_count"),
            "moe_intermediate_size": facts("expert_feed_forward_length"),
        }
    return found


def _near_and_far(facts: Facts, far: str) -> dict[str, Any]:
    """Windows in some layers, which rotate by themselves."""
    both = {"sliding_attention": (facts.get("rope.freq_base_swa", 10000.0), "default")}
    both["full_attention"] = facts.get("rope.freq_base", 1000000.0), far
    ropes = {kind: {"rope_type": name, "rope_theta": theta} for kind, (theta, name) in both.items()}
    return windows(facts) | {"rope_parameters": ropes}


def _dtype(facts: Facts) -> str:
    """Of what most of the numbers are stored in; codes were made of bfloat16."""
    sizes: dict[int, int] = {}
    for tensor in facts.tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.type_id] = sizes.get(tensor.type_id, 0) + tensor.rows * tensor.row_bytes
    most = max(sizes, key=lambda kind: sizes[kind], default=-1)
    return _PLAIN.get(most, "bfloat16")
