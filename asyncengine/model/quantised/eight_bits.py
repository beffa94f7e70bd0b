"""Weights of eight bits with a scale for each output."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class EightBits:
    """One matrix in fp8.

    Attributes:
        codes: (outputs, inputs) in float8_e4m3fn.
        scales: (outputs, 1) float32, by which codes are multiplied.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """(outputs, inputs) in `dtype`, rounded once."""
        return (self.codes.float() * self.scales).to(dtype)
