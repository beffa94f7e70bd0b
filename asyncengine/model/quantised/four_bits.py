"""Weights of four bits: codes, what they stand for, and how numbers become codes.

A weight is ``scale * (values[code] - zero)``. Neighbouring inputs of an output, `group` of them, share a scale and a
zero. With `INT4` that is what GPTQ (Frantar et al., 2022), AWQ (Lin et al., 2023) and round-to-nearest come to; with
`FP4` and scales that are powers of two, MXFP4 of the Open Compute Project's Microscaling Formats; with `NONLINEAR`,
llama.cpp's IQ4_NL and IQ4_XS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding

from asyncengine.model.quantised.compiled_codes import make_numbers

INT4 = tuple(float(value) for value in range(-8, 8))
"""What codes stand for as integers."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What codes stand for as floats of four bits (E2M1)."""
NONLINEAR = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
"""What codes stand for as integers that lie closer together around 0 (llama.cpp)."""
GROUP = 32
"""Inputs that share a scale, where nobody says otherwise."""
_ROWS, _ROWS_OF_DEVICE = 128, 1 << 14
"""Outputs whose numbers are made at once: in float32 they stay in a cache; a device wants few launches."""


@dataclass(frozen=True, slots=True)
class FourBits:
    """One matrix, or those of several experts, one after the other along the first dimension.

    Attributes:
        codes: (outputs, inputs / 2) uint8; the lower half of a byte is the input with the even number.
        scales: (outputs, inputs / group) floats.
        zeros: As `scales`, or None, which is 0.
        values: What the sixteen codes stand for: `INT4`, `FP4` or `NONLINEAR`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    values: tuple[float, ...] = INT4

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

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
        if make_numbers(self.codes, self.scales, self.zeros, self.values, found):
            return found
        table = torch.tensor(self.values, dtype=torch.float32, device=self.codes.device)
        pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), -1)  # (256, 2): of each byte
        for part in parts_of(self.codes):
            numbers = embedding(self.codes[part].int(), pairs).view(-1, inputs // self.group, self.group)
            if self.zeros is not None:
                numbers -= self.zeros[part].unsqueeze(-1)
            found[part] = numbers.mul_(self.scales[part].unsqueeze(-1)).view(-1, inputs)
        return found

    def rows(self, start: int, stop: int, step: int = 1) -> FourBits:
        """Some of the outputs."""
        part = slice(start, stop, step)
        return FourBits(
            self.codes[part], self.scales[part], None if self.zeros is None else self.zeros[part], self.values
        )


def joined(parts: Sequence[FourBits]) -> FourBits:
    """Matrices with the same inputs, groups and values as one: the outputs of each follow those of the one before."""
    if len(parts) == 1:
        return parts[0]
    zeros = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat([torch.zeros_like(part.scales) if part.zeros is None else part.zeros for part in parts])
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    return FourBits(codes, scales, zeros, parts[0].values)


def parts_of(rows: torch.Tensor) -> Iterator[slice]:
    """Some rows of a matrix after the other."""
    each = _ROWS if rows.device.type == "cpu" else _ROWS_OF_DEVICE
    return (slice(start, start + each) for start in range(0, rows.shape[0], each))


def packed(codes: torch.Tensor) -> torch.Tensor:
    """(..., inputs) codes of 0 to 15 to (..., inputs / 2) bytes."""
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """(..., inputs / 2) bytes to (..., inputs) codes of 0 to 15, as uint8."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def nearest(weight: torch.Tensor, group: int = GROUP, values: tuple[float, ...] = INT4) -> FourBits:
    """Rounds a matrix to codes without zeros.

    Args:
        weight: (outputs, inputs); the inputs are a multiple of `group`.
        group: Inputs that share a scale.
        values: What codes are to stand for. For `INT4` the number of a group that is farthest from 0 stands for 8, 7.5
            or 7 scales, which may be negative, whichever leaves the smallest error; for `NONLINEAR` it is so with 127,
            113 and what is near; for `FP4` scales are powers of two, the smallest that cut off nothing.
    """
    outputs, inputs = weight.shape
    codes = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(outputs, inputs // group, dtype=torch.float32, device=weight.device)
    rounded = {INT4: _nearest_integers, FP4: _nearest_floats, NONLINEAR: _nearest_nonlinear}[values]
    for part in parts_of(codes):
        own, scale = rounded(weight[part].float().view(-1, inputs // group, group))
        codes[part] = packed(own.view(-1, inputs))
        scales[part] = scale.squeeze(-1)
    return FourBits(codes, scales, values=values)


def _nearest_integers(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, groups, group) numbers to codes, and (outputs, groups, 1) scales."""
    chosen, scales = _least_error(numbers, (-8.0, -7.5, -7.0), lambda steps: steps.round_().clamp_(INT4[0], INT4[15]))
    return chosen + 8, scales


def _nearest_nonlinear(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_nearest_integers`."""
    table = torch.tensor(NONLINEAR, device=numbers.device)
    middles = (table[1:] + table[:-1]) / 2
    farthest = (-127.0, -122.0, -117.0, 120.0, 113.0, 106.0)  # which become the first value, or the last
    chosen, scales = _least_error(numbers, farthest, lambda steps: table[torch.bucketize(steps, middles)])
    return torch.bucketize(chosen, middles), scales


def _least_error(
    numbers: torch.Tensor, farthest: Sequence[float], rounded: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers in units of their scales, rounded, and (outputs, groups, 1) scales.

    Args:
        numbers: (outputs, groups, group)
        farthest: What the number of a group that is farthest from 0 may be before rounding.
        rounded: To values that codes stand for; it may write over what it is given.
    """
    extreme = numbers.gather(-1, numbers.abs().argmax(-1, keepdim=True))
    tried = []
    for many in farthest:
        scales = extreme / many
        values = rounded(numbers / torch.where(scales == 0, 1.0, scales))
        tried.append(((values * scales - numbers).square_().sum(-1, keepdim=True), values, scales))
    error, chosen, best = tried[0]
    for other, values, scales in tried[1:]:
        better = other < error
        error, best = torch.where(better, other, error), torch.where(better, scales, best)
        chosen = torch.where(better, values, chosen)
    return chosen, best


def _nearest_floats(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_nearest_integers`."""
    largest = numbers.abs().amax(-1, keepdim=True)
    scales = torch.exp2((largest / FP4[7]).log2().ceil().clamp_min(-126))
    table = torch.tensor(FP4[:8], device=numbers.device)
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize((numbers / scales).abs().contiguous(), middles)
    return codes + 8 * (numbers < 0), scales
