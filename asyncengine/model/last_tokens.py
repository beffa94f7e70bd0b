"""The token that was drawn last in each slot, where the next step finds it. Owned by the step thread."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from asyncengine.step.batch import Int32, StepBatch


class LastTokens:
    """One token per slot, on the device.

    Attributes:
        tensor: (slots + 1,) int64, at an address that never changes: captured launches refer to it.
        nowhere: The slot that nobody has: what is drawn for rows that pad a step goes there.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.tensor = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self.nowhere = num_slots

    def store(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Notes what was drawn: (rows,) slots, none but `nowhere` twice, and int64 tokens; both on the device."""
        self.tensor.index_copy_(0, slots.long(), tokens)

    def fill(self, ids: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """The (tokens,) ids of a step, where those with a source, a slot or -1, are the slot's last token."""
        return torch.where(sources >= 0, self.tensor[sources.clamp(min=0).long()], ids)

    def known(self, batch: StepBatch) -> StepBatch:
        """The batch with all its tokens, for a model whose device is the host."""
        if batch.unknown is None:
            return batch
        sources = sources_of(batch)
        token_ids: Int32 = self.fill(torch.from_numpy(batch.token_ids), torch.from_numpy(sources)).int().numpy()
        return dataclasses.replace(batch, token_ids=token_ids, unknown=None)


def sources_of(batch: StepBatch) -> Int32:
    """(T,) for each token, the slot whose last token it is, or -1 where the host knows it."""
    sources = np.full(len(batch.token_ids), -1, dtype=np.int32)
    if batch.unknown is not None:
        rows = np.flatnonzero(batch.unknown)
        sources[batch.query_start[rows]] = batch.sample_slots[rows]
    return sources
