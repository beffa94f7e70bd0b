"""Integers of a few bits, one after the other in words of 32."""

from __future__ import annotations

import torch


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """(..., words) int32 to the first `count` numbers of `bits` bits each, as (..., count) uint8; lowest bits first.

    Numbers may lie across two words.
    """
    if bits in (4, 8):  # the bytes are in this order already
        found = words.contiguous().view(torch.uint8)
        if bits == 4:
            found = torch.stack((found & 15, found >> 4), -1).flatten(-2)
    else:
        starts = torch.arange(count) * bits
        at, offset = starts // 32, starts % 32
        wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
        found = wide[..., at] >> offset | wide[..., at + 1] << 32 - offset
        found &= (1 << bits) - 1
    if found.shape[-1] < count:
        raise ValueError(f"{words.shape[-1]} words hold {found.shape[-1]} numbers of {bits} bits, not {count}")
    return found[..., :count].to(torch.uint8)
