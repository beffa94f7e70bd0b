"""Blocks of ggml whose numbers are integers of up to eight bits with a scale for 32 of them, which stay such.

Each function takes (blocks, bytes of a block) uint8 and writes codes (blocks, numbers) int8 and scales (blocks, 1).
"""

from __future__ import annotations

import torch

from asyncengine.model.gguf.float_blocks import five_bits, halves


def q8_0(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Scale, 32 bytes."""
    codes.copy_(blocks[:, 2:].view(torch.int8))
    scales.copy_(halves(blocks, 0))


def q5_0(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Scale, fifth bits of 32 numbers, four bits each."""
    codes.copy_(five_bits(blocks[:, 2:]).view(torch.int8)).sub_(16)
    scales.copy_(halves(blocks, 0))
