"""Integers of a few bits, one after the other in words of 32."""

from __future__ import annotations

import torch

from asyncengine.model.quantised import four_bits

_ROWS = 256
"""Unpacked at once where that takes many bytes for each number."""


def unpacked(words: torch.Tensor, bits: int, count: int, padded: bool = False) -> torch.Tensor:
    """(rows, words) int32 to the first `count` numbers of `bits` bits each, as (rows, count) uint8; lowest bits first.

    Args:
        words: As above.
        bits: Of a number.
        count: How many numbers a row has.
        padded: Whether a word has as many numbers as fit, and some bits left over; else a number may lie across two.
    """
    if bits in (4, 8):  # the bytes are in this order already
        found = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        if bits == 4:
            found = four_bits.unpacked(found)
    else:
        found = torch.cat([_unpacked(rows, bits, count, padded) for rows in torch.split(words, _ROWS)])
    if found.shape[-1] < count:
        raise ValueError(f"{words.shape[-1]} words hold {found.shape[-1]} numbers of {bits} bits, not {count}")
    return found[:, :count]


def _unpacked(words: torch.Tensor, bits: int, count: int, padded: bool) -> torch.Tensor:
    number = torch.arange(count)
    each = 32 // bits
    starts = number // each * 32 + number % each * bits if padded else number * bits
    at, offset = starts // 32, starts % 32
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    found = wide[:, at] >> offset | wide[:, at + 1] << 32 - offset
    return (found & (1 << bits) - 1).to(torch.uint8)
