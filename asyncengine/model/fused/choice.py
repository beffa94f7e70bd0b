"""Where the fused step runs: where it was measured to be faster than the model's own modules, on the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection

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


def choose(graphs: StepGraphs, fused: FusedDecoder, candidates: Collection[int], seconds: Seconds) -> tuple[str, ...]:
    """Measures captured steps both ways, and keeps the faster for each bucket.

    Args:
        graphs: Steps of the model's own modules, captured.
        fused: Runs the same model; from now on for those token counts alone for which it is faster.
        candidates: Token counts for which it could be used.
        seconds: How long a replay takes.

    Returns:
        What came of it, in words.
    """
    won, said = set[int](), list[str]()

    def better(old: Replay, new: Replay) -> bool:
        before, after = seconds(old), seconds(new)
        said.append(f"{size} in {after * 1e3:.3g} ms (without: {before * 1e3:.3g})")
        return after < _RATIO * before

    try:
        for size in graphs.captured:
            if size in candidates:
                fused.use({*won, size})
                if graphs.contest(size, better):
                    won.add(size)
    except Exception as error:  # whatever a compiler or a driver raises
        text = str(error).strip() or type(error).__name__
        said.append(f"no further, for it cannot be captured: {text.splitlines()[0]}")
    fused.use(won)
    if not said:
        return ()
    where = f"used for {', '.join(map(str, sorted(won)))} tokens" if won else "not used"
    return (f"decoder: fused kernels are {where}: measured {'; '.join(said)}",)


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
            return statistics.median(taken)

    return seconds
