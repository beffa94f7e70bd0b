"""Presence, frequency and repetition penalty. Owner: the sampler, on the step thread."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine.generation import SamplingParams
from asyncengine.model.device_copy import to_device

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class TokenPenalties:
    """What the penalised slots have seen so far, and the penalties themselves.

    A penalised slot owns one row of two tensors on the device: `counts` (rows, vocab), how often the slot has generated
    each token, and `seen` (rows, capacity), every token that a penalty may touch, repeats allowed. A penalty therefore
    costs as much as the sequence is long, not as the vocabulary is wide. The tensors grow by doubling and are let go
    when the last penalised slot is.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._row = np.full(num_slots, -1, np.int64)
        self._length = np.zeros(num_slots, np.int64)  # of the slot's row in `seen`
        self._penalties = np.zeros((num_slots, 3), np.float32)  # presence, frequency, repetition
        self._free_rows: list[int] = []
        self._forget_rows()

    def __len__(self) -> int:
        return self._counts.shape[0] - len(self._free_rows)

    def put(self, slot: int, params: SamplingParams, prompt_ids: Int32, output_ids: Int32) -> None:
        """Starts to count for a slot that does not; does nothing where the parameters ask for no penalty."""
        repeats = params.repetition_penalty != 1.0
        if not (repeats or params.presence_penalty or params.frequency_penalty):
            return
        output = output_ids[(output_ids >= 0) & (output_ids < self._vocab_size)].astype(np.int64)
        prompt = prompt_ids[(prompt_ids >= 0) & (prompt_ids < self._vocab_size)].astype(np.int64)
        seen = np.unique(np.concatenate([prompt, output]) if repeats else output)
        counts = np.bincount(output, minlength=self._vocab_size).astype(np.int32)
        self._reserve(len(seen))
        row = self._free_rows[-1]
        self._counts[row] = to_device(counts, self._device)
        self._seen[row, : len(seen)] = to_device(seen, self._device)
        self._penalties[slot] = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
        self._length[slot] = len(seen)
        self._row[slot] = self._free_rows.pop()

    def remove(self, slot: int) -> None:
        """Stops counting for a slot; does nothing where it is not counted."""
        if self._row[slot] >= 0:
            self._free_rows.append(int(self._row[slot]))
            self._row[slot] = -1
            if not len(self):
                self._forget_rows()

    def has(self, slots: Int64) -> NDArray[np.bool_]:
        """(rows,) whether each slot is counted."""
        found: NDArray[np.bool_] = self._row[slots] >= 0
        return found

    def apply(self, logits: torch.Tensor, slots: Int64) -> None:
        """Penalises the rows of a batch in place.

        Presence and frequency are subtracted for generated tokens (OpenAI); then a positive logit of a token in the
        prompt or the output is divided by the repetition penalty and a negative one multiplied (Keskar et al., 2019).

        Args:
            logits: (rows, vocab) float32.
            slots: (rows,) the slot of each row.
        """
        batch_rows = np.flatnonzero((self._row[slots] >= 0) & (self._length[slots] > 0))
        if not len(batch_rows):
            return
        slots = slots[batch_rows]
        last = self._length[slots] - 1
        where = to_device(np.stack([batch_rows, self._row[slots], last]), self._device)
        batch_row, row, last_column = where.unsqueeze(-1).unbind(0)  # (penalised, 1) each
        presence, frequency, repetition = to_device(self._penalties[slots].T.copy(), self._device).unsqueeze(-1)

        # A shorter row repeats its last token: writing the same value twice is harmless.
        columns = torch.arange(int(last.max()) + 1, device=self._device).minimum(last_column)
        ids = self._seen[row, columns]  # (penalised, longest)
        counts = self._counts[row, ids].float()
        values = logits[batch_row, ids]
        values = values - frequency * counts - presence * (counts > 0)
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits[batch_row, ids] = values

    def record(self, slots: Int64, token_ids: torch.Tensor) -> None:
        """Counts one new token for each row of a batch.

        Args:
            slots: (rows,) the slot of each row, none twice.
            token_ids: (rows,) int64 on the device.
        """
        batch_rows = np.flatnonzero(self._row[slots] >= 0)
        if not len(batch_rows):
            return
        slots = slots[batch_rows]
        self._reserve_columns(int(self._length[slots].max()) + 1)
        where = to_device(np.stack([batch_rows, self._row[slots], self._length[slots]]), self._device)
        batch_row, row, column = where.unbind(0)
        tokens = token_ids[batch_row]
        self._counts[row, tokens] += 1
        self._seen[row, column] = tokens
        self._length[slots] += 1

    def _forget_rows(self) -> None:
        self._free_rows.clear()
        self._counts = torch.zeros(0, self._vocab_size, dtype=torch.int32, device=self._device)
        self._seen = torch.zeros(0, 64, dtype=torch.int64, device=self._device)

    def _reserve(self, columns: int) -> None:
        """Makes sure of a free row, and of `columns` columns."""
        self._reserve_columns(columns)
        if not self._free_rows:
            old = self._counts.shape[0]
            more = max(old, 1)
            counts = torch.cat([self._counts, self._counts.new_zeros(more, self._vocab_size)])
            seen = torch.cat([self._seen, self._seen.new_zeros(more, self._seen.shape[1])])
            self._counts, self._seen = counts, seen
            self._free_rows.extend(range(old, old + more))

    def _reserve_columns(self, columns: int) -> None:
        rows, old = self._seen.shape
        if columns > old:
            more = max(columns, 2 * old) - old
            self._seen = torch.cat([self._seen, self._seen.new_zeros(rows, more)], dim=1)
