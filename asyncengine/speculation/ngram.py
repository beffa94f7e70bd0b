"""Drafts from the text itself: what followed the last time the same tokens came. No torch.

Prompt lookup decoding (Saxena, 2023): answers repeat what they speak of. A guess costs next to nothing, and where the
text does not repeat itself there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncengine.generation import SamplingParams
from asyncengine.step.batch import NO_TOKENS, Int32, Int64
from asyncengine.step.slots import SlotTable

LONGEST = 5
"""Most tokens at the end of a sequence that are looked for."""
SHORTEST = 2
"""Fewest: a single token comes again too often to say much."""


class NgramDrafter:
    """As `asyncengine.speculation.protocol.Drafter`. Keeps nothing."""

    def place(self, slot: int, params: SamplingParams, branch: int) -> None:
        """As the protocol says."""

    def copy(self, copies: Int64) -> None:
        """As the protocol says."""

    def follow(self, table: SlotTable, slots: Int64) -> None:
        """As the protocol says."""

    def propose(self, table: SlotTable, slots: Int64, lengths: Int64) -> Sequence[Int32]:
        """As the protocol says."""
        return [
            continued(table.known_tokens(slot), length)
            for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True)
        ]


def continued(tokens: Int32, length: int) -> Int32:
    """What followed the longest, then newest, earlier occurrence of the end of `tokens`.

    Where that occurrence is so near that fewer than `length` tokens followed, the text repeats itself with that period,
    and the guess goes on so. It ends before a piece of an image, which has a negative id: nobody draws one.
    """
    last = len(tokens) - 1
    ends = np.flatnonzero(tokens[:last] == tokens[last])  # where an occurrence may end
    best = NO_TOKENS
    for size in range(1, LONGEST):
        ends = ends[ends >= size]
        ends = ends[tokens[ends - size] == tokens[last - size]]
        if not len(ends):
            break
        if size + 1 >= SHORTEST:
            best = tokens[int(ends[-1]) + 1 :]
    if not len(best):
        return NO_TOKENS
    guess: Int32 = np.resize(best, length)
    images = np.flatnonzero(guess < 0)
    return guess[: images[0]] if len(images) else guess
