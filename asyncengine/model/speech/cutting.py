"""A long audio in pieces that a model hears at once, cut where it is quiet."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from asyncengine.model.media.sounds import Samples

_LATEST_SECONDS = 5.0
"""So much before a piece must end it is looked where it may."""
_QUIET_SECONDS = 0.1
"""So long a stretch is judged."""


def pieces(samples: Samples, most: int, rate: int) -> Iterator[tuple[int, int]]:
    """From and to of each piece, one behind the other.

    What is longer than a model hears is cut in the middle of the quietest tenth of a second of the last five before the
    piece must end, so that as few words as can be are cut through (as vLLM does, within one second).

    Args:
        samples: All of them.
        most: In a piece.
        rate: In a second.
    """
    start, window = 0, max(1, int(_QUIET_SECONDS * rate))
    while len(samples) - start > most:
        looked_at = min(int(_LATEST_SECONDS * rate), most // 2)
        first = start + most - looked_at
        end = start + most
        if looked_at >= window:
            energy = np.cumsum(np.square(samples[first:end], dtype=np.float64))
            of_windows = energy[window - 1 :] - np.append(0.0, energy[:-window])
            end = first + int(of_windows.argmin()) + window // 2
        yield start, end
        start = end
    yield start, len(samples)
