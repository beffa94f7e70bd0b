"""Blocks of ggml whose numbers are integers of fewer than nine bits, which stay such.

Each function takes (blocks, bytes of a block) uint8 and writes codes (blocks, numbers) int8 and scales (blocks, groups)
float32, and zeros like those where there are any. Codes with minima are moved so that 0 is in their middle.
"""

from __future__ import annotations

import torch

from asyncengine.model.gguf.float_blocks import (
    E2M1,
    five_bits,
    halves,
    nvfp4_scales,
    planes,
    q2_k_scales_and_minima,
    q3_k_codes,
    q3_k_scales,
    q5_k_codes,
    q6_k_codes,
    q6_k_scales,
    scales_and_minima,
)

_LARGEST_ZERO = 65504.0
"""Of float16, in which products hold zeros."""


def q8_0(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Groups of 32."""
    codes.copy_(blocks[:, 2:].view(torch.int8))
    scales.copy_(halves(blocks, 0))


def q5_0(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Groups of 32."""
    _put(five_bits(blocks[:, 2:]), codes, 16)
    scales.copy_(halves(blocks, 0))


def q5_1(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
    """Groups of 32."""
    _put(five_bits(blocks[:, 4:]), codes, 16)
    from_minima(halves(blocks, 0), halves(blocks, 2), 16, codes, scales, zeros)


def q2_k(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
    """Groups of 16."""
    steps, minima = q2_k_scales_and_minima(blocks)
    _put(planes(blocks[:, 16:80], 32, 2), codes, 2)
    from_minima(steps, minima.neg_(), 2, codes, scales, zeros)


def q3_k(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Groups of 16."""
    _put(q3_k_codes(blocks), codes, 4)
    scales.copy_(q3_k_scales(blocks))


def q5_k(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
    """Groups of 32."""
    steps, minima = scales_and_minima(blocks)
    _put(q5_k_codes(blocks), codes, 16)
    from_minima(steps, minima.neg_(), 16, codes, scales, zeros)


def q6_k(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Groups of 16."""
    _put(q6_k_codes(blocks), codes, 32)
    scales.copy_(q6_k_scales(blocks))


def nvfp4(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Groups of 16; twice what floats of four bits stand for."""
    codes.copy_(torch.tensor(E2M1, dtype=torch.int8)[planes(blocks[:, 4:], 8, 4).view(torch.uint8).int()])
    scales.copy_(nvfp4_scales(blocks))


def _put(words: torch.Tensor, codes: torch.Tensor, middle: int) -> None:
    """Bytes as codes, less what their middle is."""
    torch.sub(words.view(torch.int8), middle, out=codes)


def from_minima(
    steps: torch.Tensor,
    minima: torch.Tensor,
    middle: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> None:
    """Of numbers that are a minimum and some steps. Where the steps are nothing beside it, all codes become 1."""
    torch.div(minima, steps, out=zeros).add_(middle).neg_()
    scales.copy_(steps)
    strange = ~(zeros.abs() <= _LARGEST_ZERO)  # a step of 0 has no zero, or an infinite one
    if strange.any():
        at = strange.view(-1).nonzero().squeeze(1)
        codes.view(scales.numel(), -1)[at] = 1
        scales.view(-1)[at] = torch.add(minima, steps, alpha=middle - 0.5).view(-1)[at]
        zeros.view(-1)[at] = 0
