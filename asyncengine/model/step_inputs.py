"""A step's ids, positions, rows of logits and draws on the device, in one copy. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from asyncengine.model.last_tokens import LastTokens, sources_of
from asyncengine.model.packed_buffer import PackedBuffer
from asyncengine.step.batch import StepBatch

Sections = dict[str, NDArray[Any]]
Carrier = Callable[[Sections], dict[str, torch.Tensor] | None]
"""Brings sections to the device along with something else, or declines."""


class StepInputs:
    """Brings what the model takes to the device.

    Args:
        device: Where to.
        packed: Whether through one pinned buffer; if not given, on devices that are not the CPU.
        last: Has the tokens that the host does not know.

    Attributes:
        packed: As given.
        sample_slots: (M,) those of the step that was sent last, on the device, where there are last tokens.
        sent: What else was sent with that step; it holds until the next one.
    """

    def __init__(self, device: torch.device, packed: bool | None = None, last: LastTokens | None = None) -> None:
        self.packed = device.type == "cuda" if packed is None else packed
        self.sample_slots = torch.empty(0, dtype=torch.int64, device=device)
        self.sent: Mapping[str, torch.Tensor] = {}
        self._last = last
        self._device = device
        self._buffer = PackedBuffer(device) if self.packed else None

    def send(
        self, batch: StepBatch, others: Mapping[str, NDArray[Any]] | None = None, carry: Carrier | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sends a step.

        Args:
            batch: The step.
            others: Further sections, for `sent`.
            carry: Takes the sections along with the attention's plan, where it can.

        Returns:
            The (1, tokens) ids, the (1, tokens) positions, and the (M,) rows of which logits are wanted, all int64.
        """
        sections: Sections = {"ids": batch.token_ids, "positions": batch.positions, "index": batch.sample_index}
        if self._last is not None:
            sections |= {"sources": sources_of(batch), "slots": batch.sample_slots}
        if others:
            sections |= others
        carried = None if carry is None else carry(sections)
        sent = self.sent = self._ship(sections) if carried is None else carried
        # One conversion each: the buffer is written again by the next step, these are the step's own.
        ids, positions, index = (sent[name].long() for name in ("ids", "positions", "index"))
        if self._last is not None:
            ids, self.sample_slots = self._last.fill(ids, sent["sources"]), sent["slots"].long()
        return ids[None], positions[None], index

    def _ship(self, sections: Sections) -> dict[str, torch.Tensor]:
        if self._buffer is None:
            return {name: torch.from_numpy(section).to(self._device) for name, section in sections.items()}
        return self._buffer.send_sections(sections)
