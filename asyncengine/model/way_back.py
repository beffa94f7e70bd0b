"""Brings what a step has drawn to the host, behind that step and beside the next one. Owned by the step thread.

On CUDA the copies are made on a stream of their own, into pinned memory, and whoever wants them waits for an event
without the interpreter's lock. Elsewhere what was computed is there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

_ALIGNMENT = 16


class OnItsWay:
    """Tensors that are being copied to the host."""

    __slots__ = ("_done", "_hosts", "_sent")

    def __init__(self, sent: Sequence[torch.Tensor], hosts: Sequence[torch.Tensor], done: Any) -> None:
        self._sent = sent  # they must live until they are copied
        self._hosts = hosts
        self._done = done

    def wait(self) -> list[NDArray[Any]]:
        """Blocks until the step is through and its tensors are there. Errors of the device show here."""
        if self._done is None:
            return [tensor.numpy() for tensor in self._hosts]
        self._done.synchronize()
        return [tensor.numpy().copy() for tensor in self._hosts]  # what they lie in is used again


class WayBack:
    """Where steps' results go.

    Args:
        device: Where they come from.
        places: How many steps may be on their way at once, and one more.
    """

    def __init__(self, device: torch.device, places: int = 3) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        # torch has 32 streams of each priority, and hands them out in turn: so this one is none that is captured on.
        self._stream = torch.cuda.Stream(device, priority=-1) if self._cuda else None  # type: ignore[no-untyped-call]
        self._ring = [torch.empty(0, dtype=torch.uint8)] * places
        self._next = 0

    def send(self, tensors: Sequence[torch.Tensor]) -> OnItsWay:
        """Queues the copies of tensors behind what is queued on the compute stream; there may be none of them."""
        if not self._cuda:
            return OnItsWay(tensors, [tensor.cpu() for tensor in tensors], None)
        hosts = self._places_for(tensors)
        computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        computed.record(torch.cuda.current_stream(self._device))
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            for host, tensor in zip(hosts, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            done.record(self._stream)
        return OnItsWay(tensors, hosts, done)

    def _places_for(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Pinned tensors of the same shapes, one after the other in the ring's next place."""
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        starts, count = [], 0
        for size in sizes:
            starts.append(count)
            count += -(-size // _ALIGNMENT) * _ALIGNMENT
        place, self._next = self._next, (self._next + 1) % len(self._ring)
        if count > len(self._ring[place]):
            self._ring[place] = torch.empty(max(2 * count, 1 << 12), dtype=torch.uint8, pin_memory=self._cuda)
        whole = self._ring[place]
        return [
            whole[start : start + size].view(tensor.dtype).view(tensor.shape)
            for tensor, start, size in zip(tensors, starts, sizes, strict=True)
        ]
