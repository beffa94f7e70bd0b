"""Checkpoints with a head for multi-token prediction, and what that guesses, from its description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from tests.model import checkpoints

LAYERS = 3
BESIDE = {
    "mimo": (
        "model.mtp_layers.0.", "model.mtp_layers.0.", ["token_layernorm", "hidden_layernorm", "final_layernorm"],
        "input_proj",
    ),
    "qwen": ("mtp.layers.0.", "mtp.", ["pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"], "fc"),
}  # fmt: skip
"""What the names of the layer and of what is around it begin with, norms, and what brings two together."""


def write(path: Path, architecture: str, layout: str, own: bool = False, **changes: Any) -> Path:
    """A random model of one layer more than its configuration says, with what stands around that.

    Args:
        path: Where to.
        architecture: Of `checkpoints`.
        layout: "deepseek", "mimo" or "qwen".
        own: Whether the head has an embedding and a head of its own.
        changes: Of the configuration.
    """
    kinds = {"layer_types": ["linear_attention", "full_attention"] * 2} if layout == "qwen" else {}
    checkpoints.write(path / "whole", architecture, num_hidden_layers=LAYERS + 1, **kinds, **changes)
    tensors = load_file(path / "whole" / "model.safetensors")
    noise = torch.Generator().manual_seed(5)
    hidden = tensors["model.norm.weight"].shape[0]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise) * 0.12

    norms = [(layout != "qwen") + random(hidden) for _ in range(3)]  # Qwen's add 1 themselves
    projection = random(hidden, 2 * hidden)
    behind = f"model.layers.{LAYERS}."
    if layout == "deepseek":
        names = ["enorm", "hnorm", "shared_head.norm"]
        tensors[f"{behind}eh_proj.weight"] = projection
    else:
        moved = {name: tensors.pop(name) for name in list(tensors) if name.startswith(behind)}
        layer, behind, names, projected = BESIDE[layout]
        tensors |= {name.replace(f"model.layers.{LAYERS}.", layer): tensor for name, tensor in moved.items()}
        tensors[f"{behind}{projected}.weight"] = projection
    tensors |= {f"{behind}{name}.weight": norm for name, norm in zip(names, norms, strict=True)}
    if own:
        tensors[f"{behind}embed_tokens.weight"] = random(*tensors["model.embed_tokens.weight"].shape)
        tensors[f"{behind}shared_head.head.weight"] = random(*tensors["model.embed_tokens.weight"].shape)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "whole" / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:LAYERS]
    (path / "config.json").write_text(json.dumps(config))
    return path


class Reference:
    """One sequence: entries from the second token on, all of them computed anew for each guess.

    Args:
        path: As `write` left it.
        layout: As of `write`.
    """

    def __init__(self, path: Path, layout: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path)
        self.layer = AutoModelForCausalLM.from_pretrained(path / "whole").model.layers[LAYERS]
        self.layout = layout
        self.weights = load_file(path / "model.safetensors")
        self.behind = f"model.layers.{LAYERS}." if layout == "deepseek" else BESIDE[layout][1]

    def own(self, name: str, otherwise: str = "") -> torch.Tensor:
        found = self.weights.get(f"{self.behind}{name}.weight")
        if found is None:
            found = self.weights.get(otherwise, self.weights["model.embed_tokens.weight"])
        return found

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        epsilon = self.model.config.rms_norm_eps
        return hidden * (hidden.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * (weight + (self.layout == "qwen"))

    @torch.no_grad()
    def guesses(self, text: list[int], count: int) -> list[int]:
        """The likeliest tokens behind a text."""
        seen: list[torch.Tensor] = []
        handle = self.model.model.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0]))
        self.model(torch.tensor([text[:-1]]))
        handle.remove()
        deepseek, mimo = self.layout == "deepseek", self.layout == "mimo"
        before = seen[0] if mimo else self.norm(seen[0], self.weights["model.norm.weight"])
        embedding = self.own("embed_tokens")
        head = self.own("shared_head.head", "lm_head.weight")
        names = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        if not deepseek:
            [*entering, leaving], projected = BESIDE[self.layout][2:]
            names = (*entering, projected, leaving)
        token_norm, state_norm, projection, last = map(self.own, names)
        tokens, found = list(text[1:]), list[int]()
        for _ in range(count):
            both = [self.norm(embedding[torch.tensor(tokens)], token_norm), self.norm(before, state_norm)]
            out = self.run(torch.cat(both[::-1] if mimo else both, -1) @ projection.T)[-1:]
            normed = self.norm(out, last)
            found.append(int((normed[0] @ head.T).argmax()))
            tokens.append(found[-1])
            before = torch.cat([before, out if deepseek else normed])
        return found

    def run(self, entered: torch.Tensor) -> torch.Tensor:
        """(entries, hidden) behind the layer."""
        count = len(entered)
        positions = torch.arange(count)[None]
        rotated = self.model.model.rotary_emb(entered[None], positions)
        mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
        out: Any = self.layer(
            entered[None],
            attention_mask=mask,
            position_ids=positions,
            cache=DynamicCache(),
            position_embeddings=rotated,
        )
        states: torch.Tensor = (out if isinstance(out, torch.Tensor) else out[0])[0]
        return states
