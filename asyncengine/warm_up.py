"""How far a model is that is served before it is as fast as it will be. An immutable value; no torch, no asyncio."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Work that makes a loaded model faster, in pieces, done while there are no requests.

    Attributes:
        done: Pieces that are through.
        of: All pieces, also those that turned out to be impossible.
        goes_on: Whether the next piece is done as soon as there is nothing else to do.
        nbytes: Memory of the device that the pieces have taken, as far as it was measured.
        notes: What came of them, and what keeps the rest from being done, in words.
    """

    done: int
    of: int
    goes_on: bool
    nbytes: int = 0
    notes: tuple[str, ...] = ()


NOTHING = WarmUp(0, 0, False)
"""Of a model that is as fast when it is loaded as it will ever be."""
