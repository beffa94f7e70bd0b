"""A smaller model that drafts for a larger one, over the same blocks in KV tensors of its own.

Owned by the step thread.

Both models write the keys and values of a token to the same place of the same block, each into its own tensors, so that
whatever the scheduler does with blocks (shares, copies, caches, releases them) holds for both. The draft model may lag:
which token it has last computed at each place is noted, and what is missing of a sequence is computed before it drafts.
Computing too little would cost right guesses, never a wrong token.

A draft is drawn as the model draws, with the same temperature and filters and the same random number at each position:
where the two distributions are alike, so are the tokens, also at a high temperature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncengine.generation import SamplingParams
from asyncengine.model.sampler import Sampler
from asyncengine.step.batch import Int32, Int64, StepBatch
from asyncengine.step.scheduler import Limits
from asyncengine.step.sequence import EMPTY
from asyncengine.step.slots import SlotTable

if TYPE_CHECKING:
    from asyncengine.model.runner import TorchModel


class DraftModel:
    """As `asyncengine.speculation.protocol.Drafter`.

    Args:
        model: Its sampler is not used.
        sampler: Draws the drafts.
        limits: Of the model that is drafted for.
    """

    def __init__(self, model: TorchModel, sampler: Sampler, limits: Limits) -> None:
        self._model = model
        self._sampler = sampler
        self._page_size = limits.page_size
        self._budget = limits.prefill_chunk_size
        self._written = np.full(limits.num_blocks * limits.page_size, -1, dtype=np.int32)  # token at each place
        self._computed = np.zeros(limits.max_num_sequence, dtype=np.int64)  # tokens of each slot, at least

    def place(self, slot: int, params: SamplingParams, branch: int) -> None:
        """As the protocol says."""
        # What needs the tokens before is left out: a guess that it forbids is not kept, that is all.
        alike = dataclasses.replace(
            params,
            frequency_penalty=0.0,
            presence_penalty=0.0,
            repetition_penalty=1.0,
            num_logprobs=-1,
            grammar=None,
            jumps=False,
            bad_words=(),
            logits_processors=(),
        )
        self._sampler.place(slot, alike, branch, EMPTY, EMPTY)
        self._computed[slot] = 0

    def copy(self, copies: Int64) -> None:
        """As the protocol says."""
        self._model.copy_blocks(copies)
        pages = self._written.reshape(-1, self._page_size)
        pages[copies[:, 1]] = pages[copies[:, 0]]

    def follow(self, table: SlotTable, slots: Int64) -> None:
        """As the protocol says."""
        self._catch_up(table, slots, table.num_computed[slots])

    def propose(self, table: SlotTable, slots: Int64, lengths: Int64) -> Sequence[Int32]:
        """As the protocol says."""
        ends = table.num_tokens[slots]
        self._catch_up(table, slots, ends - 1)
        ready = np.flatnonzero(self._computed[slots] == ends - 1)
        found = [EMPTY] * len(slots)
        if not len(ready):
            return found
        slots, ends, lengths = slots[ready], ends[ready], lengths[ready]
        drafts = np.zeros((len(slots), int(lengths.max())), dtype=np.int32)
        tokens = table.tokens[slots, ends - 1]
        generated = ends - table.prompt_tokens[slots]
        for step in range(drafts.shape[1]):
            rows = np.flatnonzero(lengths > step)
            logits = self._run(table, slots[rows], ends[rows] - 1 + step, tokens[rows])
            drawn = self._sampler.sample(logits, slots[rows], generated[rows] + step).token_ids
            drafts[rows, step] = tokens[rows] = drawn
        for row, own, length in zip(ready.tolist(), drafts, lengths.tolist(), strict=True):
            found[row] = own[:length]
        return found

    def sleep(self) -> None:
        """Gives the KV cache's memory back."""
        self._model.sleep()
        self._written[:] = -1

    def wake(self) -> None:
        """Undoes `sleep`."""
        self._model.wake()

    def close(self) -> None:
        """Lets weights and KV cache go."""
        self._model.close()

    def _catch_up(self, table: SlotTable, slots: Int64, ends: Int64) -> None:
        """Computes what is missing of sequences up to `ends`, as much as one step may."""
        budget, starts, counts = self._budget, [], []
        for slot, end in zip(slots.tolist(), ends.tolist(), strict=True):
            start = self._known(table, slot, end)
            count = min(max(end - start, 0), budget)
            budget -= count
            starts.append(start)
            counts.append(count)
            self._computed[slot] = start + count
        some = np.flatnonzero(counts)
        if len(some):
            first, number = np.array(starts, dtype=np.int64)[some], np.array(counts, dtype=np.int64)[some]
            self._execute(_flattened(table, slots[some], first, number))

    def _known(self, table: SlotTable, slot: int, end: int) -> int:
        """How many of a slot's first `end` tokens are computed: those noted, and those found at their places."""
        start = min(int(self._computed[slot]), end)
        at = np.arange(start, end)
        places = table.blocks[slot, at // self._page_size].astype(np.int64) * self._page_size + at % self._page_size
        other = np.flatnonzero(self._written[places] != table.tokens[slot, start:end])
        return start + int(other[0]) if len(other) else end

    def _run(self, table: SlotTable, slots: Int64, positions: Int64, token_ids: Int32) -> torch.Tensor:
        """Computes one token for each slot; returns (rows, vocab)."""
        batch = _flattened(table, slots, positions, np.ones(len(slots), dtype=np.int64))
        every = np.arange(len(slots), dtype=np.int64)
        return self._execute(
            dataclasses.replace(batch, token_ids=token_ids.copy(), sample_index=every, num_decodes=len(slots))
        )

    def _execute(self, batch: StepBatch) -> torch.Tensor:
        with torch.inference_mode():
            logits = self._model.logits(batch)
        self._written[batch.slot_mapping] = batch.token_ids
        return logits


def _flattened(table: SlotTable, slots: Int64, starts: Int64, counts: Int64) -> StepBatch:
    """Tokens `starts` to `starts + counts` of each slot as one step without logits."""
    query_start = np.zeros(len(slots) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    rows = np.repeat(slots, counts)
    positions = np.repeat(starts - query_start[:-1], counts) + np.arange(query_start[-1], dtype=np.int64)
    page_size = table.page_size
    nothing = np.empty(0, dtype=np.int64)
    return StepBatch(
        token_ids=table.tokens[rows, positions],
        positions=positions.astype(np.int32),
        query_start=query_start,
        context_lens=starts.astype(np.int32),
        block_tables=table.blocks[slots, : table.num_blocks[slots].max()],
        slot_mapping=table.blocks[rows, positions // page_size].astype(np.int64) * page_size + positions % page_size,
        sample_index=nothing,
        sample_slots=nothing,
        sample_positions=nothing,
        copies=nothing.reshape(0, 2),
        num_decodes=0,
    )
