"""Linear layers whose weights have eight bits and a scale for each group of inputs: a checkpoint's own codes.

The layer makes numbers of them anew in each call: that is the reference that the compiled step of the CPU is held to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.quantised.eight_bits import EightBits, nearest_bytes
from asyncengine.model.weight_writer import Writer, restorer


class ByteLinear(nn.Module):
    """Takes the place of a linear layer, whose weight and bias keep their names.

    Attributes:
        weight: (outputs, inputs) codes in int8.
        bias: (outputs,), or None, as it was.
        weight_scale: (outputs, inputs / group).
        weight_zero: As `weight_scale`, or None.
        dtype: Of the weight that it stands for, of its inputs and of its outputs.

    Args:
        weights: The codes.
        bias: (outputs,), or None.
        dtype: As above.
    """

    def __init__(self, weights: EightBits, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.out_features, self.in_features = weights.shape
        self.weight = nn.Parameter(weights.codes, requires_grad=False)
        self.bias = bias
        self.weight_scale: torch.Tensor
        self.weight_zero: torch.Tensor | None
        self.register_buffer("weight_scale", weights.scales, persistent=False)
        self.register_buffer("weight_zero", weights.zeros, persistent=False)

    @property
    def eight_bits(self) -> EightBits:
        """The codes and what they stand for."""
        return EightBits(self.weight.data, self.weight_scale, self.weight_zero)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        return functional.linear(input, self.eight_bits.weight(input.dtype), self.bias)

    @torch.no_grad()
    def write(self, value: torch.Tensor) -> None:
        """Replaces the weight by another one in `dtype`, which is rounded."""
        own = self.eight_bits
        new = nearest_bytes(value.to(own.codes.device), own.group)
        own.codes.copy_(new.codes)
        own.scales.copy_(new.scales)
        if own.zeros is not None:
            own.zeros.zero_()

    def keep(self) -> Callable[[], None]:
        """What puts the present weight back."""
        return restorer(self.weight.data, self.weight_scale, self.weight_zero)

    def release(self) -> None:
        """Lets the codes go; whoever took them says so."""
        self.weight = nn.Parameter(self.weight.detach().to("meta"), requires_grad=False)
        self.weight_scale = self.weight_scale.to("meta")
        self.weight_zero = None


def layers(model: nn.Module) -> dict[int, tuple[torch.Size, torch.dtype]]:
    """What the weights in eight bits are taken to be, by the identity of the codes."""
    return {
        id(module.weight): (module.weight.shape, module.dtype)
        for module in model.modules()
        if isinstance(module, ByteLinear)
    }


def writers(model: nn.Module) -> dict[int, list[Writer]]:
    """What new values of weights in eight bits go through, by the identity of the codes."""
    found: dict[int, list[Writer]] = {}
    for module in model.modules():
        if isinstance(module, ByteLinear):
            found.setdefault(id(module.weight), []).append(Writer(module.write, module.keep))
    return found
