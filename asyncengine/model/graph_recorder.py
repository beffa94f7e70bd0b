"""Captures what a function launches on CUDA. Owned by the step thread."""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

import torch

from asyncengine.model import memory

Tensors = tuple[torch.Tensor, ...]
_WARM_UPS = 2
"""Runs before a capture, so that what is made on first use is not captured."""
_STREAMS: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)
"""Those that no recorder has any longer. cuBLAS keeps 32 MiB for each stream that a product was made on, as long as the
process lives: with a new stream for each load, reloads would come to a gigabyte."""


class Recorder(Protocol):
    """Captures what a function launches."""

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """Returns what launches it again, and the tensors that every launch writes to."""
        ...


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._new_pool()
        streams = _STREAMS[device]
        self._stream = streams.pop() if streams else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        weakref.finalize(self, streams.append, self._stream).atexit = False

    def _new_pool(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._in_pool = weakref.WeakSet[torch.cuda.CUDAGraph]()

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """As the protocol says."""
        with torch.cuda.device(self._device):  # it is the thread's present device that a capture synchronises
            return self._record(function)

    def _record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                function()
        present.wait_stream(self._stream)
        if not self._in_pool:  # torch takes no pool whose graphs are gone, as long as a tensor of theirs is held
            self._new_pool()
        graph = torch.cuda.CUDAGraph()
        cause: BaseException | None = None
        with memory.CAPTURES:
            torch.cuda.synchronize(self._device)
            try:
                # Other threads may use the device meanwhile: an application's own models, a loader.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    try:
                        outputs = function()
                    except BaseException as error:
                        cause = error
                        raise
            except BaseException:
                self._mend(present)
                if cause is None:
                    raise
                raise cause from cause.__cause__  # that the capture could not be ended then tells nothing
        self._in_pool.add(graph)
        # Nobody else gets the stream as long as this may be replayed: products on it would work in the same memory.
        graph.recorder = self  # type: ignore[attr-defined]
        return graph.replay, outputs

    def _mend(self, present: torch.cuda.Stream) -> None:
        """Puts right what a capture that broke off has left (torch 2.11 does not): else no capture would seem to end.

        The thread is still on the capture's stream, the allocator keeps all memory, and random numbers of the device
        are refused to everyone until a capture ends well. The failed one's memory is lost as long as the process lives.
        """
        torch.cuda.set_stream(present)
        with contextlib.suppress(RuntimeError):  # it has been ended
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
        self._new_pool()
        with contextlib.suppress(RuntimeError):
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"):
                torch.zeros(1, device=self._device)
