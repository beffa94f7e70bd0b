"""Where the fused step runs: where it was measured to be faster than the model's own modules, on the device.

Of few tokens each bucket of captured steps is measured. Of more, a step of some and one of as many as there can be are,
launched: what differs is what lies between the products, and that grows as the products do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.fused.tiles import MOST_TOKENS
from asyncengine.model.graphs import Seconds, StepGraphs

DEVICES: tuple[str, ...] = ("cuda",)
"""Types of devices that it is for."""

_RATIO = 0.98
"""What it must take at most of the modules' time: less of a gain is noise."""

Replay = Callable[[], None]


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
            self._said.append(_failure("no further, for it cannot be captured", error))
            self._open.clear()
            return False
        finally:
            self._fused.use(self._won)
            where = f"used for {', '.join(map(str, sorted(self._won)))} tokens" if self._won else "not used"
            self.notes = (f"decoder: fused kernels are {where}: measured {'; '.join(self._said)}",)
        return True

    def _better(self, size: int, old: Replay, new: Replay) -> bool:
        before, after = self._seconds(old), self._seconds(new)
        self._said.append(_figures(size, before, after))
        return after < _RATIO * before


def choose_many(fused: FusedDecoder, launch: Callable[[int], None], counts: Sequence[int], seconds: Seconds) -> str:
    """Has steps of more than `MOST_TOKENS` tokens run as is faster; returns what was measured, in words.

    Args:
        fused: What could run them.
        launch: Queues a step of so many tokens, and waits for nothing.
        counts: What is measured. It has to be faster at each of them.
        seconds: How long what it is given takes on the device.
    """
    said, faster = list[str](), True
    for count in counts:
        taken = list[float]()
        try:
            for fused.many in (False, True):
                taken.append(seconds(functools.partial(launch, count)))
        except Exception as error:  # whatever a compiler or a driver raises
            said.append(_failure(f"{count} cannot be run", error))
            faster = False
            break
        before, after = taken
        faster &= after < _RATIO * before
        said.append(_figures(count, before, after))
    fused.many = faster
    where = "used" if faster else "not used"
    return f"decoder: fused kernels are {where} for more than {MOST_TOKENS} tokens: measured {'; '.join(said)}"


def _figures(count: int, before: float, after: float) -> str:
    return f"{count} in {after * 1e3:.3g} ms (without: {before * 1e3:.3g})"


def _failure(what: str, error: Exception) -> str:
    return f"{what}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"


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
