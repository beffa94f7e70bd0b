"""What new values of weights must be, and what they go through, where layers keep them in a form of their own."""

from __future__ import annotations

import torch
from torch import nn

from asyncengine.model import packed_linear
from asyncengine.model.decoder import compiled_layers
from asyncengine.model.quantised import byte_linear, four_bit_experts, four_bit_linear, fp8_linear
from asyncengine.model.weight_writer import Writer


def taken_for(model: nn.Module) -> dict[int, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of weights that are stored otherwise, by the identity of the parameters."""
    in_fp8 = {key: (layer.weight.shape, layer.dtype) for key, layer in fp8_linear.layers(model).items()}
    return in_fp8 | four_bit_linear.layers(model) | byte_linear.layers(model) | four_bit_experts.layers(model)


def writers(model: nn.Module) -> dict[int, list[Writer]]:
    """What writes a new value into its places, by the identity of the parameter; others are written in place."""
    found: dict[int, list[Writer]] = {}
    for kind in (fp8_linear, four_bit_linear, byte_linear, four_bit_experts, packed_linear, compiled_layers):
        found |= kind.writers(model)
    return found
