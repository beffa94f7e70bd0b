"""Which architectures of llama.cpp's are which of transformers', and what their tensors are called there.

What llama.cpp's converter leaves out, because its own code knows it, is stated here; what it does to weights is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.gguf import places, recurrent_places, recurrent_settings, settings, sparse_settings
from asyncengine.model.gguf.facts import Facts
from asyncengine.model.gguf.family import Family
from asyncengine.model.gguf.header import Header

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
_NORMED = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NETWORK = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_BETWEEN = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_DENSE = _ATTENTION | _NETWORK | _BEFORE
_OLMO = _ATTENTION | _NETWORK | _NORMED | _BEHIND
_SANDWICH = _OLMO | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
_ROUTED = {"ffn_gate_inp": "mlp.gate"}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_CORRECTED = _ROUTED | {
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias", "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj", "ffn_down_shexp": "mlp.shared_experts.down_proj",
}  # fmt: skip
"""As DeepSeek has it: what experts are chosen by has a bias, and those that are always there have no gate."""
_QWEN35 = _ATTENTION | _NORMED | _NETWORK | _BETWEEN
_GRANITE_ROUTED = {"ffn_gate_inp": "block_sparse_moe.router"}
_GEMMA4 = _SANDWICH | {
    "layer_output_scale.weight": "layer_scalar", "inp_gate": "per_layer_input_gate", "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm", "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2", "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj", "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
}  # fmt: skip
_GEMMA3N = _SANDWICH | {
    "altup_correct_scale.weight": "altup.correct_output_scale", "altup_correct_coef": "altup.correction_coefs",
    "altup_router": "altup.modality_router", "altup_predict_coef": "altup.prediction_coefs",
    "altup_router_norm": "altup.router_norm", "laurel_l": "laurel.linear_left", "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm", "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection", "post_norm": "post_per_layer_input_norm",
}  # fmt: skip
_GEMMA_OUTSIDE = _OUTSIDE | {
    "per_layer_token_embd": "model.embed_tokens_per_layer", "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}  # fmt: skip
_LFM2 = _ATTENTION | {
    "attn_norm": "operator_norm", "ffn_norm": "ffn_norm", "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm", "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2",
    "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj",
}  # fmt: skip
_LFM2_OUTSIDE = {
    "token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm",
    "output_norm": "model.embedding_norm", "output": "lm_head",
}  # fmt: skip
_LATENT = {
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
    "attn_q": "self_attn.q_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
_GRANITE_HYBRID = _ATTENTION | _BEFORE | _GRANITE_ROUTED | {
    "ffn_down": "shared_mlp.output_linear", "ffn_down_shexp": "shared_mlp.output_linear",
    "ssm_in": "mamba.in_proj", "ssm_conv1d": "mamba.conv1d", "ssm_out": "mamba.out_proj",
}  # fmt: skip
_FALCON_H1 = _ATTENTION | {
    "attn_norm": "input_layernorm", "ffn_norm": "pre_ff_layernorm.weight", "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj", "ffn_down": "feed_forward.down_proj",
    "ssm_in": "mamba.in_proj", "ssm_conv1d": "mamba.conv1d", "ssm_out": "mamba.out_proj",
}  # fmt: skip
_MAMBA = {
    "attn_norm": "norm", "ssm_in": "mixer.in_proj", "ssm_conv1d": "mixer.conv1d", "ssm_out": "mixer.out_proj",
    "ssm_x": "mixer.x_proj", "ssm_dt": "mixer.dt_proj",
}  # fmt: skip
_MAMBA_OUTSIDE = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}
_NEMOTRON_H = _MAMBA | {
    "attn_q": "mixer.q_proj", "attn_k": "mixer.k_proj", "attn_v": "mixer.v_proj", "attn_output": "mixer.o_proj",
    "ffn_up": "mixer.up_proj", "ffn_down": "mixer.down_proj", "ffn_gate_inp": "mixer.gate",
    "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
    "ffn_up_shexp": "mixer.shared_experts.up_proj", "ffn_down_shexp": "mixer.shared_experts.down_proj",
}  # fmt: skip
_NEMOTRON_H_OUTSIDE = {"token_embd": "model.embeddings", "output_norm": "model.norm_f", "output": "lm_head"}
_GPT2 = {
    "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "attn_norm": "ln_1", "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_GPT2_OUTSIDE = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head",
}  # fmt: skip
_PHI = _ATTENTION | {
    "attn_output": "self_attn.dense", "attn_norm": "input_layernorm", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip
_GPT_NEOX = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip
_GPT_NEOX_OUTSIDE = {
    "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "lm_head",
}  # fmt: skip
_EXPERTS = (places.experts("mlp.experts"),)
_GRANITE_EXPERTS = (places.experts("block_sparse_moe.experts"),)


def _family(
    model_type: str,
    model_class: str,
    of: Callable[[Facts], dict[str, Any]] = settings.none,
    names: Mapping[str, str] = _DENSE,
    outside: Mapping[str, str] = _OUTSIDE,
    **more: Any,
) -> Family:
    return Family(model_type, f"{model_class}ForCausalLM", of, names, outside, **more)


_MIXTRAL = _family("mixtral", "Mixtral", sparse_settings.mixtral, _DENSE | _ROUTED, pairs=True, places=_EXPERTS)
_OLMO3 = _family("olmo3", "Olmo3", settings.olmo3, _OLMO)
_DEEPSEEK = _LATENT | _NETWORK | _BEFORE | _CORRECTED
_NEMOTRON_HYBRID = _family(
    "nemotron_h", "NemotronH", recurrent_settings.nemotron_h, _NEMOTRON_H, _NEMOTRON_H_OUTSIDE,
    places=(recurrent_places.mamba("mixer"), places.experts_without_gates("mixer.experts")),
    differs=("feed_forward_length",),
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "apertus": _family(
        "apertus", "Apertus", settings.biases,
        _DENSE | _NORMED | {"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"},
        places=(places.activation,),
    ),
    "arcee": _family("arcee", "Arcee", settings.biases, pairs=True),
    "cohere2": _family("cohere2", "Cohere2", settings.cohere2),
    "cohere2moe": _family(
        "cohere2_moe", "Cohere2Moe", sparse_settings.cohere2_moe, _DENSE | _ROUTED, places=_EXPERTS
    ),
    "command-r": _family("cohere", "Cohere", settings.cohere, _DENSE | _NORMED),
    "deepseek2": _family(
        "deepseek_v2", "DeepseekV2", sparse_settings.deepseek_v2, _DEEPSEEK, places=(*_EXPERTS, places.latent_keys)
    ),
    "dots1": _family("dots1", "Dots1", sparse_settings.dots1, _DENSE | _NORMED | _CORRECTED, places=_EXPERTS),
    "ernie4_5": _family("ernie4_5", "Ernie4_5", settings.ernie4_5),
    "ernie4_5-moe": _family(
        "ernie4_5_moe", "Ernie4_5_Moe", sparse_settings.ernie4_5_moe,
        _DENSE | _CORRECTED | {"exp_probs_b.bias": "mlp.gate.moe_statics.e_score_correction_bias"}, places=_EXPERTS,
    ),
    "exaone4": _family("exaone4", "Exaone4", settings.windows, _OLMO),
    "exaone-moe": _family(
        "exaone_moe", "ExaoneMoe", sparse_settings.exaone_moe, _DENSE | _NORMED | _CORRECTED, places=_EXPERTS
    ),
    "falcon-h1": _family(
        "falcon_h1", "FalconH1", recurrent_settings.falcon_h1, _FALCON_H1,
        _OUTSIDE | {"output_norm": "model.final_layernorm"}, places=(recurrent_places.mamba("mamba"),),
    ),
    "gemma": _family("gemma", "Gemma", shifted=True),
    "gemma2": _family("gemma2", "Gemma2", settings.gemma2, _SANDWICH, shifted=True),
    "gemma3": _family("gemma3_text", "Gemma3", settings.gemma3, _SANDWICH, shifted=True),
    "gemma3n": _family(
        "gemma3n_text", "Gemma3n", settings.gemma3n, _GEMMA3N, _GEMMA_OUTSIDE,
        places_outside=(places.streams,), differs=("feed_forward_length",),
    ),
    "gemma4": _family(
        "gemma4_text", "Gemma4", settings.gemma4, _GEMMA4, _GEMMA_OUTSIDE,
        places=(places.experts("experts"),), differs=("feed_forward_length", "attention.head_count_kv"),
    ),
    "glm4": _family(
        "glm4", "Glm4", settings.glm4,
        _DENSE | {
            "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm",
            "ffn_up": "mlp.gate_up_proj",
        },
    ),
    "glm4moe": _family(
        "glm4_moe", "Glm4Moe", sparse_settings.glm4_moe, _QWEN35 | _CORRECTED, places=_EXPERTS
    ),
    "gpt-oss": _family(
        "gpt_oss", "GptOss", sparse_settings.gpt_oss, _ATTENTION | _BETWEEN | {"ffn_gate_inp": "mlp.router"},
        places=(places.interleaved_experts("mlp.experts"),),
    ),
    "gpt2": Family(
        "gpt2", "GPT2LMHeadModel", settings.gpt2, _GPT2, _GPT2_OUTSIDE, layer="transformer.h.{}."
    ),
    "gptneox": _family(
        "gpt_neox", "GPTNeoX", settings.gpt_neox, _GPT_NEOX, _GPT_NEOX_OUTSIDE, layer="gpt_neox.layers.{}.",
        places=(places.by_head("attention.query_key_value"),),
    ),
    "granite": _family("granite", "Granite", settings.granite, pairs=True),
    "granitehybrid": _family(
        "granitemoehybrid", "GraniteMoeHybrid", recurrent_settings.granite_hybrid, _GRANITE_HYBRID,
        places=(
            *_GRANITE_EXPERTS, places.gate_and_up("shared_mlp.input_linear.weight", "", "_shexp"),
            recurrent_places.mamba("mamba"),
        ),
    ),
    "granitemoe": _family(
        "granitemoe", "GraniteMoe", sparse_settings.granite_moe, _DENSE | _GRANITE_ROUTED, pairs=True,
        places=_GRANITE_EXPERTS,
    ),
    "hunyuan-dense": _family(
        "hunyuan_v1_dense", "HunYuanDenseV1", settings.biases,
        _DENSE | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
    "lfm2": _family(
        "lfm2", "Lfm2", recurrent_settings.lfm2, _LFM2, _LFM2_OUTSIDE, places=(recurrent_places.short_convolution,)
    ),
    "lfm2moe": _family(
        "lfm2_moe", "Lfm2Moe", sparse_settings.lfm2_moe,
        _LFM2 | {"ffn_gate_inp": "feed_forward.gate", "exp_probs_b.bias": "feed_forward.expert_bias"}, _LFM2_OUTSIDE,
        places=(recurrent_places.short_convolution, places.experts("feed_forward.experts")),
    ),
    "llama": _family("llama", "Llama", settings.biases, pairs=True),
    "mamba": _family(
        "mamba", "Mamba", recurrent_settings.mamba, _MAMBA, _MAMBA_OUTSIDE, layer="backbone.layers.{}.",
        places=(recurrent_places.mamba("mixer"),),
    ),
    "mamba2": _family(
        "mamba2", "Mamba2", recurrent_settings.mamba2, _MAMBA, _MAMBA_OUTSIDE, layer="backbone.layers.{}.",
        places=(recurrent_places.mamba("mixer"),),
    ),
    "minimax-m2": _family(
        "minimax_m2", "MiniMaxM2", sparse_settings.minimax_m2,
        _DENSE | _NORMED | _ROUTED | {"exp_probs_b.bias": "mlp.e_score_correction_bias"}, places=_EXPERTS,
    ),
    "mistral3": _family("mistral", "Mistral", settings.mistral, pairs=True),
    "nemotron": _family("nemotron", "Nemotron", settings.nemotron, shifted=True),
    "nemotron_h": _NEMOTRON_HYBRID,
    "nemotron_h_moe": _NEMOTRON_HYBRID,
    "olmo": _family("olmo", "Olmo", settings.olmo, pairs=True),
    "olmo2": _family("olmo2", "Olmo2", settings.none, _OLMO),
    "olmoe": _family("olmoe", "Olmoe", sparse_settings.olmoe, _DENSE | _NORMED | _ROUTED, places=_EXPERTS),
    "phi2": _family("phi", "Phi", settings.phi, _PHI, _OUTSIDE | {"output_norm": "model.final_layernorm"}),
    "phi3": _family(
        "phi3", "Phi3", settings.phi3,
        _DENSE | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "phimoe": _family(
        "phimoe", "Phimoe", sparse_settings.phimoe, _DENSE | {"ffn_gate_inp": "mlp.router"}, places=_EXPERTS
    ),
    "qwen2": _family("qwen2", "Qwen2"),
    "qwen2moe": _family(
        "qwen2_moe", "Qwen2Moe", sparse_settings.qwen2_moe, _DENSE | _ROUTED | _SHARED, places=_EXPERTS
    ),
    "qwen3": _family("qwen3", "Qwen3", settings.biases, _DENSE | _NORMED),
    "qwen35": _family(
        "qwen3_5_text", "Qwen3_5", recurrent_settings.qwen3_5, _QWEN35,
        shifted=True, places=(recurrent_places.value_heads,),
    ),
    "qwen35moe": _family(
        "qwen3_5_moe_text", "Qwen3_5Moe", sparse_settings.qwen3_5_moe, _QWEN35 | _ROUTED | _SHARED,
        shifted=True, places=(recurrent_places.value_heads, *_EXPERTS),
    ),
    "qwen3moe": _family(
        "qwen3_moe", "Qwen3Moe", sparse_settings.qwen3_moe, _DENSE | _NORMED | _ROUTED, places=_EXPERTS
    ),
    "qwen3next": _family(
        "qwen3_next", "Qwen3Next", sparse_settings.qwen3_next,
        _QWEN35 | _ROUTED | _SHARED | {
            "ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba", "ssm_out": "linear_attn.out_proj",
        },
        shifted=True, places=(recurrent_places.grouped_value_heads, *_EXPERTS),
    ),
    "seed_oss": _family("seed_oss", "SeedOss", settings.seed_oss, _ATTENTION | _NETWORK | _BETWEEN),
    "smollm3": _family("smollm3", "SmolLM3", settings.smollm3, pairs=True),
    "stablelm": _family("stablelm", "StableLm", settings.stablelm, places=(places.norms_of_heads,)),
    "starcoder2": _family(
        "starcoder2", "Starcoder2", settings.starcoder2, _DENSE | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    ),
}  # fmt: skip
FAMILIES |= {
    f"{name}vl{more}": FAMILIES[f"{name}{more}"] for name, more in (("qwen2", ""), ("qwen3", ""), ("qwen3", "moe"))
}
"""By what llama.cpp calls them. Those that see images compute the same of text. Some names stand for several, which
`family_of` tells apart.
"""
_INSTEAD: Mapping[str, tuple[Callable[[Facts], Any], Family]] = {
    "deepseek2": (
        sparse_settings.sigmoid,
        _family(
            "deepseek_v3", "DeepseekV3", sparse_settings.deepseek_v3, _DEEPSEEK, places=(*_EXPERTS, places.latent_keys)
        ),
    ),
    "granitemoe": (
        lambda facts: facts.get("expert_shared_feed_forward_length"),
        _family(
            "granitemoeshared", "GraniteMoeShared", sparse_settings.granite_moe_shared,
            _DENSE | _GRANITE_ROUTED | {"ffn_down_shexp": "shared_mlp.output_linear"}, pairs=True,
            places=(*_GRANITE_EXPERTS, places.gate_and_up("shared_mlp.input_linear.weight", "_shexp")),
        ),
    ),
    "llama": (lambda facts: facts.get("expert_count"), _MIXTRAL),
    "mamba": (
        lambda facts: facts.get("ssm.dt_b_c_rms"),
        _family(
            "falcon_mamba", "FalconMamba", recurrent_settings.mamba, _MAMBA, _MAMBA_OUTSIDE,
            layer="backbone.layers.{}.", places=(recurrent_places.mamba("mixer"),),
        ),
    ),
    "mistral3": (
        lambda facts: facts.get("attention.temperature_scale"),
        _family("ministral3", "Ministral3", settings.ministral3, pairs=True),
    ),
    "olmo2": (lambda facts: facts.get("attention.sliding_window"), _OLMO3),
}  # fmt: skip
"""When a name stands for another family, and for which."""


def family_of(header: Header) -> Family:
    """What a file's model is.

    Raises:
        CheckpointError: It says nothing of that.
        UnsupportedModelError: It is none that is known here.
    """
    kind = header.metadata.get("general.architecture")
    if not isinstance(kind, str):
        raise CheckpointError("its metadata has no general.architecture")
    if header.metadata.get("general.type", "model") != "model":
        raise UnsupportedModelError(f"it is no model, but of type {header.metadata['general.type']!r}")
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"GGUF files of the architecture {kind!r} cannot be read; those of {', '.join(sorted(FAMILIES))} can"
        )
    if kind in _INSTEAD and _INSTEAD[kind][0](Facts(header)):
        return _INSTEAD[kind][1]
    return FAMILIES[kind]
