"""A smaller model that drafts for a larger one, over the same blocks in KV tensors of its own.

Owned by the step thread.

Both models write the keys and values of a token to the same place of the same block, each into its own tensors, so that
whatever the scheduler does with blocks (shares, copies, caches, releases them) holds for both. The draft model may lag:
after which text it has last computed each place is noted, as a fingerprint, and what is missing of a sequence is
computed before it drafts. Computing too little would cost right guesses, never a wrong token.

Images it does not see, and audio it does not hear: in the place of each of their pieces it has a token that stands for
one in a text.

A draft is drawn as the model draws, with the same temperature and filters and the same random number at each position:
where the two distributions are alike, so are the tokens, also at a high temperature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine.generation import SamplingParams
from asyncengine.model.draft_steps import alike, flattened, places_of
from asyncengine.model.sampler import Sampler
from asyncengine.step.batch import NO_TOKENS, Int32, Int64, StepBatch
from asyncengine.step.limits import Limits
from asyncengine.step.slots import SlotTable

if TYPE_CHECKING:
    from asyncengine.model.runner import TorchModel


UInt64 = NDArray[np.uint64]


class DraftModel:
    """As `asyncengine.speculation.protocol.Drafter`.

    Args:
        model: Its sampler is not used.
        sampler: Draws the drafts.
        limits: Of the model that is drafted for.
        of_media: The token that it has in the place of a piece of an image or of audio.
    """

    def __init__(self, model: TorchModel, sampler: Sampler, limits: Limits, of_media: int = 0) -> None:
        self._model = model
        self._of_media = of_media
        self._sampler = sampler
        self._page_size = limits.page_size
        self._budget = limits.prefill_chunk_size
        # A text's fingerprint is the sum of its tokens, each times a number of its position; modulo 2**64.
        self._factors = np.random.default_rng(0).integers(1, 2**64, limits.max_single_sequence_length, np.uint64)
        self._written = np.zeros(limits.num_blocks * limits.page_size, dtype=np.uint64)  # of the text up to each place
        self._computed = np.zeros(limits.max_num_sequence, dtype=np.int64)  # tokens of each slot, at least
        self._prints = np.zeros(limits.max_num_sequence, dtype=np.uint64)  # of these tokens

    def place(self, slot: int, params: SamplingParams, branch: int) -> None:
        """As the protocol says."""
        self._sampler.place(slot, alike(params), branch, NO_TOKENS, NO_TOKENS)
        self._forget(slot)

    def copy(self, copies: Int64) -> None:
        """As the protocol says."""
        self._model.copy_blocks(copies)
        pages = self._written.reshape(-1, self._page_size)
        pages[copies[:, 1]] = pages[copies[:, 0]]

    def follow(self, table: SlotTable, slots: Int64) -> None:
        """As the protocol says."""
        self._forget(slots)  # blocks of the same text may have taken the place of theirs
        self._catch_up(table, slots, table.num_computed[slots])

    def propose(self, table: SlotTable, slots: Int64, lengths: Int64) -> Sequence[Int32]:
        """As the protocol says."""
        ends = table.num_tokens[slots]
        self._catch_up(table, slots, ends - 1)
        ready = np.flatnonzero(self._computed[slots] == ends - 1)
        found = [NO_TOKENS] * len(slots)
        if not len(ready):
            return found
        slots, ends, lengths = slots[ready], ends[ready], lengths[ready]
        drafts = np.zeros((len(slots), int(lengths.max())), dtype=np.int32)
        tokens = table.tokens[slots, ends - 1]
        generated = ends - table.prompt_tokens[slots]
        prints = self._prints[slots]
        for step in range(drafts.shape[1]):
            rows = np.flatnonzero(lengths > step)
            positions = ends[rows] - 1 + step
            prints[rows] += self._products(tokens[rows], positions)
            logits = self._run(table, slots[rows], positions, tokens[rows], prints[rows])
            drawn = self._sampler.sample(logits, slots[rows], generated[rows] + step).token_ids
            drafts[rows, step] = tokens[rows] = drawn
        for row, own, length in zip(ready.tolist(), drafts, lengths.tolist(), strict=True):
            found[row] = own[:length]
        return found

    def sleep(self) -> None:
        """Gives the KV cache's memory back."""
        self._model.sleep()
        self._written[:] = 0

    def wake(self) -> None:
        """Undoes `sleep`."""
        self._model.wake()

    def close(self) -> None:
        """Lets weights and KV cache go."""
        self._model.close()

    def _forget(self, slots: int | Int64) -> None:
        """Looks at slots from their first token on when they are looked at next."""
        self._computed[slots] = 0
        self._prints[slots] = 0

    def _catch_up(self, table: SlotTable, slots: Int64, ends: Int64) -> None:
        """Computes what is missing of sequences up to `ends`, as much as one step may."""
        budget, starts, counts, prints = self._budget, [], [], []
        for slot, end in zip(slots.tolist(), ends.tolist(), strict=True):
            first = int(self._computed[slot])
            known = self._prints_of(table, slot, end)
            start = first + self._same(table, slot, first, known)
            count = min(end - start, budget)
            budget -= count
            starts.append(start)
            counts.append(count)
            prints.append(known[start - first : start - first + count])
            if start + count > first:
                self._computed[slot] = start + count
                self._prints[slot] = known[start + count - first - 1]
        some = np.flatnonzero(counts)
        if len(some):
            begin, number = np.array(starts, dtype=np.int64)[some], np.array(counts, dtype=np.int64)[some]
            self._execute(flattened(table, slots[some], begin, number, self._of_media), np.concatenate(prints))

    def _prints_of(self, table: SlotTable, slot: int, end: int) -> UInt64:
        """(tokens,) fingerprints of a slot's text up to each of its tokens from `_computed` to `end`."""
        first = int(self._computed[slot])
        products = self._products(table.tokens[slot, first:end], np.arange(first, end))
        prints: UInt64 = self._prints[slot] + np.cumsum(products, dtype=np.uint64)
        return prints

    def _products(self, token_ids: Int32, positions: Int64) -> UInt64:
        products: UInt64 = (token_ids.astype(np.uint64) + np.uint64(1)) * self._factors[positions]
        return products

    def _same(self, table: SlotTable, slot: int, first: int, prints: UInt64) -> int:
        """How many of a slot's tokens, from `first` on, are found at their places."""
        at = np.arange(first, first + len(prints))
        places = places_of(table, np.full(len(at), slot), at)
        other = np.flatnonzero(self._written[places] != prints)
        return int(other[0]) if len(other) else len(prints)

    def _run(self, table: SlotTable, slots: Int64, positions: Int64, token_ids: Int32, prints: UInt64) -> torch.Tensor:
        """Computes one token for each slot; returns (rows, vocab)."""
        batch = flattened(table, slots, positions, np.ones(len(slots), dtype=np.int64))
        every = np.arange(len(slots), dtype=np.int64)
        batch = dataclasses.replace(batch, token_ids=token_ids.copy(), sample_index=every, num_decodes=len(slots))
        return self._execute(batch, prints)

    def _execute(self, batch: StepBatch, prints: UInt64) -> torch.Tensor:
        with torch.inference_mode():
            logits = self._model.logits(batch)
        self._written[batch.slot_mapping] = prints
        return logits
