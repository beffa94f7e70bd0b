"""Where the fused step runs: where it was measured to be faster than the model's own modules, on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import numpy as np
import torch

from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.graphs import StepGraphs

DEVICES: tuple[str, ...] = ("cuda",)
"""Types of devices that it is for."""

_RATIO = 0.98
"""What it must take at most of the modules' time: less of a gain is noise."""
_ROUNDS, _REPLAYS = 7, 5

Replay = Callable[[], None]
Seconds = Callable[[Replay], float]


class Choice:
    """Measures captured steps both ways, and keeps the faster for each bucket.

    Args:
        graphs: Steps of the model's own modules.
        fused: Runs the same model; for no step until it was measured.
        candidates: Token counts for which it could be used.
        seconds: How long a replay takes.

    Attributes:
        notes: What came of it, in words.
    """

    def __init__(self, graphs: StepGraphs, fused: FusedDecoder, candidates: Collection[int], seconds: Seconds) -> None:
        self._graphs = graphs
        self._fused = fused
        self._open = set(candidates)
        self._seconds = seconds
        self._won = set[int]()
        self._said = list[str]()
        self.notes: tuple[str, ...] = ()
        fused.use(())

    def is_open(self, size: int) -> bool:
        """Whether a bucket is yet to be measured."""
        return size in self._open

    def decide(self, size: int) -> bool:
        """Measures a bucket that is captured, and keeps the faster graph; whether that was possible."""
        self._open.discard(size)
        self._fused.use({*self._won, size})
        try:
            if self._graphs.contest(size, functools.partial(self._better, size)):
                self._won.add(size)
        except Exception as error:  # whatever a compiler or a driver raises
            text = str(error).strip() or type(error).__name__
            self._said.append(f"no further, for it cannot be captured: {text.splitlines()[0]}")
            self._open.clear()
            return False
        finally:
            self._fused.use(self._won)
            where = f"used for {', '.join(map(str, sorted(self._won)))} tokens" if self._won else "not used"
            self.notes = (f"decoder: fused kernels are {where}: measured {'; '.join(self._said)}",)
        return True

    def _better(self, size: int, old: Replay, new: Replay) -> bool:
        before, after = self._seconds(old), self._seconds(new)
        self._said.append(f"{size} in {after * 1e3:.3g} ms (without: {before * 1e3:.3g})")
        return after < _RATIO * before


def cuda_seconds(device: torch.device) -> Seconds:
    """Times replays by the device's own clock: the median of several rounds."""

    def seconds(replay: Replay) -> float:
        with torch.cuda.device(device):
            for _ in range(_REPLAYS):
                replay()
            taken = list[float]()
            for _ in range(_ROUNDS):
                start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                start.record()
                for _ in range(_REPLAYS):
                    replay()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end) / 1e3 / _REPLAYS)
            return float(np.median(taken))

    return seconds
