"""One step's integers in one copy to the device. Owned by the step thread.

The host writes into pinned memory, the device reads its own copy at an address that never changes, so that captured
launches may refer to it. The host's side is a ring: an array is written again only after the copy out of it is done,
which, with no more steps under way than the ring has places, is never waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from asyncengine.step.batch import Int32

_ALIGNMENT = 4
"""Sections begin at multiples of 16 bytes."""


class PackedBuffer:
    """An int32 array on the host and its copy on the device.

    Args:
        device: Where the copy is.
        capacity: Numbers that fit at first.
        places: Length of the ring on the host.
    """

    def __init__(self, device: torch.device, capacity: int = 1 << 12, places: int = 3) -> None:
        self._device = device
        self._places = places
        self._next = 0
        self.generation = -1
        self._make(capacity)

    def _make(self, capacity: int) -> None:
        cuda = self._device.type == "cuda"
        self.generation += 1
        self._host = [torch.empty(capacity, dtype=torch.int32, pin_memory=cuda) for _ in range(self._places)]
        self._events = [torch.cuda.Event() if cuda else None for _ in range(self._places)]  # type: ignore[no-untyped-call]
        self.tensor = torch.empty(capacity, dtype=torch.int32, device=self._device)

    @property
    def capacity(self) -> int:
        """Numbers that fit without growing."""
        return len(self.tensor)

    def reserve(self, count: int) -> bool:
        """Makes room for `count` numbers.

        Returns:
            Whether `tensor` is another one now; then `generation` is another, too, and what was captured with the old
            one must not be used any more.
        """
        if count <= self.capacity:
            return False
        self._make(1 << (count - 1).bit_length())
        return True

    def send(self, values: Int32, start: int = 0) -> torch.Tensor:
        """Copies numbers to the device, behind what is queued there already, and returns them; grows if it must.

        Args:
            values: The numbers.
            start: Where they go. What lies before stays, unless the buffer grows.
        """
        self.reserve(start + len(values))
        self._host_array()[start : start + len(values)] = values
        return self._copy(start, start + len(values))

    def send_sections(self, sections: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        """Copies several flat arrays at once; returns the views of them on the device, under their names.

        Where each lies depends on the lengths of those before it alone.
        """
        starts, count = {}, 0
        for name, section in sections.items():
            starts[name] = count
            count += -(-len(section) // _ALIGNMENT) * _ALIGNMENT
        self.reserve(count)
        array = self._host_array()
        for name, section in sections.items():
            array[starts[name] : starts[name] + len(section)] = section
        self._copy(0, count)
        return {name: self.tensor[starts[name] : starts[name] + len(section)] for name, section in sections.items()}

    def _host_array(self) -> Int32:
        event = self._events[self._next]
        if event is not None:
            event.synchronize()  # returns at once for an event that was never recorded, or that is done
        array: Int32 = self._host[self._next].numpy()
        return array

    def _copy(self, start: int, end: int) -> torch.Tensor:
        sent = self.tensor[start:end]
        sent.copy_(self._host[self._next][start:end], non_blocking=True)
        event = self._events[self._next]
        if event is not None:
            event.record(torch.cuda.current_stream(self._device))
        self._next = (self._next + 1) % self._places
        return sent
