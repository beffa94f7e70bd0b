"""What all launches of Triton kernels have in common. Importing this needs no triton."""

from __future__ import annotations

from typing import Any

# Triton 3.10 will not fuse multiplications and additions unless it is asked to.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def power_of_two(number: int) -> int:
    """The smallest that is not below it."""
    return 1 << (number - 1).bit_length()
