"""Weights of eight bits: codes, the scales that they are multiplied by, and how numbers become codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import embedding

from asyncengine.model.quantised.compiled_codes import make_numbers
from asyncengine.model.quantised.four_bits import GROUP, FourBits, parts_of

LARGEST = 127
"""The largest integer that a number is rounded to."""


@dataclass(frozen=True, slots=True)
class EightBits:
    """One matrix, whose weights are ``scale * (code - zero)``.

    Attributes:
        codes: (outputs, inputs) in float8_e4m3fn or int8.
        scales: (outputs, inputs / group) floats.
        zeros: As `scales`, or None, which is 0.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.zeros) if tensor is not None)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """(outputs, inputs) in `dtype`, rounded once."""
        outputs, inputs = self.shape
        found = torch.empty(outputs, inputs, dtype=dtype, device=self.codes.device)
        if make_numbers(self.codes, self.scales, self.zeros, None, found):
            return found
        for part in parts_of(self.codes):
            numbers = self.codes[part].float().view(-1, self.scales.shape[1], self.group)
            if self.zeros is not None:
                numbers -= self.zeros[part].unsqueeze(-1)
            found[part] = numbers.mul_(self.scales[part].unsqueeze(-1)).view(-1, inputs)
        return found


def nearest_bytes(weight: torch.Tensor, group: int = GROUP) -> EightBits:
    """Rounds a matrix to integers, of which the largest of a group is `LARGEST`.

    Args:
        weight: (outputs, inputs); the inputs are a multiple of `group`. Where a number is infinite or none, all of its
            group become NaN.
        group: Inputs that share a scale.
    """
    outputs, inputs = weight.shape
    codes = torch.empty(outputs, inputs, dtype=torch.int8, device=weight.device)
    scales = torch.empty(outputs, inputs // group, dtype=torch.float32, device=weight.device)
    for part in parts_of(codes):
        numbers = weight[part].float().view(-1, inputs // group, group)
        own = numbers.abs().amax(-1, keepdim=True).div_(LARGEST)
        own.masked_fill_(own.isinf(), torch.nan)
        rounded = (numbers / torch.where(own == 0, 1.0, own)).round_().nan_to_num_(0.0).clamp_(-LARGEST, LARGEST)
        codes[part] = rounded.to(torch.int8).view(-1, inputs)
        scales[part] = own.squeeze(-1)
    return EightBits(codes, scales)


def as_bytes(weight: FourBits) -> EightBits:
    """The same numbers in eight bits."""
    steps = 1 if all(value.is_integer() for value in weight.values) else 2  # of a value of 1
    table = torch.tensor([int(value * steps) for value in weight.values], dtype=torch.int8, device=weight.codes.device)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), -1)  # (256, 2): of each byte
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.codes.device)
    for part in parts_of(codes):
        codes[part] = embedding(weight.codes[part].int(), pairs).view(-1, weight.shape[1])
    return EightBits(codes, weight.scales / steps, None if weight.zeros is None else weight.zeros * steps)
