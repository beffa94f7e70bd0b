"""Several sides, measured by turns: what engines take beside transformers' `generate`, of the same work."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, TypeVar

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.config import Quantization

T = TypeVar("T")


class Turn(NamedTuple):
    """One turn of a side, in seconds."""

    wall: float
    cpu: float


def engines_of(config: EngineConfig, quantization: Quantization) -> dict[str, AsyncEngine]:
    """Engines by the names of their sides: one as configured, and one whose weights have few bits if that is asked."""
    engines = {"asyncengine": AsyncEngine(config)}
    if quantization != "none":
        engines[quantization] = AsyncEngine(config.replace(dtype="auto", quantization=quantization))
    return engines


async def by_turns(
    sides: Mapping[str, Callable[[T], Awaitable[None]]], rounds: int, work: Callable[[int, int], T]
) -> dict[str, list[tuple[Turn, T]]]:
    """Has each side work, one after the other, in so many rounds and one before that warms up.

    Args:
        sides: By name, what does the work.
        rounds: How many count.
        work: Makes it for a round, 0 that which warms up, and for a side by its place among them.

    Returns:
        By side, how long each round took, and of what.
    """
    turns: dict[str, list[tuple[Turn, T]]] = {side: [] for side in sides}
    for count in range(rounds + 1):
        for number, (side, run) in enumerate(sides.items()):
            given = work(count, number)
            wall, cpu = time.perf_counter(), time.process_time()
            await run(given)
            if count:
                turns[side].append((Turn(time.perf_counter() - wall, time.process_time() - cpu), given))
    return turns
