"""Random EAGLE-3 heads in the layouts that are published, and what one guesses, from the method's description alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional

VOCAB, HIDDEN, HEADS, KV_HEADS, INNER = 199, 64, 4, 2, 48
SIZE = HIDDEN // HEADS
EPSILON, THETA = 1e-5, 10_000.0
LAYERS = (1, 2, 3)
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "rms_norm_eps": EPSILON,
    "rope_theta": THETA, "max_position_embeddings": 512, "hidden_act": "silu",
}  # fmt: skip


def weights(draft_vocab: int = 80, seed: int = 0, own_embedding: bool = False) -> dict[str, torch.Tensor]:
    """In the layout of the method's authors."""
    noise = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise) * 0.12

    found = {
        "fc.weight": random(HIDDEN, len(LAYERS) * HIDDEN),
        "midlayer.self_attn.q_proj.weight": random(HEADS * SIZE, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": random(KV_HEADS * SIZE, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": random(KV_HEADS * SIZE, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": random(HIDDEN, HEADS * SIZE),
        "midlayer.mlp.gate_proj.weight": random(INNER, HIDDEN),
        "midlayer.mlp.up_proj.weight": random(INNER, HIDDEN),
        "midlayer.mlp.down_proj.weight": random(HIDDEN, INNER),
        "midlayer.hidden_norm.weight": 1 + random(HIDDEN),
        "midlayer.input_layernorm.weight": 1 + random(HIDDEN),
        "midlayer.post_attention_layernorm.weight": 1 + random(HIDDEN),
        "norm.weight": 1 + random(HIDDEN),
        "lm_head.weight": random(draft_vocab, HIDDEN),
    }
    if own_embedding:
        found["embed_tokens.weight"] = random(VOCAB, HIDDEN)
    if draft_vocab < VOCAB:
        known = torch.randperm(VOCAB, generator=noise)[:draft_vocab].sort().values
        found["d2t"] = known - torch.arange(draft_vocab)
        found["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, known, True)
    return found


def write(path: Path, layout: str, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """Writes a head: "authors", as a pickle; "specforge", with the layers named by their output; or "speculators"."""
    path.mkdir(parents=True, exist_ok=True)
    draft_vocab = len(tensors["lm_head.weight"]) if "lm_head.weight" in tensors else VOCAB
    config = LLAMA | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": draft_vocab}
    if layout == "authors":
        config["eagle_aux_hidden_state_layer_ids"] = list(LAYERS)
        torch.save(tensors, path / "pytorch_model.bin")
    elif layout == "specforge":
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in LAYERS]}
        save_file(tensors, path / "model.safetensors")
    else:
        config = {
            "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
            "transformer_layer_config": LLAMA,
            "draft_vocab_size": draft_vocab, "eagle_aux_hidden_state_layer_ids": list(LAYERS),
            "norm_before_residual": True,
        }  # fmt: skip
        renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
        save_file(renamed, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden * (hidden.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt() * weight


def rotate(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, size)"""
    angles = positions[:, None] * THETA ** (-torch.arange(0, SIZE, 2) / SIZE)
    cosines, sines = angles.cos()[:, None], angles.sin()[:, None]
    first, second = heads.chunk(2, -1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)


class Reference:
    """One sequence, by the description: entries from the second token on, all of them computed anew for each guess.

    Args:
        tensors: The head's, in the layout of the authors.
        model: The transformers model.
        normed: Whether what is normed is added to.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], model: Any, normed: bool) -> None:
        self.weights, self.model, self.normed = tensors, model, normed
        self.embedding = tensors.get("embed_tokens.weight", model.get_input_embeddings().weight)

    @torch.no_grad()
    def guesses(self, text: list[int], count: int) -> list[int]:
        """The likeliest tokens behind a text."""
        states: list[torch.Tensor] = []  # as they leave the last layer, transformers gives them out normed alone
        handle = self.model.model.norm.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
        found_states = self.model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
        handle.remove()
        states = [*found_states[:-1], *states]
        before = torch.cat([states[layer][0] for layer in LAYERS], -1) @ self.weights["fc.weight"].T
        tokens, found = list(text[1:]), list[int]()
        for _ in range(count):
            out = self.layer(torch.tensor(tokens), before)
            known = norm(out[-1], self.weights["norm.weight"]) @ self.weights["lm_head.weight"].T
            best = int(known.argmax())
            found.append(best + int(self.weights["d2t"][best]) if "d2t" in self.weights else best)
            tokens.append(found[-1])
            before = torch.cat([before, out[-1:]])
        return found

    def layer(self, tokens: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """(entries, hidden) states behind all entries."""
        own = {name.removeprefix("midlayer."): tensor for name, tensor in self.weights.items()}
        seen = norm(before, own["hidden_norm.weight"])
        both = torch.cat([norm(self.embedding[tokens], own["input_layernorm.weight"]), seen], -1)
        query, key, value = (both @ own[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        positions = torch.arange(len(tokens))
        query = rotate(query.view(-1, HEADS, SIZE), positions)
        key = rotate(key.view(-1, KV_HEADS, SIZE), positions).repeat_interleave(HEADS // KV_HEADS, 1)
        value = value.view(-1, KV_HEADS, SIZE).repeat_interleave(HEADS // KV_HEADS, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * SIZE**-0.5
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", scores, value).flatten(1)
        hidden = (seen if self.normed else before) + attended @ own["self_attn.o_proj.weight"].T
        inner = norm(hidden, own["post_attention_layernorm.weight"])
        gated = functional.silu(inner @ own["mlp.gate_proj.weight"].T) * (inner @ own["mlp.up_proj.weight"].T)
        return hidden + gated @ own["mlp.down_proj.weight"].T
