"""`HeadDrafter`: drafts by a head that goes on from the hidden states of the model. Owned by the step thread.

The entry of token j, in the head's own keys and values, is made of the embedding of token j and of the model's hidden
state of token j - 1, and lies where the model keeps token j: it depends on the tokens up to j alone, so whatever the
scheduler does with blocks (shares, copies, caches, releases them) holds for both.

Behind each step of the model, the entries of all its tokens are made (`read`). So wherever the model has the keys of a
text, the head has the entries of the same. Before a step, the newest token of each sequence, which the model has not
seen yet, gets its entry, whose output is the first guess; further ones go on from the head's own states, and what they
write is written again, with the states of the model, once the model has looked at the guesses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine.generation import SamplingParams
from asyncengine.model.device_copy import to_device
from asyncengine.model.draft_heads.entries import EntryLayers
from asyncengine.model.draft_heads.head import Head, Pictured
from asyncengine.model.draft_heads.kept_states import KeptStates
from asyncengine.model.draft_heads.taps import Taps
from asyncengine.model.draft_steps import alike, flattened, places_of
from asyncengine.model.media.encoder import MediaEncoder
from asyncengine.model.sampler import Sampler
from asyncengine.step.batch import NO_PAIRS, NO_TOKENS, Int32, Int64, StepBatch
from asyncengine.step.slots import SlotTable


class HeadDrafter:
    """As `asyncengine.speculation.protocol.Drafter`, and a companion of the model.

    Args:
        head: Guesses.
        layers: Its KV cache, which is there.
        taps: Where the model's hidden states are behind each of its steps.
        kept: Keeps some of them.
        sampler: Draws the drafts.
        device: Where all of that is.
        encoder: Has what the model sees of images; None if it takes none.
    """

    def __init__(
        self,
        head: Head,
        layers: EntryLayers,
        taps: Taps,
        kept: KeptStates,
        sampler: Sampler,
        device: torch.device,
        encoder: MediaEncoder | None = None,
    ) -> None:
        self._head: Head | None = head
        self._layers = layers
        self._taps = taps
        self._kept = kept
        self._sampler = sampler
        self._device = device
        self._encoder = encoder
        self._failure: Exception | None = None

    @property
    def nbytes(self) -> int:
        """Bytes beside the head and its KV cache."""
        return self._taps.nbytes + self._kept.nbytes

    def place(self, slot: int, params: SamplingParams, branch: int) -> None:
        """As the protocol says."""
        self._sampler.place(slot, alike(params), branch, NO_TOKENS, NO_TOKENS)

    def copy(self, copies: Int64) -> None:
        """As the protocol says."""
        self._layers.copy_blocks(copies)
        self._kept.copy(copies)

    def follow(self, table: SlotTable, slots: Int64) -> None:
        """As the protocol says: `read` has seen the step already."""

    def read(self, batch: StepBatch) -> None:
        """Makes the entries of a step that the model has just computed. What fails here fails the next guess."""
        if self._failure is None:
            try:
                with torch.inference_mode():
                    self._read(batch)
            except Exception as error:
                self._failure = error

    def check(self) -> None:
        """Looks, behind a first step, whether all is well.

        Raises:
            Exception: Whatever has failed.
        """
        self._taps.check()
        if self._failure is not None:
            raise self._failure

    def propose(self, table: SlotTable, slots: Int64, lengths: Int64) -> Sequence[Int32]:
        """As the protocol says."""
        if self._failure is not None:
            raise self._failure
        assert self._head is not None
        ends = table.num_tokens[slots]
        states = self._kept.rows(places_of(table, slots, ends - 2))
        found = [NO_TOKENS] * len(slots)
        ready = np.flatnonzero(states >= 0)  # else the model has computed them too long ago
        if not len(ready):
            return found
        slots, ends, lengths = slots[ready], ends[ready], lengths[ready]
        drafts = np.zeros((len(slots), int(lengths.max())), dtype=np.int32)
        tokens = table.tokens[slots, ends - 1]
        generated = ends - table.prompt_tokens[slots]
        with torch.inference_mode():
            before, rows = self._kept.states(states[ready]), np.arange(len(slots))
            for step in range(drafts.shape[1]):
                going_on = np.flatnonzero(lengths[rows] > step)
                if len(going_on) < len(rows):
                    rows, before = rows[going_on], before[to_device(going_on, self._device)]
                batch = flattened(table, slots[rows], ends[rows] - 1 + step, np.ones(len(rows), dtype=np.int64))
                shifted = batch.positions + table.shifts[slots[rows]].astype(np.int32)
                batch = dataclasses.replace(batch, token_ids=tokens[rows], positions=shifted, num_decodes=len(rows))
                before = self._entries(batch, before, np.zeros(len(rows), dtype=np.bool_))
                drawn = self._sampler.sample(self._head.logits(before), slots[rows], generated[rows] + step)
                drafts[rows, step] = tokens[rows] = drawn.token_ids
        for row, own, length in zip(ready.tolist(), drafts, lengths.tolist(), strict=True):
            found[row] = own[:length]
        return found

    def sleep(self) -> None:
        """Gives the KV cache's memory back; the head waits in host memory."""
        self._kept.clear()
        self._layers.free()
        if self._head is not None and self._device.type == "cuda":
            self._head.to(torch.device("cpu"))

    def wake(self) -> None:
        """Undoes `sleep`. Without memory for it there are no guesses any more."""
        try:
            if self._head is not None and self._device.type == "cuda":
                self._head.to(self._device)
            self._layers.allocate()
        except Exception as error:
            self._layers.free()
            self._failure = error

    def close(self) -> None:
        """Lets head and KV cache go."""
        self._layers.free()
        self._head = self._encoder = None

    def _read(self, batch: StepBatch) -> None:
        """Makes the entries of a step, and keeps the states that later ones go on from."""
        assert self._head is not None
        starts, count = batch.query_start[:-1].astype(np.int64), len(batch.token_ids)
        states = self._head.enter(self._taps.of(count))
        begun = np.flatnonzero(batch.context_lens > 0)
        last, page_size = batch.context_lens[begun].astype(np.int64) - 1, self._kept.page_size
        blocks = batch.block_tables[begun, last // page_size].astype(np.int64)
        rows = self._kept.rows(blocks * page_size + last % page_size)
        before = torch.cat([states[:1], states[:-1]])  # the first of each row has none of this step's
        absent = np.zeros(count, dtype=np.bool_)
        absent[starts] = True
        absent[starts[begun]] = rows < 0
        if len(begun):
            before[to_device(starts[begun], self._device)] = self._kept.states(rows)
        self._entries(batch, before, absent)
        self._kept.forget(batch.slot_mapping)
        # Of rows that decode, all: how many of them count is seen later.
        decoded = int(batch.query_start[batch.num_decodes])
        ends = batch.query_start[batch.num_decodes + 1 :].astype(np.int64) - 1
        wanted = np.concatenate([np.arange(decoded), ends])
        self._kept.keep(batch.slot_mapping[wanted], states[to_device(wanted, self._device)])

    def _entries(self, batch: StepBatch, before: torch.Tensor, absent: NDArray[np.bool_]) -> torch.Tensor:
        """(tokens, width) states behind the entries of a step, which are written."""
        assert self._head is not None
        self._layers.begin(dataclasses.replace(batch, copies=NO_PAIRS))
        self._layers.absent = to_device(absent, self._device)
        token_ids = to_device(batch.token_ids.astype(np.int64), self._device)
        sees = self._head.sees_images
        axes = batch.axes if sees and batch.axes is not None else batch.positions
        pictured = self._pictured(batch) if sees and batch.media else None
        return self._head.run(token_ids, to_device(axes.astype(np.int64), self._device), before, pictured)

    def _pictured(self, batch: StepBatch) -> Pictured:
        """What a step has of images; the model has just seen it."""
        assert self._encoder is not None
        rows = [
            self._encoder.features(part.item).rows[part.first : part.first + len(part.tokens)] for part in batch.media
        ]
        tokens = np.concatenate([part.tokens for part in batch.media])
        return Pictured(to_device(tokens, self._device), torch.cat(rows))
