"""Operations on whole columns that keep the interpreter's lock. Owned by the step thread.

numpy gives the lock up around an operation on more than 500 elements. Beside a busy event loop a thread that gives it
up, for two microseconds, gets it back when the loop has nothing left to do or after the interpreter's switch interval
of 5 ms; a step of a thousand rows would do so ten times. In pieces of 500 elements it takes as long and keeps the lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST = 500


class Pieces:
    """Operations on columns of one length.

    Args:
        count: The length.
    """

    __slots__ = ("_count", "_slices")

    def __init__(self, count: int) -> None:
        self._count = count
        self._slices = [slice(at, at + _MOST) for at in range(0, count, _MOST)]

    def plus_one(self, column: NDArray[Any]) -> NDArray[Any]:
        """A new column, one more everywhere."""
        if self._count <= _MOST:
            more: NDArray[Any] = column + 1
            return more
        more = np.empty_like(column)
        for piece in self._slices:
            np.add(column[piece], 1, out=more[piece])
        return more

    def take(self, array: NDArray[Any], index: NDArray[np.int64]) -> NDArray[Any]:
        """`array[index]`."""
        if self._count <= _MOST:
            taken: NDArray[Any] = array[index]  # not `take`, which gives the lock up whatever the size
            return taken
        taken = np.empty(self._count, dtype=array.dtype)
        for piece in self._slices:
            taken[piece] = array[index[piece]]
        return taken

    def put(self, array: NDArray[Any], index: NDArray[np.int64], values: NDArray[Any]) -> None:
        """`array[index] = values`."""
        for piece in self._slices:
            array[index[piece]] = values[piece]

    def put_all(self, array: NDArray[Any], index: NDArray[np.int64], value: float) -> None:
        """`array[index] = value`."""
        for piece in self._slices:
            array[index[piece]] = value
