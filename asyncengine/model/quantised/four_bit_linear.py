"""Linear layers whose weights have four bits: the checkpoint's own codes, or numbers that are rounded to some.

On CUDA kernels multiply codes. Elsewhere the layer makes numbers of them anew in each call: that is the reference that
those kernels and the compiled step of the CPU are held to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.quantised import four_bit_product
from asyncengine.model.quantised.four_bits import GROUP, FourBits, nearest
from asyncengine.model.quantised.replaced_linear import replace
from asyncengine.model.weight_writer import Writer, restorer


class FourBitLinear(nn.Module):
    """Takes the place of a linear layer, whose weight and bias keep their names.

    Attributes:
        weight: (outputs, inputs / 2) codes, two in a byte.
        bias: (outputs,), or None, as it was.
        weight_scale: (outputs, inputs / group).
        weight_zero: As `weight_scale`, or None.
        values: What codes stand for.
        dtype: Of the weight that it was made of, of its inputs and of its outputs.
        by_kernel: Whether a kernel multiplies codes on CUDA.

    Args:
        weights: The codes.
        bias: (outputs,), or None.
        dtype: As above.
    """

    def __init__(self, weights: FourBits, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.out_features, self.in_features = weights.shape
        self.values = weights.values
        self.weight = nn.Parameter(weights.codes, requires_grad=False)
        self.bias = bias
        self.weight_scale: torch.Tensor
        self.weight_zero: torch.Tensor | None
        self.register_buffer("weight_scale", weights.scales, persistent=False)
        self.register_buffer("weight_zero", weights.zeros, persistent=False)
        self.by_kernel = four_bit_product.has_kernel(weights)

    @property
    def four_bits(self) -> FourBits:
        """The codes and what they stand for."""
        return FourBits(self.weight.data, self.weight_scale, self.weight_zero, self.values)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        if self.by_kernel and input.device.type == "cuda":
            output = four_bit_product.multiply(input.reshape(-1, self.in_features), self.four_bits, self.bias)
            return output.view(*input.shape[:-1], self.out_features)
        return functional.linear(input, self.four_bits.weight(input.dtype), self.bias)

    @torch.no_grad()
    def write(self, value: torch.Tensor) -> None:
        """Replaces the weight by another one in `dtype`, which is rounded to the codes that there are."""
        replace_codes(self.four_bits, value)

    def keep(self) -> Callable[[], None]:
        """What puts the present weight back."""
        return keeper(self.four_bits)

    def release(self) -> None:
        """Lets the codes go; whoever took them says so."""
        self.weight = nn.Parameter(self.weight.detach().to("meta"), requires_grad=False)
        self.weight_scale = self.weight_scale.to("meta")
        self.weight_zero = None


def replace_codes(weights: FourBits, value: torch.Tensor) -> None:
    """Writes a weight (outputs, inputs) over codes; zeros become 0."""
    new = nearest(value.to(weights.codes.device), weights.group, weights.values)
    weights.codes.copy_(new.codes)
    weights.scales.copy_(new.scales)
    if weights.zeros is not None:
        weights.zeros.zero_()


def keeper(weights: FourBits) -> Callable[[], None]:
    """What puts the present codes back."""
    return restorer(weights.codes, weights.scales, weights.zeros)


def round_layers(model: Any, group: int = GROUP, but: Collection[nn.Module] = ()) -> tuple[int, int]:
    """Puts a `FourBitLinear` in the place of every linear layer but the head and those named, as far as its inputs are
    whole groups.

    Returns:
        How many weights had been in the layers that were replaced, and how many there had been.
    """

    def made(layer: nn.Linear, tied: FourBitLinear | None) -> FourBitLinear:
        weights = nearest(layer.weight.detach(), group) if tied is None else tied.four_bits
        found = FourBitLinear(weights, layer.bias, layer.weight.dtype)
        if tied is not None:
            found.weight = tied.weight
        return found

    return replace(model, lambda layer: layer.in_features % group == 0, made, but)


def layers(model: nn.Module) -> dict[int, tuple[torch.Size, torch.dtype]]:
    """What the weights in four bits are taken to be, by the identity of the codes."""
    return {
        id(module.weight): (torch.Size((module.out_features, module.in_features)), module.dtype)
        for module in model.modules()
        if isinstance(module, FourBitLinear)
    }


def writers(model: nn.Module) -> dict[int, list[Writer]]:
    """What new values of weights in four bits go through, by the identity of the codes."""
    found: dict[int, list[Writer]] = {}
    for module in model.modules():
        if isinstance(module, FourBitLinear):
            found.setdefault(id(module.weight), []).append(Writer(module.write, module.keep))
    return found
