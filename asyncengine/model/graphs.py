"""Captured steps: the launches of a whole forward, replayed at once, for a few token counts. Owned by the step thread.

A step of decodes alone is padded to a bucket and replayed; everything else runs as it is. With drafts a row has several
query tokens: then a graph serves where such a step launches what a graph has, and none is captured for it. Ids,
positions and rows reach the device in one packed copy, at addresses that a graph knows; the attention's plan reaches it
in another one.

Capturing can fail for reasons that lie in a model's code (it looks at a value on the host, or allocates in its own
way). Then the model runs without graphs, and a note says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine.model.buckets import Buckets, padded
from asyncengine.model.last_tokens import LastTokens, sources_of
from asyncengine.model.packed_buffer import PackedBuffer
from asyncengine.step.batch import StepBatch

_WARM_UPS = 2
"""Runs before a capture, so that what is made on first use is not captured."""


class Steppable(Protocol):
    """What is captured."""

    def begin(self, batch: StepBatch) -> Any:
        """Prepares a step and returns the attention's plan."""
        ...

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Runs the model: (1, tokens) int64 ids and positions, (rows,) int64 rows of logits; (rows, vocabulary)."""
        ...


class Recorder(Protocol):
    """Captures what a function launches."""

    def record(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Returns what launches it again, and the tensor that every launch writes to."""
        ...


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """As the protocol says."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: an application's own models, a loader.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = function()
        return graph.replay, output


@dataclass(frozen=True, slots=True)
class _Captured:
    key: Hashable
    replay: Callable[[], None]
    output: torch.Tensor


class StepGraphs:
    """Captured forwards of one model.

    Args:
        model: What to run.
        buckets: For which token counts.
        device: Where.
        recorder: Captures; CUDA graphs if not given.
        last: Has the tokens that the host does not know.
    """

    def __init__(
        self,
        model: Steppable,
        buckets: Buckets,
        device: torch.device,
        recorder: Recorder | None = None,
        last: LastTokens | None = None,
    ) -> None:
        self._model = model
        self._buckets = buckets
        self._device = device
        self._recorder: Recorder | None = recorder or CudaRecorder(device)
        self._last = last
        self._buffer = PackedBuffer(device, 5 * _aligned(buckets.sizes[-1]))
        self._graphs: dict[int, _Captured] = {}
        self._slots = torch.empty(0, dtype=torch.int32, device=device)
        self.notes: list[str] = []
        """What did not work, in words."""

    @property
    def captured(self) -> tuple[int, ...]:
        """The buckets for which there is a graph."""
        return tuple(sorted(self._graphs))

    def capture(
        self,
        budget: float = 20.0,
        progress: Callable[[int, int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Captures the buckets, largest first, so that the smaller ones fit into the memory of the larger ones.

        A bucket without a graph is padded to the next one that has one; so stopping early costs speed alone.

        Args:
            budget: Seconds after which no other capture is begun.
            progress: Called with how many are done, and of how many.
            clock: Tells the time.
        """
        until = clock() + budget
        sizes = self._buckets.sizes[::-1]
        for done, size in enumerate(sizes):
            if clock() >= until:
                self.notes.append(f"graphs: {done} of {len(sizes)} were captured within {budget:g} s")
                return
            if not self._capture(size):
                return
            if progress is not None:
                progress(done + 1, len(sizes))

    def run(self, batch: StepBatch) -> torch.Tensor | None:
        """Logits of a step, (rows, vocabulary), by a graph; None where none fits, and then nothing was done.

        The tensor is overwritten by the next step.
        """
        if not self._graphs or not _decodes_alone(batch):
            return None
        size = self._size(len(batch.token_ids))
        if size is None:
            return None
        step = padded(batch, size)
        plan = self._model.begin(step)
        self._send(step)
        captured = self._graphs[size]
        if captured.key != _key(plan):
            if batch.draft_lengths is not None:
                # How many tokens its rows have decides what is launched, and the next step has other rows.
                return self._forward(size)[: len(batch.sample_index)]
            # Memory that the graph refers to was replaced by a larger one. This step is the first with the new one.
            del self._graphs[size]
            if not self._capture(size, step):
                return self._forward(size)[: len(batch.sample_index)]
            captured = self._graphs[size]
        captured.replay()
        return captured.output[: len(batch.sample_index)]

    def clear(self) -> None:
        """Lets go of all graphs: the memory that they refer to is about to be freed. `capture` makes new ones."""
        self._graphs.clear()
        self.notes.clear()

    def _size(self, tokens: int) -> int | None:
        size = self._buckets.of(tokens)
        if size is None or size in self._graphs:
            return size
        return min((captured for captured in self._graphs if captured >= tokens), default=None)

    def _capture(self, size: int, step: StepBatch | None = None) -> bool:
        """Captures one bucket, with a step that is there or one that attends to nothing and writes nowhere."""
        if self._recorder is None:
            return False
        try:
            self._graphs[size] = self._recorded(self._recorder, size, step or _nothing(size))
        except Exception as error:
            self._graphs.clear()
            self._recorder = None
            text = str(error).strip() or type(error).__name__
            self.notes.append(f"graphs: the model cannot be captured, it runs without: {text.splitlines()[0]}")
            return False
        return True

    def _recorded(self, recorder: Recorder, size: int, step: StepBatch) -> _Captured:
        with torch.inference_mode():
            plan = self._model.begin(step)
            self._send(step)
            replay, output = recorder.record(lambda: self._forward(size))
        return _Captured(_key(plan), replay, output)

    def contest(self, size: int, better: Callable[[Callable[[], None], Callable[[], None]], bool]) -> bool:
        """Captures a bucket again, of a model that has come to run it in another way, and keeps one of the two graphs.

        Args:
            size: A bucket that has a graph.
            better: Takes what replays the old one and what replays the new one; whether the new one is to stay.

        Returns:
            Whether it does. If it cannot be captured, the error is raised and the old one stays.
        """
        assert self._recorder is not None
        new = self._recorded(self._recorder, size, _nothing(size))
        kept = better(self._graphs[size].replay, new.replay)
        if kept:
            self._graphs[size] = new
        return kept

    @property
    def sample_slots(self) -> torch.Tensor:
        """(M,) int64 slots of the samples of the step that was run last, on the device."""
        return self._slots.long()

    def _send(self, step: StepBatch) -> None:
        """One copy to the device; the sections' places depend on the number of tokens alone."""
        tokens = len(step.token_ids)
        index = np.zeros(tokens, np.int64)
        index[: len(step.sample_index)] = step.sample_index
        sections: dict[str, NDArray[Any]] = {"ids": step.token_ids, "positions": step.positions, "index": index}
        if self._last is not None:
            sections |= {"sources": sources_of(step), "slots": step.sample_slots}
        sent = self._buffer.send_sections(sections)
        self._slots = sent.get("slots", self._slots)

    def _forward(self, size: int) -> torch.Tensor:
        place = _aligned(size)
        ids, positions, index = (self._buffer.tensor[i * place : i * place + size].long() for i in range(3))
        if self._last is not None:
            ids = self._last.fill(ids, self._buffer.tensor[3 * place : 3 * place + size])
        return self._model.forward(ids[None], positions[None], index)


def capture_steps(
    model: Steppable, backend_name: str, sequences: int, device: torch.device, last: LastTokens | None = None
) -> tuple[StepGraphs | None, tuple[str, ...]]:
    """Captures the decodes of up to `sequences` sequences, where device and attention allow it.

    Returns:
        The graphs, or None, and what does not work, in words.
    """
    if device.type != "cuda":
        return None, ()
    if backend_name != "triton":
        return None, (f"graphs: the {backend_name} attention plans in tensors of changing sizes; none are captured",)
    graphs = StepGraphs(model, Buckets.upto(sequences), device, last=last)
    graphs.capture()
    return graphs, tuple(graphs.notes)


def _decodes_alone(batch: StepBatch) -> bool:
    return batch.num_decodes == len(batch.context_lens) and len(batch.sample_index) <= len(batch.token_ids)


def _nothing(tokens: int) -> StepBatch:
    """A step of padding alone."""
    empty = np.zeros(0, np.int64)
    return StepBatch(
        token_ids=np.zeros(tokens, np.int32),
        positions=np.zeros(tokens, np.int32),
        query_start=np.zeros(1, np.int32),
        context_lens=np.zeros(0, np.int32),
        block_tables=np.zeros((0, 1), np.int32),
        slot_mapping=np.full(tokens, -1, np.int64),
        sample_index=empty,
        sample_slots=empty,
        sample_positions=empty,
        copies=empty.reshape(0, 2),
        num_decodes=0,
    )


def _key(plan: Any) -> Hashable:
    return getattr(plan, "graph_key", None)


def _aligned(count: int) -> int:
    return -(-count // 4) * 4
