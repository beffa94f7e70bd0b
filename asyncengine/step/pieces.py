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
_ONES = {np.dtype(kind): np.ones((), dtype=kind) for kind in (np.int32, np.int64)}
"""Ones of no dimension: adding them takes half the time that adding a Python number does."""


class Pieces:
    """Operations on columns of one length.

    Args:
        count: The length.
    """

    __slots__ = ("_count", "_slices")

    def __init__(self, count: int) -> None:
        self._count = count
        self._slices = [slice(at, at + _MOST) for at in range(0, count, _MOST)]

    def plus_one(self, columns: NDArray[Any]) -> NDArray[Any]:
        """New columns, (..., count), one more everywhere."""
        one = _ONES[columns.dtype]
        if columns.size <= _MOST:
            more: NDArray[Any] = columns + one
            return more
        more = np.empty_like(columns)
        shape = (-1, self._count)
        for column, increased in zip(columns.reshape(shape), more.reshape(shape), strict=True):
            for piece in self._slices:
                np.add(column[piece], one, out=increased[piece])
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
        if self._count <= _MOST:
            array[index] = values
            return
        for piece in self._slices:
            array[index[piece]] = values[piece]

    def put_all(self, array: NDArray[Any], index: NDArray[np.int64], value: float) -> None:
        """`array[index] = value`."""
        if self._count <= _MOST:
            array[index] = value
            return
        for piece in self._slices:
            array[index[piece]] = value
