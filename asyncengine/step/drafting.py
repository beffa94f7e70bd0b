"""Drafts of a step: who makes them, how many, and what became of them. Owned by the step thread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asyncengine.generation import SamplingParams
from asyncengine.speculation.lengths import NOTHING, DraftLengths, Learnt
from asyncengine.speculation.protocol import Drafter
from asyncengine.step.batch import Int32, Int64
from asyncengine.step.slots import SlotTable


@dataclass(frozen=True, slots=True)
class Drafts:
    """What is guessed in one step.

    Attributes:
        lengths: (decodes,) how many tokens for each row; not all 0.
        token_ids: (drafts,) row after row.
    """

    lengths: Int64
    token_ids: Int32


class Drafting:
    """A drafter and its lengths. A drafter that raises is not asked again: decoding goes on without it.

    Attributes:
        failure: What it raised.
    """

    def __init__(self, drafter: Drafter, lengths: DraftLengths) -> None:
        self.lengths = lengths
        self.failure: Exception | None = None
        self._drafter = drafter

    def place(self, slot: int, params: SamplingParams, branch: int, learnt: Learnt = NOTHING) -> None:
        """A sequence takes a slot; what was learnt of it before it was preempted still holds."""
        self.lengths.place(slot, learnt)
        if self.failure is None:
            try:
                self._drafter.place(slot, params, branch)
            except Exception as error:
                self.failure = error

    def copy(self, copies: Int64) -> None:
        """Blocks are copied before the step."""
        if self.failure is None:
            try:
                self._drafter.copy(copies)
            except Exception as error:
                self.failure = error

    def follow(self, table: SlotTable, slots: Int64) -> None:
        """A piece of these slots' prefill was computed."""
        if self.failure is None:
            try:
                self._drafter.follow(table, slots)
            except Exception as error:
                self.failure = error

    def propose(self, table: SlotTable, slots: Int64, lengths: Int64) -> Drafts | None:
        """Drafts for decoding slots, of which some may want none; None if there are none at all."""
        rows = np.flatnonzero(lengths > 0)
        if self.failure is not None or not len(rows):
            return None
        try:
            proposed = self._drafter.propose(table, slots[rows], lengths[rows])
            found = [
                np.asarray(tokens, dtype=np.int32)[:most]
                for tokens, most in zip(proposed, lengths[rows].tolist(), strict=True)
            ]
        except Exception as error:
            self.failure = error
            return None
        drafted = np.zeros(len(slots), dtype=np.int64)
        drafted[rows] = [len(tokens) for tokens in found]
        return Drafts(drafted, np.concatenate(found)) if drafted.any() else None


def shared(lengths: Int64, most: int) -> Int64:
    """Lengths of drafts, each as wanted but `most` together: nobody gets a token more while another wants its first."""
    if int(lengths.sum()) <= most:
        return lengths
    longest = np.arange(1, int(lengths.max()) + 1)
    level = int(np.searchsorted(np.minimum(lengths[:, None], longest).sum(axis=0), most, side="right"))
    fewer: Int64 = np.minimum(lengths, level)
    longer = np.flatnonzero(lengths > level)
    fewer[longer[: most - int(fewer.sum())]] += 1
    return fewer
