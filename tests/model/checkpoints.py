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
    "phi": ("PhiConfig", COMMON),
}  # fmt: skip


def config(architecture: str, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    name, values = ARCHITECTURES[architecture]
    return getattr(transformers, name)(**(values | changes))


def write(path: Path, architecture: str, seed: int = 0, **changes: Any) -> Path:
    """Writes a random checkpoint, whose logits are spread widely enough that greedy decoding is well defined."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(architecture, **changes), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.12)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return path
