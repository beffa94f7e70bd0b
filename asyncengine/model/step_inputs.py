"""A step's ids, positions and rows of logits on the device, in one copy. Owned by the step thread."""

from __future__ import annotations

import numpy as np
import torch

from asyncengine.model.packed_buffer import PackedBuffer
from asyncengine.step.batch import StepBatch


class StepInputs:
    """Brings what the model takes to the device.

    Args:
        device: Where to.
        packed: Whether through one pinned buffer; if not given, on devices that are not the CPU.
    """

    def __init__(self, device: torch.device, packed: bool | None = None) -> None:
        self._device = device
        packed = device.type == "cuda" if packed is None else packed
        self._buffer = PackedBuffer(device) if packed else None

    def send(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The (1, tokens) ids, the (1, tokens) positions, and the (M,) rows of which logits are wanted, all int64."""
        if self._buffer is None:
            ids = torch.from_numpy(batch.token_ids.astype(np.int64))[None].to(self._device)
            positions = torch.from_numpy(batch.positions.astype(np.int64))[None].to(self._device)
            return ids, positions, torch.from_numpy(batch.sample_index).to(self._device)
        sent = self._buffer.send_sections(
            {"ids": batch.token_ids, "positions": batch.positions, "index": batch.sample_index}
        )
        # One conversion each: the buffer is written again by the next step, these are the step's own.
        return sent["ids"].long()[None], sent["positions"].long()[None], sent["index"].long()
