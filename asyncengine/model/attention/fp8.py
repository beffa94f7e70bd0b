"""Keys and values in fp8: one byte each, 4 bits of exponent and 3 of mantissa, with a scale for each layer.

A floating-point number keeps its relative error over some range, so in most layers the scale is 1 and nothing would be
gained by another. It is a power of two, which adds no rounding of its own, where numbers would be cut off or vanish.
"""

from __future__ import annotations

import math

import torch

from asyncengine.model.attention.protocol import LayerSpec

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""What is larger is cut off. The relative error is 1/16 at most; below 2 ** -6 the error is 2 ** -10 at most."""
_USUAL = (0.25, 56.0)
"""Layers whose largest number in a trial is of this order need no scale: others may be 8 times as large before they
are cut off, and most are 16 times as small before they lose digits."""


def scale_for(largest: float) -> float:
    """What the numbers of a layer are to be divided by, when the largest of a few tokens was `largest`."""
    low, high = _USUAL
    if not math.isfinite(largest) or largest == 0.0 or low <= largest <= high:
        return 1.0
    return 2.0 ** math.ceil(math.log2(largest / high))


def scales(spec: LayerSpec, dtype: torch.dtype) -> tuple[float, float]:
    """What a layer's keys and values are divided by in a cache of `dtype`."""
    return (spec.key_scale, spec.value_scale) if dtype is E4M3 else (1.0, 1.0)


def stored(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers as a cache of `dtype` keeps them."""
    return numbers.clamp(-LARGEST, LARGEST).to(dtype) if dtype is E4M3 else numbers.to(dtype)


def movable(numbers: torch.Tensor) -> torch.Tensor:
    """The same memory in a dtype that can be indexed: torch cannot index fp8 on every device."""
    return numbers.view(torch.uint8) if numbers.dtype is E4M3 else numbers
