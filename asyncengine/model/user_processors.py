"""Logits processors that requests bring with them. Owner: the sampler, on the step thread."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncengine.generation import SamplingParams
from asyncengine.logits_processor import LogitsProcessor, LogitsRow

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class _Slot:
    __slots__ = ("branch", "length", "output", "processors", "prompt")

    def __init__(self, processors: tuple[LogitsProcessor, ...], branch: int, prompt: Int32, output: Int32) -> None:
        self.processors = processors
        self.branch = branch
        self.prompt = prompt.copy()
        self.prompt.flags.writeable = False
        self.output = output.copy()
        self.length = len(output)

    def row(self) -> LogitsRow:
        generated = self.output[: self.length]
        generated.flags.writeable = False
        return LogitsRow(self.prompt, generated, self.branch)

    def append(self, token_id: int) -> None:
        if self.length == len(self.output):
            self.output = np.concatenate([self.output, np.zeros(max(16, self.length), np.int32)])
        self.output[self.length] = token_id
        self.length += 1


class UserProcessors:
    """The processors of all slots that have some."""

    def __init__(self, num_slots: int) -> None:
        self._has = np.zeros(num_slots, np.bool_)
        self._slots: dict[int, _Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def put(self, slot: int, params: SamplingParams, branch: int, prompt: Int32, output: Int32) -> None:
        """Gives a slot its request's processors, if there are any."""
        if params.logits_processors:
            self._slots[slot] = _Slot(params.logits_processors, branch, prompt, output)
            self._has[slot] = True

    def remove(self, slot: int) -> None:
        """Forgets a slot's processors; does nothing where there are none."""
        if self._slots.pop(slot, None) is not None:
            self._has[slot] = False

    def has(self, slots: Int64) -> NDArray[np.bool_]:
        """(rows,) whether each slot has processors."""
        return self._has[slots]

    def apply(self, logits: Tensor, slots: Int64, failed: dict[int, Exception]) -> None:
        """Calls the processors of the rows of a batch; what one raises is noted for its row.

        Args:
            logits: (rows, vocab) float32; changed in place.
            slots: (rows,) the slot of each row.
            failed: Row to the exception.
        """
        for row in np.flatnonzero(self._has[slots]).tolist():
            slot = self._slots[int(slots[row])]
            try:
                # A copy: whatever a processor keeps must not be the batch's.
                values, seen = logits[row].clone(), slot.row()
                for processor in slot.processors:
                    returned = processor(values, seen)
                    if returned is not None:
                        values = _checked(returned, values)
                logits[row] = values
            except BaseException as error:  # SystemExit, say: it must not end the thread
                failed[row] = error if isinstance(error, Exception) else RuntimeError(f"a processor raised {error!r}")

    def record(self, slots: Int64, token_ids: Int32) -> None:
        """Notes one new token for each row of a batch."""
        for row in np.flatnonzero(self._has[slots]).tolist():
            self._slots[int(slots[row])].append(int(token_ids[row]))


def _checked(returned: object, like: Tensor) -> Tensor:
    if not isinstance(returned, Tensor):
        raise TypeError(f"a logits processor returned {type(returned).__name__}; expected a torch.Tensor or None")
    if returned.shape != like.shape or not returned.is_floating_point():
        raise ValueError(
            f"a logits processor returned {tuple(returned.shape)} of {returned.dtype}; expected {tuple(like.shape)} of "
            f"{torch.float32}"
        )
    return returned.to(like)
