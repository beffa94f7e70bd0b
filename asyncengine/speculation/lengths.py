"""How many tokens are drafted for each sequence. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from asyncengine.step.batch import Int64

LONGEST = 8
"""Most tokens drafted for one sequence where the length is adaptive."""
PROBE_EVERY = 32
"""Steps after which a sequence whose drafts were not worth it has one token drafted again, to see."""
_DECAY = 0.9
_PRIOR = 0.7  # the share of drafts that is expected to be kept before anything is known ...
_PRIOR_WEIGHT = 2.0  # ... as if seen so often

Learnt = tuple[float, float]
"""Of a sequence: how many of its drafts were looked at, and how many of them kept; moving averages."""
NOTHING: Learnt = (_PRIOR_WEIGHT, _PRIOR * _PRIOR_WEIGHT)


class DraftLengths:
    """Decides by load and by what was kept before.

    A step of T tokens is taken to cost 1 + T / saturation, in units of what it costs to read the weights, and the
    drafts' own making `draft_cost` times that for each position. A further draft, kept with probability p, is worth it
    while p is more than its share of the cost of a step beside the tokens which that step yields anyway: with R
    sequences, p > (T / S) / (1 + T / S) + draft_cost. With many sequences that is more than any draft can promise, and
    none is made.

    Args:
        num_slots: Slots are 0..num_slots - 1.
        fixed: Tokens for each sequence, whatever happens; 0 adapts.
        saturation: Tokens whose arithmetic takes as long as reading the weights once.
        draft_cost: What drafting one position costs, in steps of the model.
    """

    def __init__(self, num_slots: int, fixed: int, saturation: float, draft_cost: float = 0.0) -> None:
        self._fixed = fixed
        self._saturation = saturation
        self._draft_cost = draft_cost
        self._tried = np.full(num_slots, NOTHING[0])
        self._kept = np.full(num_slots, NOTHING[1])
        self._idle = np.zeros(num_slots, dtype=np.int64)

    def place(self, slot: int, learnt: Learnt = NOTHING) -> None:
        """Begins anew for a slot, or goes on with what was learnt of its sequence in another."""
        self._tried[slot], self._kept[slot] = learnt
        self._idle[slot] = 0

    def learnt(self, slot: int) -> Learnt:
        """What was learnt of a slot's sequence."""
        return float(self._tried[slot]), float(self._kept[slot])

    def acceptance(self, slots: Int64) -> NDArray[np.float64]:
        """(rows,) the probability that a draft is kept whose predecessors were: a moving average for each slot."""
        clipped: NDArray[np.float64] = np.clip(self._kept[slots] / self._tried[slots], 0.01, 0.99)
        return clipped

    def wanted(self, slots: Int64, tokens: int) -> Int64:
        """(rows,) how many tokens to draft for each decoding slot.

        Args:
            slots: (rows,)
            tokens: Of the step without drafts, prefill included.
        """
        if self._fixed:
            return np.full(len(slots), self._fixed, dtype=np.int64)
        load = tokens / self._saturation
        least = load / (1 + load) + self._draft_cost
        if least >= 0.99:
            return np.zeros(len(slots), dtype=np.int64)
        lengths = np.minimum(np.log(least) / np.log(self.acceptance(slots)), LONGEST).astype(np.int64)
        none = lengths == 0
        self._idle[slots] = np.where(none, self._idle[slots] + 1, 0)
        lengths[none & (self._idle[slots] % PROBE_EVERY == 0)] = 1
        return np.asarray(lengths, dtype=np.int64)

    def learn(self, slot: int, drafted: int, kept: int) -> None:
        """Notes what became of a slot's drafts: those after the first that was not kept were never tried."""
        self._tried[slot] = self._tried[slot] * _DECAY + min(kept + 1, drafted)
        self._kept[slot] = self._kept[slot] * _DECAY + kept
