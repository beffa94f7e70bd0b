"""Counter-based random numbers: what a branch draws at a position is a pure function of its key and that position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1), a multiple of 2**-53, for each (key, position).

    SplitMix64 (Steele, Lea and Flood, 2014) started at the mixed key, so that neighbouring keys begin far apart.

    Two properties hold. There is no state: nothing has to be saved at a preemption or advanced for a skipped row, and
    the result does not depend on what else is in the arrays. And every operation is elementwise on 64-bit
    integers that wrap around, so the same lines can run on a device as int64 tensors with logical shifts.

    Args:
        keys: (rows,) seed plus branch, modulo 2**64.
        positions: (rows,) how many tokens the branch has generated before this one.
    """
    state = _mix(keys) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection in which each bit of the result depends on every bit of x (Stafford's mix 13)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
