"""Keys and values in fp8: one byte each, 4 bits of exponent and 3 of mantissa, with a scale of 1."""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""What is larger is cut off. The relative error is 1/16 at most; below 2 ** -6 the error is 2 ** -10 at most."""


def stored(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers as a cache of `dtype` keeps them."""
    return numbers.clamp(-LARGEST, LARGEST).to(dtype) if dtype is E4M3 else numbers.to(dtype)


def movable(numbers: torch.Tensor) -> torch.Tensor:
    """The same memory in a dtype that can be indexed: torch cannot index fp8 on every device."""
    return numbers.view(torch.uint8) if numbers.dtype is E4M3 else numbers
