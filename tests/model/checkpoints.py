"""Tiny random checkpoints of many architectures, written to disk by transformers. No weights are ever downloaded."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
WINDOWED: dict[str, Any] = COMMON | {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 24}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "mistral": ("MistralConfig", COMMON | {"sliding_window": 24}),
    "mixtral": ("MixtralConfig", COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", COMMON | {"head_dim": 32}),
    "qwen3_moe": ("Qwen3MoeConfig", COMMON | MOE | {"num_experts": 4, "head_dim": 16, "decoder_sparse_step": 1}),
    "gemma2": (
        "Gemma2Config",
        COMMON | {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        COMMON | {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    ),
    "phi3": ("Phi3Config", COMMON),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 199, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
    "olmo2": ("Olmo2Config", COMMON),
    "granite": ("GraniteConfig", COMMON | {"logits_scaling": 2.0, "attention_multiplier": 0.3}),
    "cohere": ("CohereConfig", COMMON | {"use_qk_norm": True}),
    "starcoder2": ("Starcoder2Config", COMMON | {"sliding_window": 24}),
    "gpt_oss": (
        "GptOssConfig",
        COMMON | {"head_dim": 16, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 199, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 512, "word_embed_proj_dim": 64, "bos_token_id": None, "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        COMMON | {
            "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16, "v_head_dim": 20, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1,
        },
    ),
    "olmo3": ("Olmo3Config", COMMON | {"sliding_window": 24}),
    "glm4": ("Glm4Config", COMMON | {"head_dim": 16}),
    "smollm3": ("SmolLM3Config", COMMON),
    "cohere2": ("Cohere2Config", WINDOWED),
    "exaone4": ("Exaone4Config", WINDOWED | {"sliding_window_pattern": 4}),
    "phi": ("PhiConfig", COMMON),
}  # fmt: skip

DELTA: dict[str, Any] = COMMON | {
    "num_hidden_layers": 4, "head_dim": 16, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
MAMBA2: dict[str, Any] = COMMON | {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
LATENT: dict[str, Any] = COMMON | {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
}  # fmt: skip
ATTENTION_FREE: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
PERIODIC: dict[str, Any] = COMMON | {"attn_layer_period": 2, "attn_layer_offset": 1}

RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", DELTA | EXPERTS),
    "qwen3_5": ("Qwen3_5TextConfig", DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", DELTA | EXPERTS),
    "olmo_hybrid": ("OlmoHybridConfig", {name: value for name, value in DELTA.items() if name != "head_dim"}),
    "lara_mini": ("LaraMiniConfig", DELTA | EXPERTS | {
        "layer_types": ["linear_attention", "sliding_attention"] * 2, "sliding_window": 24,
    }),
    "kimi_linear": ("KimiLinearConfig", LATENT | {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"], "linear_num_heads": 4,
        "linear_head_dim": 16,
    }),
    "bailing_hybrid": ("BailingHybridConfig", LATENT | {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"], "q_lora_rank": 24, "head_dim": 16,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    }),
    "lfm2": ("Lfm2Config", COMMON | {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}),
    "lfm2_moe": ("Lfm2MoeConfig", COMMON | MOE | {
        "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "num_experts": 4, "num_dense_layers": 1,
    }),
    "lfm3": ("Lfm3Config", COMMON),
    "zaya": ("ZayaConfig", {name: value for name, value in COMMON.items() if name != "intermediate_size"} | {
        "head_dim": 16, "moe_intermediate_size": 48, "num_experts": 4, "router_hidden_size": 32,
    }),
    "granitemoehybrid": ("GraniteMoeHybridConfig", MAMBA2 | {
        "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
    }),
    "bamba": ("BambaConfig", MAMBA2 | {"attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1Config", MAMBA2 | {"mamba_d_ssm": 128}),
    "nemotron_h": ("NemotronHConfig", COMMON | {
        "layers_block_type": ["mamba", "mlp", "attention", "mamba"], "num_hidden_layers": 4, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4, "chunk_size": 8, "head_dim": 16,
    }),
    "zamba2": ("Zamba2Config", COMMON | {
        "num_hidden_layers": 4, "mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1,
        "chunk_size": 8, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    }),
    "jamba": ("JambaConfig", PERIODIC | MOE | {
        "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    }),
    "mamba": ("MambaConfig", ATTENTION_FREE),
    "falcon_mamba": ("FalconMambaConfig", ATTENTION_FREE),
    "mamba2": ("Mamba2Config", ATTENTION_FREE | {
        "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8,
    }),
}  # fmt: skip
"""Those with layers that keep a state, beside layers that attend or alone."""

GROUPED: dict[str, Any] = MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
ROUTED: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

LATENT_HEADS: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 20,
}  # fmt: skip

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", COMMON),
    "arcee": ("ArceeConfig", COMMON),
    "cohere2_moe": ("Cohere2MoeConfig", WINDOWED | ROUTED | {
        "num_experts": 4, "num_shared_experts": 1, "shared_expert_combination_strategy": "average",
        "expert_selection_fn": "sigmoid", "prefix_dense_intermediate_size": 96, "first_k_dense_replace": 1,
    }),
    "deepseek_v2": ("DeepseekV2Config", COMMON | GROUPED | LATENT_HEADS | {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    }),
    "dots1": ("Dots1Config", COMMON | GROUPED | {"head_dim": 16}),
    "ernie4_5": ("Ernie4_5Config", COMMON),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", COMMON | {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "moe_layer_start_index": 1,
        "moe_layer_end_index": 2, "moe_layer_interval": 1, "moe_num_shared_experts": 2,
    }),
    "exaone_moe": ("ExaoneMoeConfig", WINDOWED | MOE | {"num_experts": 4, "num_shared_experts": 1}),
    "gemma": ("GemmaConfig", COMMON | {"head_dim": 16}),
    "gemma3n_text": ("Gemma3nTextConfig", COMMON | {
        "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 24, "intermediate_size": [96] * 4,
        "vocab_size_per_layer_input": 199, "hidden_size_per_layer_input": 32, "laurel_rank": 16,
        "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
    "gemma4_text": ("Gemma4TextConfig", COMMON | {
        "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, "sliding_window": 24,
        "vocab_size_per_layer_input": 199, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "use_double_wide_mlp": True,
    }),
    "gemma4_moe": ("Gemma4TextConfig", COMMON | {
        "num_hidden_layers": 2, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True, "sliding_window": 24, "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"],
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48,
    }),
    "glm4_moe": ("Glm4MoeConfig", COMMON | GROUPED | {"head_dim": 16, "attention_bias": True, "use_qk_norm": True}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", COMMON | GROUPED | LATENT_HEADS | {"n_group": 1, "topk_group": 1}),
    "granitemoe": ("GraniteMoeConfig", COMMON | ROUTED | {"embedding_multiplier": 3.0}),
    "granitemoeshared": ("GraniteMoeSharedConfig", COMMON | ROUTED | {"shared_intermediate_size": 80}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", COMMON | {"head_dim": 16}),
    "longcat_flash": ("LongcatFlashConfig", COMMON | LATENT_HEADS | {
        "n_routed_experts": 4, "zero_expert_num": 1, "moe_topk": 2, "expert_ffn_hidden_size": 32,
        "ffn_hidden_size": 96, "num_layers": 2, "head_dim": 8,
    }),
    "minicpm3": ("MiniCPM3Config", COMMON | LATENT_HEADS),
    "minimax_m2": ("MiniMaxM2Config", COMMON | ROUTED | {"head_dim": 16, "rotary_dim": 8}),
    "ministral3": ("Ministral3Config", COMMON | {"head_dim": 16}),
    "nemotron": ("NemotronConfig", COMMON | {"head_dim": 16}),
    "olmo": ("OlmoConfig", COMMON | {"clip_qkv": 2.0}),
    "olmoe": ("OlmoeConfig", COMMON | {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeConfig", COMMON | ROUTED | {"attention_bias": True, "lm_head_bias": True}),
    "qwen2_moe": ("Qwen2MoeConfig", COMMON | EXPERTS | {"decoder_sparse_step": 1}),
    "seed_oss": ("SeedOssConfig", COMMON | {"head_dim": 16}),
    "stablelm": ("StableLmConfig", COMMON | {"use_qkv_bias": True}),
}  # fmt: skip
"""Those that are nothing new to the engine, but have names of their own in other kinds of files."""


def config(architecture: str, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    name, values = (ARCHITECTURES | RECURRENT | OTHERS)[architecture]
    return getattr(transformers, name)(**(values | changes))


def write(path: Path, architecture: str, seed: int = 0, kind: Any = AutoModelForCausalLM, **changes: Any) -> Path:
    """Writes a random checkpoint, whose logits are spread widely enough that greedy decoding is well defined."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.from_config(config(architecture, **changes), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("A_log", "dt_bias", ".D")):  # rates, which are what they are for a reason
                    continue
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.12)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            for name, buffer in model.named_buffers():
                if name.endswith("correction_bias"):
                    buffer.add_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(path)
    return path
