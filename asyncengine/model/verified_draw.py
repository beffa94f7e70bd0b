"""Draws at every drafted position of a step, and finds how far the drafts were right. Owned by the step thread.

Each position is drawn from the model's own distribution with that position's own random number, and a draft is kept
while it equals what was drawn. For a draft that is given, this is as likely to keep it as rejection sampling (Leviathan
et al., 2023), and the tokens are those that decoding without drafts would have drawn.

Sequences whose draw depends on nothing but logits and position are drawn at all positions at once. Where it depends on
the tokens before (penalties, grammar, bad words, the request's own processors), positions are drawn one after the
other, each once the one before was kept: so the state never sees a token that is not in the output, and nothing is
taken back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from asyncengine.model.device_copy import to_device
from asyncengine.model.sampler import Sampler
from asyncengine.step.batch import Int32, Int64, StepBatch, StepTokens, TokenLogprobs


def draw(sampler: Sampler, logits: Tensor, batch: StepBatch) -> StepTokens:
    """One token for each entry of `batch.sample_index`, as far as it counts, and `StepTokens.taken`.

    Args:
        sampler: Draws.
        logits: (M, vocab) of any float type; may be overwritten.
        batch: Of the step, with drafts.
    """
    assert batch.draft_lengths is not None
    runs = batch.draft_lengths + 1
    first = np.cumsum(runs) - runs
    singles = np.arange(int(runs.sum()), len(batch.sample_index))
    # The draft that an entry is compared with is the row's next query token; the last entry of a row has none.
    guesses = np.full(len(batch.sample_index), -1, dtype=np.int32)
    guessed = np.delete(np.arange(int(runs.sum())), first + runs - 1)
    guesses[guessed] = batch.token_ids[batch.sample_index[guessed] + 1]
    verified = _Verified(sampler, logits, batch.sample_slots, batch.sample_positions)
    remembers = sampler.remembers(batch.sample_slots[first])
    at_once = np.repeat(~remembers, runs)
    taken = np.zeros(len(runs), dtype=np.int64)

    waves = np.flatnonzero(remembers).tolist()
    begin = np.concatenate([np.flatnonzero(at_once), first[waves], singles])
    begin.sort()
    verified.draw(begin)
    for row in np.flatnonzero(~remembers).tolist():
        entries = slice(first[row], first[row] + runs[row])
        taken[row] = _run(verified.token_ids[entries], guesses[entries])
    taken[waves] = 1
    step = 0
    while waves := [row for row in waves if verified.goes_on(int(first[row]) + step, guesses)]:
        step += 1
        verified.draw(first[waves] + step)
        taken[waves] += 1
    for entry in verified.failed:  # what failed is no token; it is the last entry of its row that was drawn
        if entry < int(runs.sum()):
            taken[int(np.searchsorted(first, entry, side="right")) - 1] -= 1
    return verified.result(taken)


def _run(token_ids: Int32, guesses: Int32) -> int:
    """How many tokens count: all before the first that is not as guessed, and that one."""
    wrong: NDArray[np.intp] = np.flatnonzero(token_ids != guesses)
    return int(wrong[0]) + 1  # the last entry has no guess


class _Verified:
    """What was drawn so far, entry by entry."""

    def __init__(self, sampler: Sampler, logits: Tensor, slots: Int64, positions: Int64) -> None:
        self._sampler = sampler
        self._logits = logits
        self._slots = slots
        self._positions = positions
        self.token_ids: Int32 = np.zeros(len(slots), dtype=np.int32)
        self.failed: dict[int, Exception] = {}
        self._logprobs: list[TokenLogprobs | None] = [None] * len(slots)
        self._finished: list[int] = []
        self._forced: dict[int, list[int]] = {}

    def draw(self, entries: Int64) -> None:
        """Draws some entries, in rising order."""
        whole = len(entries) == len(self._slots)
        logits = self._logits if whole else self._logits[to_device(entries, self._logits.device)]
        drawn = self._sampler.sample(logits, self._slots[entries], self._positions[entries])
        self.token_ids[entries] = drawn.token_ids
        if drawn.logprobs is not None:
            for entry, logprobs in zip(entries.tolist(), drawn.logprobs, strict=True):
                self._logprobs[entry] = logprobs
        self._finished += entries[list(drawn.finished)].tolist()
        for row, error in drawn.failed.items():
            self.failed[int(entries[row])] = error
        for row, tokens in drawn.forced.items():
            self._forced[int(entries[row])] = tokens

    def goes_on(self, entry: int, guesses: Int32) -> bool:
        """Whether the entry after this one counts, too."""
        ends = entry in self.failed or entry in self._forced or entry in self._finished
        return not ends and bool(self.token_ids[entry] == guesses[entry])

    def result(self, taken: Int64) -> StepTokens:
        some = any(entry is not None for entry in self._logprobs)
        return StepTokens(
            self.token_ids,
            self._logprobs if some else None,
            tuple(self._finished),
            self.failed,
            self._forced,
            taken=taken,
        )
