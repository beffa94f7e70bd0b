"""The rows of a step with drafts, as recurrent layers take them. Owned by the step thread.

How many of a row's tokens count is known once the model has drawn, and a state cannot be cut back. So such rows are
computed in waves: the first token of each as a batch, then the second of those that have two, and so on. Behind each
wave, the states of whoever is in the next one are set aside; in the end a row's state is the one behind the last token
that counts. Where kernels work in the places of states, a wave reads what the one before has set aside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from asyncengine.model.recurrent.places import Places
from asyncengine.step.batch import Int64, StepBatch


@dataclass(frozen=True, slots=True)
class Wave:
    """The tokens that are the n-th of their rows.

    Attributes:
        count: How many rows have one: the first, in the order of `DraftedRows`.
        tokens: (count,) which of the step's.
        aside: Places, from and to, of the states behind it of those that go on.
        places: From where to where states go: from a row's own place, or from aside, to aside, or to its own at last.
    """

    count: int
    tokens: torch.Tensor
    aside: tuple[int, int]
    places: Places

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """Its tokens of (1, tokens, ...) of the step: (count, 1, ...)."""
        return whole[0].index_select(0, self.tokens)[:, None]


class DraftedRows:
    """Of one step; the rows with most tokens come first.

    Args:
        batch: The step.
        first: The first place of those where states are set aside.
        nowhere: The place that nobody reads.
        device: Of the tensors.

    Attributes:
        places: (rows,) int64 of their states.
        alike: From where to where their places are, if these follow one another; None else.
        waves: All of them.
        back: (tokens,) where each of the rows' tokens is in what the waves come to, one after the other.
    """

    def __init__(self, batch: StepBatch, first: int, nowhere: int, device: torch.device) -> None:
        assert batch.slots is not None and batch.draft_lengths is not None
        lengths = batch.draft_lengths + 1
        order = np.argsort(-lengths, kind="stable")
        self._slots = batch.slots[: batch.num_decodes]
        self._lengths = lengths
        self._rank = np.empty(len(order), dtype=np.int64)
        self._rank[order] = np.arange(len(order))
        self._saves = [save for save in batch.state_saves.tolist() if save[0] < batch.num_decodes]
        starts = batch.query_start[order].astype(np.int64)
        counts = [int((lengths > n).sum()) for n in range(int(lengths.max()))] + [0]
        self._aside: list[int] = []  # the first place of each wave
        tokens: list[Int64] = []
        places = self._slots[order].astype(np.int64)
        sources, targets = [places], list[Int64]()
        for n, count in enumerate(counts[:-1]):
            self._aside.append(first)
            tokens.append(starts[:count] + n)
            go_on = counts[n + 1]
            aside = np.arange(first, first + go_on)
            sources.append(aside)
            targets.append(np.concatenate([aside, places[go_on:count]]))
            first += go_on
        follow = np.array_equal(places, np.arange(places[0], places[0] + len(places)))
        self.alike = (int(places[0]), int(places[0]) + len(places)) if follow else None
        back = np.argsort(np.concatenate(tokens))
        # All in one copy to the device.
        parts = [*tokens, *sources[:-1], *targets, back]
        sent = torch.from_numpy(np.concatenate(parts)).to(device)
        of = iter(torch.split(sent, [len(part) for part in parts]))
        of_tokens, of_sources, of_targets = ([next(of) for _ in tokens] for _ in range(3))
        self.waves = [
            Wave(counts[n], of_tokens[n], (at, at + counts[n + 1]), Places(of_sources[n], of_targets[n], nowhere))
            for n, at in enumerate(self._aside)
        ]
        self.places = self.waves[0].places.sources
        self.back = next(of)

    def taken(self, taken: Int64) -> list[tuple[int, int]]:
        """(source, destination) of the states to copy, in this order, once it is known how many tokens count.

        Args:
            taken: (rows,) of each row; one with none has no state that anybody may go on from.
        """
        moves = []
        for row, count, place in self._saves:
            if count <= taken[row]:
                moves.append((self._behind(row, count), place))
        for row, count in enumerate(taken.tolist()):
            if 0 < count < self._lengths[row]:
                moves.append((self._behind(row, count), int(self._slots[row])))
        return moves

    def _behind(self, row: int, count: int) -> int:
        """Where the row's state is as it was behind so many of its tokens."""
        if count == self._lengths[row]:
            return int(self._slots[row])
        return self._aside[count - 1] + int(self._rank[row])
