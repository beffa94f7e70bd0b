"""Captures what a function launches on CUDA. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from asyncengine.model import memory

Tensors = tuple[torch.Tensor, ...]
_WARM_UPS = 2
"""Runs before a capture, so that what is made on first use is not captured."""


class Recorder(Protocol):
    """Captures what a function launches."""

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """Returns what launches it again, and the tensors that every launch writes to."""
        ...


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """As the protocol says."""
        with torch.cuda.device(self._device):  # it is the thread's present device that a capture synchronises
            return self._record(function)

    def _record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with memory.CAPTURES:
            torch.cuda.synchronize(self._device)
            # Other threads may use the device meanwhile: an application's own models, a loader.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = function()
        return graph.replay, outputs
