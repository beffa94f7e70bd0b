"""Random adapters, written as PEFT writes them, and models into which one is merged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

PREFIX = "base_model.model."
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def linear_layers(model: Any, only: str | Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a transformers model's linear layers, without head and experts, by name.

    Args:
        model: The model.
        only: Ends of the names of those that are wanted.
    """
    ends = None if only is None else (only,) if isinstance(only, str) else tuple(only)
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if module is head or ".experts." in name or (ends is not None and not name.endswith(ends)):
            continue
        if isinstance(module, nn.Linear):
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[name] = tuple(module.weight.shape[::-1])
    return found


def save_adapter(
    path: Path,
    model: Any,
    seed: int,
    rank: int = 4,
    alpha: float = 8,
    only: str | Sequence[str] | None = None,
    scale: float = 0.3,
    **config: Any,
) -> Factors:
    """Writes a random adapter for a transformers model.

    Args:
        path: The directory; it is made.
        model: The model.
        seed: Of the numbers.
        rank: Of each layer's product.
        alpha: PEFT's ``lora_alpha``.
        only: Ends of the names of the layers that are adapted; None adapts all linear layers but the head.
        scale: How large what it adds is.
        **config: More of ``adapter_config.json``.

    Returns:
        The factors A, (rank, inputs), and B, (outputs, rank), of each layer by its name.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (
            torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs),
            torch.randn(outputs, rank, generator=generator) * scale / rank,
        )
        for name, (outputs, inputs) in linear_layers(model, only).items()
    }
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(factors), path / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **config}
    (path / "adapter_config.json").write_text(json.dumps(values))
    return factors


def tensors_of(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """An adapter's tensors under PEFT's names."""
    return {
        f"{PREFIX}{name}.lora_{letter}.weight": tensor
        for name, pair in factors.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


@torch.no_grad()
def merge(model: Any, factors: Factors, scaling: float) -> Any:
    """Adds an adapter to a model's own weights; returns the model."""
    for name, (down, up) in factors.items():
        module = model.get_submodule(name)
        added = scaling * up @ down
        module.weight += added.T if isinstance(module, Conv1D) else added
    return model
