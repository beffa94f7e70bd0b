"""Random checkpoints of well-known shapes, made on disk once per run. Shared by the benchmarks."""

from __future__ import annotations

import random
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
    "1B": {  # the shape of Llama-3.2-1B: 2.5 GB in bfloat16
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256,
    },
    "E": {  # experts: a small Mixtral, 180 M parameters, of which a token uses 65 M
        "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 1024, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "H": {  # the shape of Qwen3.5-0.8B: three layers of linear attention to each that attends
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 256, "intermediate_size": 3584, "vocab_size": 248320,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 6,
        "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    },
    "L": {  # the shape of Qwen3-8B
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
    },
}  # fmt: skip


def make(shape: str, dtype: str, device: str = "cpu", max_length: int = 4096) -> Any:
    """A random Llama (S, 1B, tiny), Qwen3 (M, L), Qwen3.5 (H) or Mixtral (E), made on a device.

    All but L have tied embeddings.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    values = {
        "tie_word_embeddings": True, "max_position_embeddings": max_length, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": 0,
    } | SHAPES[shape]  # fmt: skip
    kinds = {"M": "Qwen3Config", "L": "Qwen3Config", "H": "Qwen3_5TextConfig", "E": "MixtralConfig"}
    config = getattr(transformers, kinds.get(shape, "LlamaConfig"))(**values)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def write(path: Path, shape: str, dtype: str, max_length: int = 4096) -> Path:
    """Writes a random checkpoint. All weights come out of one block of random numbers, so large ones take seconds."""
    import torch

    model = make(shape, dtype, "meta", max_length)
    model.to_empty(device="cpu")
    model.tie_weights()
    block = (torch.randn(1 << 24) * 0.02).to(getattr(torch, dtype))
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms
                parameter.fill_(1.0)
                continue
            flat = parameter.view(-1)
            for at in range(0, flat.numel(), 1 << 22):
                count = min(1 << 22, flat.numel() - at)
                start = (start + 7919 * 64) % ((1 << 24) - (1 << 22))
                flat[at : at + count] = block[start : start + count]
    model.save_pretrained(path)
    return path


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """Writes a byte-level BPE tokenizer of random merges, as large as a real one of that vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {letter: number for number, letter in enumerate(letters)}
    merges, draw, known = [], random.Random(0), list(letters)
    while len(tokens) < vocabulary:
        left, right = draw.choice(known), draw.choice(known)
        if left + right not in tokens and len(left + right) < 12:
            tokens[left + right] = len(tokens)
            known.append(left + right)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(tokens, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
