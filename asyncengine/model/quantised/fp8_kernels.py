"""What the Triton kernels do in fp8 (e4m3). Importing this needs triton; nothing else does."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3(number):
    """The nearest byte of fp8_e4m3, ties to even, at most 448. In integers: interpreted, a cast is not exact."""
    number = number.to(tl.float32)
    size = tl.abs(number)
    bits = tl.minimum(size, 448.0).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # 3 bits of mantissa, the bias from 127 to 7
    # Below 2 ** -6 the bytes are multiples of 2 ** -9, as is the last bit of numbers from 2 ** 14 on.
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(size == size, code, 0x7F)  # not a number
    return tl.where(number < 0, code | 0x80, code).to(tl.uint8)


@triton.jit
def quantise_rows(numbers, codes, scales, stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Each row, a program: its scale, which is its largest number / 448, and its numbers / scale as bytes of fp8."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        given = tl.load(numbers + row * stride + start + at, mask=start + at < COLUMNS, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(given), propagate_nan=tl.PropagateNan.ALL)
    scale = tl.maximum(tl.max(largest, 0), 1e-12) / 448.0
    for start in range(0, COLUMNS, BLOCK):
        mask = start + at < COLUMNS
        given = tl.load(numbers + row * stride + start + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(codes + row * COLUMNS + start + at, e4m3(given / scale), mask=mask)
    tl.store(scales + row, scale)
