"""A step's ids, positions and rows of logits on the device, in one copy. Owned by the step thread."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from asyncengine.model.last_tokens import LastTokens, sources_of
from asyncengine.model.packed_buffer import PackedBuffer
from asyncengine.step.batch import StepBatch


class StepInputs:
    """Brings what the model takes to the device.

    Args:
        device: Where to.
        packed: Whether through one pinned buffer; if not given, on devices that are not the CPU.
        last: Has the tokens that the host does not know.

    Attributes:
        sample_slots: (M,) those of the step that was sent last, on the device, where there are last tokens.
    """

    def __init__(self, device: torch.device, packed: bool | None = None, last: LastTokens | None = None) -> None:
        self.sample_slots = torch.empty(0, dtype=torch.int64, device=device)
        self._last = last
        self._device = device
        packed = device.type == "cuda" if packed is None else packed
        self._buffer = PackedBuffer(device) if packed else None

    def send(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The (1, tokens) ids, the (1, tokens) positions, and the (M,) rows of which logits are wanted, all int64."""
        sections: dict[str, NDArray[Any]] = {
            "ids": batch.token_ids,
            "positions": batch.positions,
            "index": batch.sample_index,
        }
        if self._last is not None:
            sections |= {"sources": sources_of(batch), "slots": batch.sample_slots}
        if self._buffer is None:
            sent = {name: torch.from_numpy(section).to(self._device) for name, section in sections.items()}
        else:
            sent = self._buffer.send_sections(sections)
        # One conversion each: the buffer is written again by the next step, these are the step's own.
        ids, positions, index = (sent[name].long() for name in ("ids", "positions", "index"))
        if self._last is not None:
            ids, self.sample_slots = self._last.fill(ids, sent["sources"]), sent["slots"].long()
        return ids[None], positions[None], index
