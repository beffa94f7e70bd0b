"""A model of images with a head for multi-token prediction, and what that guesses, from its description."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from tests.model.media import checkpoints

KINDS = ["linear_attention"] * 3 + ["full_attention"]
LAYER = f"model.language_model.layers.{len(KINDS)}."
ENTERING = "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"


def write(path: Path) -> Path:
    """A random Qwen3.5 with the layer behind its last one that transformers passes over."""
    text = {
        "num_hidden_layers": len(KINDS) + 1,
        "layer_types": [*KINDS, "full_attention"],
        # All of a head rotates, so that it matters by which axis.
        "rope_parameters": checkpoints.INTERLEAVED | {"mrope_section": [6, 5, 5], "partial_rotary_factor": 1.0},
    }
    checkpoints.write(path / "whole", "qwen3_5", text_config=text)
    for file in (path / "whole").iterdir():
        shutil.copy(file, path)
    tensors = {
        name.replace(LAYER, "mtp.layers.0."): tensor
        for name, tensor in load_file(path / "whole" / "model.safetensors").items()
    }
    noise = torch.Generator().manual_seed(5)
    hidden = tensors["model.language_model.norm.weight"].shape[0]
    for name in (*ENTERING, "mtp.norm.weight"):
        tensors[name] = torch.randn(hidden, generator=noise) * 0.12
    tensors["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden, generator=noise) * hidden**-0.5
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": len(KINDS), "layer_types": KINDS}
    (path / "config.json").write_text(json.dumps(config))
    return path


class Reference:
    """One conversation: entries from the second token on, all of them computed anew for each guess.

    Args:
        path: As `write` left it.
        messages: The conversation.
        images: In it.
    """

    def __init__(self, path: Path, messages: list[dict[str, Any]], images: list[Any]) -> None:
        self.model = checkpoints.load(path)
        self.layer = checkpoints.load(path / "whole").get_decoder().layers[len(KINDS)]
        self.weights = load_file(path / "model.safetensors")
        self.given = dict(checkpoints.inputs(path, messages, images))
        self.prompt: list[int] = self.given["input_ids"][0].tolist()

    def norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        epsilon = self.model.config.get_text_config().rms_norm_eps
        return hidden * (hidden.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * (1 + self.weights[name])

    def look(self, text: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens, hidden) embeddings, (3, tokens) axes and (tokens, hidden) states before the last norm."""
        body, seen = self.model.get_decoder(), dict[str, Any]()
        handles = [
            body.register_forward_pre_hook(lambda _, arguments, named: seen.update(named), with_kwargs=True),
            body.norm.register_forward_pre_hook(lambda _, arguments: seen.update(states=arguments[0])),
        ]
        kinds = torch.zeros(1, len(text), dtype=torch.long)
        kinds[:, : len(self.prompt)] = self.given["mm_token_type_ids"]
        more = {"input_ids": torch.tensor([text]), "mm_token_type_ids": kinds, "attention_mask": torch.ones_like(kinds)}
        self.model(**self.given | more, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen["inputs_embeds"][0], seen["position_ids"][-3:, 0], seen["states"][0]

    @torch.no_grad()
    def guesses(self, text: list[int], count: int, allowed: list[int]) -> list[int]:
        """The likeliest tokens of some behind a text that begins with the prompt."""
        embedded, axes, states = self.look(text)
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        embedded, axes, found = embedded[1:], axes[:, 1:], list[int]()
        before = self.norm(states[:-1], "model.language_model.norm.weight")
        for _ in range(count):
            both = [self.norm(embedded, ENTERING[0]), self.norm(before, ENTERING[1])]
            normed = self.norm(self.run(torch.cat(both, -1) @ self.weights["mtp.fc.weight"].T, axes), "mtp.norm.weight")
            found.append(allowed[int((normed[-1] @ head[allowed].T).argmax())])
            embedded = torch.cat([embedded, embedding[found[-1:]]])
            axes = torch.cat([axes, axes[:, -1:] + 1], -1)
            before = torch.cat([before, normed[-1:]])
        return found

    def run(self, entered: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
        """(entries, hidden) behind the layer."""
        rotated = self.model.get_decoder().rotary_emb(entered[None], axes[:, None])
        mask = torch.full((len(entered),) * 2, -torch.inf).triu(1)[None, None]
        out: Any = self.layer(entered[None], attention_mask=mask, cache=DynamicCache(), position_embeddings=rotated)
        states: torch.Tensor = (out if isinstance(out, torch.Tensor) else out[0])[0]
        return states
