"""Random checkpoints of well-known shapes, made on disk once per run. Shared by the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 512,
    },
    "S": {  # the shape of SmolLM-135M
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152,
    },
    "M": {  # the shape of Qwen3-0.6B
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
    },
    "L": {  # the shape of Qwen3-8B
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
    },
}  # fmt: skip


def make(shape: str, dtype: str, device: str = "cpu") -> Any:
    """A random Llama (S, tiny) or Qwen3 (M, L), with tied embeddings but for L, made on a device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    values = {
        "tie_word_embeddings": True, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": 0,
    } | SHAPES[shape]  # fmt: skip
    config = Qwen3Config(**values) if shape in ("M", "L") else LlamaConfig(**values)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def write(path: Path, shape: str, dtype: str) -> Path:
    """Writes a random checkpoint."""
    make(shape, dtype).save_pretrained(path)
    return path
