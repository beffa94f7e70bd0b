"""Blocks of ggml whose numbers stay codes of four bits.

Each function takes (blocks, bytes of a block) uint8 and writes codes (blocks, numbers / 2) uint8 and scales
(blocks, numbers / 32) float32, and zeros like those where there are any.

In 16 bytes of a block, or 32 of Q4_K, the lower halves are the first numbers, and the upper halves those after them;
`FourBits` has neighbours in a byte.
"""

from __future__ import annotations

import torch

from asyncengine.model.gguf.float_blocks import copied, halves, scales_and_minima
from asyncengine.model.quantised.four_bits import GROUP

_LARGEST_ZERO = 65504.0
"""Of float16, in which products hold zeros."""
_ONES = 0x99
"""Two codes that stand for 1, as integers."""


def q4_0(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Scale, codes. That is IQ4_NL too, whose codes stand for something else."""
    scales.copy_(halves(blocks, 0))
    _neighbours(blocks[:, 2:], 16, codes)


def q4_1(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
    """Scale, minimum, codes."""
    _neighbours(blocks[:, 4:], 16, codes)
    from_minima(halves(blocks, 0), halves(blocks, 2), codes, scales, zeros)


def q4_k(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
    """What scales and minima are multiplied by, those in six bits each, codes."""
    steps, minima = scales_and_minima(blocks)
    _neighbours(blocks[:, 16:], 32, codes)
    from_minima(steps, minima.neg_(), codes, scales, zeros)


def iq4_xs(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """What scales are multiplied by, two bits of each of them, four bits of each, codes."""
    low, high = copied(blocks[:, 4:8], torch.uint8), copied(blocks[:, 2:4], torch.uint8)
    steps = torch.stack((low & 15, low >> 4), -1).view(-1, 2, 4)
    steps |= torch.stack([(high >> 2 * place & 3) << 4 for place in range(4)], -1)
    torch.mul(steps.view(-1, 8).float().sub_(32), halves(blocks, 0), out=scales)
    _neighbours(blocks[:, 8:], 16, codes)


def mxfp4(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Exponent of a power of two, codes."""
    bits = blocks[:, :1].int() << 23
    scales.copy_(bits.clamp_min_(1 << 22).view(torch.float32))  # the least is 2 ** -127, which is subnormal
    _neighbours(blocks[:, 1:], 16, codes)


def _neighbours(stored: torch.Tensor, width: int, codes: torch.Tensor) -> None:
    """Puts codes into order, of which the lower halves of `width` bytes are the first."""
    words = copied(stored, torch.int64)
    to = codes.view(torch.int64).view(len(codes), -1, 2, width // 16)
    for place in range(2):
        each = (words >> 4 * place).bitwise_and_(0x0F0F0F0F0F0F0F0F)
        bytes = (each | each >> 4).view(torch.int16).to(torch.uint8)  # the lower one of two
        to[:, :, place] = bytes.view(torch.int64).view(len(codes), -1, width // 16)


def from_minima(
    steps: torch.Tensor, minima: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> None:
    """Of numbers that are a minimum and up to 15 steps. Where the steps are nothing beside it, all codes become one."""
    torch.div(minima, steps, out=zeros).add_(8).neg_()
    scales.copy_(steps)
    strange = ~(zeros.abs() <= _LARGEST_ZERO)  # a step of 0 has no zero, or an infinite one
    if strange.any():
        at = strange.view(-1).nonzero().squeeze(1)
        codes.view(-1, GROUP // 2)[at] = _ONES
        scales.view(-1)[at] = torch.add(minima, steps, alpha=7.5).view(-1)[at]
        zeros.view(-1)[at] = 0
