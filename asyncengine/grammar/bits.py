"""Rows of bits, one per token, in 32-bit words: token t is bit t % 32 of word t // 32."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from asyncengine.step.batch import Int32


def num_words(tokens: int) -> int:
    """Words of a row for so many tokens."""
    return -(-tokens // 32)


def row_of(token_ids: Iterable[int], words: int) -> Int32:
    """(words,) a row with the bits of these tokens set; tokens beyond the row are left out."""
    bits = np.zeros(words * 32, dtype=np.uint8)
    ids = np.fromiter(token_ids, dtype=np.int64)
    bits[ids[ids < len(bits)]] = 1
    row: Int32 = np.packbits(bits, bitorder="little").view(np.int32)
    return row
