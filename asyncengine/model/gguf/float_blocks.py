"""Blocks of ggml whose numbers become floats.

Each function takes (blocks, bytes of a block) uint8 and writes (blocks, numbers) float32. All of it is in the order of
operations of ggml, which decides the last bit. Bytes are shifted and masked eight at a time, in words of 64 bits.
"""

from __future__ import annotations

import torch

_EACH = 0x0101010101010101
"""1 in every byte of a word."""
_OWN_BIT = 0x8040201008040201 - (1 << 64)
"""In byte k of a word, bit k."""
_TO_TOP = 0x00406070787C7E7F
"""What it takes from that bit to bit 7 of the byte."""
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice what codes of NVFP4 stand for."""


def q5_0(blocks: torch.Tensor, to: torch.Tensor) -> None:
    """Scale, fifth bits of 32 numbers, four bits each."""
    _put(five_bits(blocks[:, 2:]), to)
    to.sub_(16).mul_(halves(blocks, 0))


def q5_1(blocks: torch.Tensor, to: torch.Tensor) -> None:
    """As Q5_0, with a minimum after the scale."""
    _put(five_bits(blocks[:, 4:]), to)
    to.mul_(halves(blocks, 0)).add_(halves(blocks, 2))


def q8_0(blocks: torch.Tensor, to: torch.Tensor) -> None:
    """Scale, 32 bytes."""
    to.copy_(blocks[:, 2:].view(torch.int8)).mul_(halves(blocks, 0))


def q2_k(blocks: torch.Tensor, to: torch.Tensor) -> None:
    """Scale and minimum of 16 numbers each, two bits each, what the first are multiplied by."""
    scales, minima = q2_k_scales_and_minima(blocks)
    _put(planes(blocks[:, 16:80], 32, 2), to)
    _groups(to, 16).mul_(scales.unsqueeze(-1)).sub_(minima.unsqueeze(-1))


def q3_k(blocks: torch.Tensor, to: torch.Tensor) -> None:
    """Third bits, two bits each, scales of 16 numbers each, what those are multiplied by."""
    _put(q3_k_codes(blocks), to)
    _groups(to.sub_(4), 16).mul_(q3_k_scales(blocks).unsqueeze(-1))


def q5_k(blocks: torch.Tensor, to: torch.Tensor) -> None:
    """As Q4_K, with fifth bits before the others."""
    scales, minima = scales_and_minima(blocks)
    _put(q5_k_codes(blocks), to)
    _groups(to, 32).mul_(scales.unsqueeze(-1)).sub_(minima.unsqueeze(-1))


def q6_k(blocks: torch.Tensor, to: torch.Tensor) -> None:
    """Four bits each, two bits each, scales of 16 numbers each, what those are multiplied by."""
    _put(q6_k_codes(blocks), to)
    _groups(to.sub_(32), 16).mul_(q6_k_scales(blocks).unsqueeze(-1))


def tq1_0(blocks: torch.Tensor, to: torch.Tensor) -> None:
    """Five digits of base 3 in a byte, then four; scale."""
    at = 0
    for stored, digits in ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)):
        for digit in range(digits):
            # A byte is a fraction of 256, of which what has come before the point is forgotten.
            to[:, at : at + stored.shape[1]] = (stored * 3**digit).int() * 3 >> 8
            at += stored.shape[1]
    to.sub_(1).mul_(halves(blocks, 52))


def tq2_0(blocks: torch.Tensor, to: torch.Tensor) -> None:
    """Two bits each; scale."""
    _put(planes(blocks[:, :64], 32, 2), to)
    to.sub_(1).mul_(halves(blocks, 64))


def nvfp4(blocks: torch.Tensor, to: torch.Tensor) -> None:
    """Scales in E4M3 of 16 numbers each, four bits each."""
    codes = planes(blocks[:, 4:], 8, 4).view(torch.uint8).int()
    to.copy_(torch.tensor(E2M1, dtype=torch.float32)[codes])
    _groups(to, 16).mul_(nvfp4_scales(blocks).unsqueeze(-1))


def five_bits(stored: torch.Tensor) -> torch.Tensor:
    """(blocks, 20) bytes of Q5_0 or Q5_1 to (blocks, 4) words of eight numbers each: fifth bits, four bits each."""
    return planes(stored[:, 4:], 16, 4) | _fifth(stored[:, :4])


def q2_k_scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, 16) each."""
    steps = copied(blocks[:, :16], torch.uint8)
    return (steps & 15).float().mul_(halves(blocks, 80)), (steps >> 4).float().mul_(halves(blocks, 82))


def q3_k_codes(blocks: torch.Tensor) -> torch.Tensor:
    """(blocks, 32) words of eight numbers each."""
    return planes(blocks[:, 32:96], 32, 2) | planes(blocks[:, :32], 32, 1) << 2


def q3_k_scales(blocks: torch.Tensor) -> torch.Tensor:
    """(blocks, 16)."""
    low = copied(blocks[:, 96:104], torch.int64)
    low = torch.cat((low & 15 * _EACH, low >> 4 & 15 * _EACH), 1)
    high = copied(blocks[:, 104:108], torch.int32)
    high = torch.cat([high >> 2 * place & 0x03030303 for place in range(4)], 1).view(torch.int64)
    scales = torch.empty(len(blocks), 16)
    _put(low | high << 4, scales)
    return scales.sub_(32).mul_(halves(blocks, 108))


def q5_k_codes(blocks: torch.Tensor) -> torch.Tensor:
    """(blocks, 32) words of eight numbers each."""
    return planes(blocks[:, 48:], 32, 4) | planes(blocks[:, 16:48], 32, 1) << 4


def q6_k_codes(blocks: torch.Tensor) -> torch.Tensor:
    """(blocks, 32) words of eight numbers each."""
    return planes(blocks[:, :128], 64, 4) | planes(blocks[:, 128:192], 32, 2) << 4


def q6_k_scales(blocks: torch.Tensor) -> torch.Tensor:
    """(blocks, 16)."""
    return blocks[:, 192:208].view(torch.int8).float().mul_(halves(blocks, 208))


def nvfp4_scales(blocks: torch.Tensor) -> torch.Tensor:
    """(blocks, 4), half of what is stored."""
    # A sign does not count, and what is no number is 0.
    return (blocks[:, :4] & 127).view(torch.float8_e4m3fn).float().nan_to_num_(0.0).mul_(0.5)


def halves(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """(blocks, 1) float32: the float16 at this byte of each."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def copied(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(blocks, bytes) as (blocks, fewer) numbers, one after the other."""
    return stored.clone(memory_format=torch.contiguous_format).view(dtype)


def scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, 8) each, of 32 numbers each, from the first 16 bytes of a Q4_K or Q5_K."""
    low, middle, rest = blocks[:, 4:16].view(torch.int32).t().contiguous()
    high = 0x30303030
    scales = torch.stack((low & 0x3F3F3F3F, rest & 0x0F0F0F0F | low >> 2 & high), 1).view(torch.uint8)
    minima = torch.stack((middle & 0x3F3F3F3F, rest >> 4 & 0x0F0F0F0F | middle >> 2 & high), 1).view(torch.uint8)
    return scales.float().mul_(halves(blocks, 0)), minima.float().mul_(halves(blocks, 2))


def planes(stored: torch.Tensor, width: int, bits: int) -> torch.Tensor:
    """(blocks, numbers / 8) words of a byte for each number: the lowest bits of `width` bytes come first."""
    words = copied(stored, torch.int64).view(len(stored), -1, width // 8)
    found = words.new_empty(*words.shape[:2], 8 // bits, width // 8)
    for place in range(8 // bits):
        torch.bitwise_and(words >> bits * place, ((1 << bits) - 1) * _EACH, out=found[:, :, place])
    return found.view(len(stored), -1)


def _fifth(stored: torch.Tensor) -> torch.Tensor:
    """(blocks, 4) words of 16 or 0 for each number, of four bytes of bits."""
    words = (stored.long() * _EACH).bitwise_and_(_OWN_BIT).add_(_TO_TOP)  # no byte runs over
    return words.bitwise_right_shift_(3).bitwise_and_(16 * _EACH)


def _put(words: torch.Tensor, to: torch.Tensor) -> None:
    """Bytes as floats."""
    to.copy_(words.view(torch.uint8))


def _groups(numbers: torch.Tensor, size: int) -> torch.Tensor:
    return numbers.view(len(numbers), -1, size)
