"""A long audio in pieces that a model hears at once, cut where it is quiet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from asyncengine.model.media.sounds import Samples

_LATEST_SECONDS = 5.0
"""So much before a piece must end it is looked where it may."""
_QUIET_SECONDS = 0.1
"""So long a stretch is judged."""


def pieces(blocks: Iterable[Samples], most: int, rate: int) -> Iterator[tuple[int, Samples]]:
    """Each piece, one behind the other, and how many samples are before it. No more is read than is needed for it.

    What is longer than a model hears is cut in the middle of the quietest tenth of a second of the last five before the
    piece must end, so that as few words as can be are cut through (as vLLM does, within one second).

    Args:
        blocks: All samples, one block behind the other.
        most: In a piece.
        rate: In a second.
    """
    start, held = 0, np.empty(0, np.float32)
    for block in blocks:
        held = np.concatenate((held, block))
        while len(held) > most:
            end = _quietest(held, most, rate)
            yield start, held[:end].copy()
            start, held = start + end, held[end:]
    yield start, held


def _quietest(samples: Samples, most: int, rate: int) -> int:
    """Where a piece ends that may have so many samples."""
    window, looked_at = max(1, int(_QUIET_SECONDS * rate)), min(int(_LATEST_SECONDS * rate), most // 2)
    if looked_at < window:
        return most
    first = most - looked_at
    energy = np.cumsum(np.square(samples[first:most], dtype=np.float64))
    of_windows = energy[window - 1 :] - np.append(0.0, energy[:-window])
    return first + int(of_windows.argmin()) + window // 2
