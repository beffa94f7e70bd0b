"""Where the fused step runs: where it was measured to be faster than the model's own modules, on the device.

Of few tokens each bucket of captured steps is measured. Of more, what differs is what lies between the products, and
one step speaks for its like: a captured one where there is one, and a launched one of as many as there mostly are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import numpy as np
import torch

from asyncengine.model.buckets import Buckets
from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.fused.tiles import MOST_TOKENS, SOME_TOKENS
from asyncengine.model.graphs import Seconds, StepGraphs, reason_of

DEVICES: tuple[str, ...] = ("cuda",)
"""Types of devices that it is for."""

_RATIO = 0.98
"""What it must take at most of the modules' time: less of a gain is noise."""

Replay = Callable[[], None]


class Choice:
    """Measures steps both ways, and has each sort run by the faster.

    Args:
        fused: Runs the same model; no step until it was measured.
        seconds: How long a replay takes.
        graphs: Captured steps of the model's own modules, if there are any.

    Attributes:
        notes: What came of it, in words.
    """

    def __init__(self, fused: FusedDecoder, seconds: Seconds, graphs: StepGraphs | None = None) -> None:
        self._graphs = graphs
        self._fused = fused
        self._seconds = seconds
        self._said = list[str]()
        self.notes: tuple[str, ...] = ()
        sizes = () if graphs is None else graphs.sizes
        self._open = {size for size in sizes if size <= MOST_TOKENS}
        if sizes:  # one of those that are captured first, so that it is decided before its like are
            coarse = Buckets(sizes).coarse()
            self._open |= set([size for size in coarse if MOST_TOKENS < size <= SOME_TOKENS][:1])
        fused.rest()

    def is_open(self, size: int) -> bool:
        """Whether a bucket is yet to be measured."""
        return size in self._open

    def decide(self, size: int) -> bool:
        """Measures a bucket that is captured, and keeps the faster graph; whether that was possible."""
        assert self._graphs is not None
        self._open.discard(size)
        self._fused.use((size,))
        kept = False
        try:
            kept = self._graphs.contest(size, functools.partial(self._replayed, size))
        except Exception as error:  # whatever a compiler or a driver raises
            self._said.append(f"no further, for it cannot be captured: {reason_of(error)}")
            self._open.clear()
            return False
        finally:
            self._settle((size,), kept)
        return True

    def decide_launched(self, counts: Collection[int], tokens: int, launch: Replay, seconds: Seconds) -> None:
        """Measures a step that is launched.

        Args:
            counts: The token counts that are decided by it; above `MOST_TOKENS`, their like too.
            tokens: It has so many.
            launch: Queues it.
            seconds: How long that takes, until the device has done it.
        """
        taken, kept = list[float](), False
        try:
            for fused in (False, True):
                self._fused.use(counts, fused)
                taken.append(seconds(launch))
            kept = self._better(f"{tokens} launched", *taken)
        except Exception as error:  # whatever a compiler or a driver raises
            self._said.append(f"{tokens} cannot be launched: {reason_of(error)}")
        finally:
            self._settle(counts, kept)

    def _replayed(self, size: int, old: Replay, new: Replay) -> bool:
        return self._better(str(size), self._seconds(old), self._seconds(new))

    def _better(self, what: str, before: float, after: float) -> bool:
        self._said.append(f"{what} in {after * 1e3:.3g} ms (without: {before * 1e3:.3g})")
        return after < _RATIO * before

    def _settle(self, counts: Collection[int], kept: bool) -> None:
        fused = self._fused
        fused.use(counts, kept)
        used = [str(size) for size in sorted(fused.sizes)]
        used += [f"{MOST_TOKENS + 1} to {SOME_TOKENS}"] if fused.some else []
        used += ["more"] if fused.serves(SOME_TOKENS + 1) else []
        where = f"used for {', '.join(used)} tokens" if used else "not used"
        self.notes = (f"decoder: fused kernels are {where}: measured {'; '.join(self._said)}",)


def cuda_seconds(device: torch.device, rounds: int = 7, replays: int = 5) -> Seconds:
    """Times replays by the device's own clock: the median of several rounds."""

    def seconds(replay: Replay) -> float:
        with torch.cuda.device(device):
            for _ in range(replays):
                replay()
            taken = list[float]()
            for _ in range(rounds):
                start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                start.record()
                for _ in range(replays):
                    replay()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end) / 1e3 / replays)
            return float(np.median(taken))

    return seconds
