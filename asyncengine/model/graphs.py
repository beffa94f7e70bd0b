"""Captured steps: the launches of a whole step, replayed at once, for a few token counts. Owned by the step thread.

A step of decodes alone is padded to a bucket and replayed. Steps with prompts have graphs of their own, of which each
launches whatever a step of so many tokens could need; longer ones run as they are. With drafts a row has several query
tokens: then a graph of decodes serves where such a step launches what that has, and none is captured for it. Steps in
which somebody has an adapter have graphs of their own, too, in which each token looks its adapter up. Whatever a step
brings to the device, its attention's plan included, reaches it in one packed copy, where a graph looks for it.

The graph of a bucket takes the likeliest token of each row and keeps it as the last one of the row's slot, so a step of
greedy rows is one replay. What rows need besides is a graph of its own behind that one (`draw_graphs.py`): the captures
are as many as both together, not one times the other of a whole model.

Capturing can fail for reasons that lie in a model's code (it looks at a value on the host, or allocates in its own
way). Then there are no further graphs, and a note says why. What is captured when is told by `capturing.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine.model import token_draw
from asyncengine.model.adapters.adapted_modules import AdaptedModules, places_of
from asyncengine.model.attention.protocol import AttentionBackend, is_capturable
from asyncengine.model.buckets import Buckets, padded, padding
from asyncengine.model.draw_graphs import CapturedStep, DrawGraphs
from asyncengine.model.graph_recorder import CudaRecorder, Recorder, Tensors
from asyncengine.model.last_tokens import LastTokens, sources_of
from asyncengine.model.packed_buffer import PackedBuffer
from asyncengine.model.recurrent.states import States
from asyncengine.model.sampler import Sampler
from asyncengine.model.token_draw import FILTERED, DrawKind
from asyncengine.model.token_ranking import argmax
from asyncengine.step.batch import NO_PAIRS, StepBatch

Seconds = Callable[[Callable[[], None]], float]
"""How long what it is given takes on the device, done again and again."""


class Steppable(Protocol):
    """What is captured."""

    def begin_with(
        self, batch: StepBatch, sections: Mapping[str, NDArray[Any]], captured: bool = False, mixed: bool = False
    ) -> tuple[Any, dict[str, torch.Tensor] | None]:
        """Prepares a step: returns the attention's plan, and the sections on the device if it took them along."""
        ...

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Runs the model: (1, tokens) int64 ids and positions, (rows,) int64 rows of logits; (rows, vocabulary)."""
        ...


@dataclass(frozen=True, slots=True)
class Ran:
    """A step that was queued.

    Attributes:
        logits: (M, vocabulary); overwritten by the next step.
        slots: (M,) those of the samples, on the device; none if last tokens are not kept.
        tokens: (M,) int64 what was drawn, which is the last token of each slot already; None if nothing was drawn.
    """

    logits: torch.Tensor
    slots: torch.Tensor
    tokens: torch.Tensor | None = None


class StepGraphs:
    """Captured steps of one model: of decodes alone, or, beside those, of anything.

    Args:
        model: What to run.
        buckets: For which token counts.
        device: Where.
        recorder: Captures; CUDA graphs if not given.
        last: Has the tokens that the host does not know.
        kinds: The draws that can be captured, besides greedy ones.
        most_samples: Of steps of anything, how many rows of logits they give at most. Without, a step is of decodes
            alone, which give one for each token.
        adapters: Of a model whose steps with adapters are captured. Without, a step is one without.
        states: Of the model's recurrent layers, if it has some; then steps are of decodes alone.
    """

    def __init__(
        self,
        model: Steppable,
        buckets: Buckets,
        device: torch.device,
        recorder: Recorder | None = None,
        last: LastTokens | None = None,
        kinds: Sequence[DrawKind] = (),
        most_samples: int | None = None,
        adapters: AdaptedModules | None = None,
        states: States | None = None,
    ) -> None:
        self._model = model
        self._states = states
        self._device = device
        self._most_samples = most_samples
        self._adapters = adapters
        self._buckets = buckets
        self._recorder: Recorder | None = recorder or CudaRecorder(device)
        self._last = last
        self._buffer = PackedBuffer(device)
        self._graphs: dict[int, CapturedStep] = {}
        self._draws = DrawGraphs(kinds, last)
        self._notes: list[str] = []
        self._launched: dict[int, str] = {}  # by bucket, why

    def mixed(self, buckets: Buckets, most_samples: int) -> StepGraphs:
        """Captures of steps of anything, of the same model and in the same memory."""
        recorder, last = self._recorder, self._last
        return StepGraphs(self._model, buckets, self._device, recorder, last, most_samples=most_samples)

    def adapted(self, buckets: Buckets, adapters: AdaptedModules) -> StepGraphs:
        """Captures of decodes with adapters, of the same model and in the same memory."""
        recorder, last = self._recorder, self._last
        return StepGraphs(self._model, buckets, self._device, recorder, last, adapters=adapters, states=self._states)

    @property
    def adapters(self) -> AdaptedModules | None:
        """As given."""
        return self._adapters

    @property
    def notes(self) -> list[str]:
        """What did not work, or is not worth it, in words."""
        return [*self._notes, *self._launched.values()]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The buckets, rising."""
        return self._buckets.sizes

    @property
    def kinds(self) -> tuple[DrawKind, ...]:
        """The draws that can be captured, as far as is known."""
        return self._draws.kinds

    @property
    def capturable(self) -> bool:
        """Whether steps can be captured, as far as is known."""
        return self._recorder is not None

    @property
    def captured(self) -> tuple[int, ...]:
        """The buckets for which there is a graph."""
        return tuple(sorted(self._graphs))

    @property
    def captured_draws(self) -> tuple[tuple[int, DrawKind], ...]:
        """The buckets and kinds for which there is a graph of a draw."""
        return self._draws.captured

    def capture(self, size: int) -> bool:
        """Captures one bucket, of a step that attends to nothing and writes nowhere; whether that was possible.

        The largest comes first, so that the others fit into its memory. A step whose bucket has no graph is padded to
        the next one that has.
        """
        if self._recorder is None:
            return False
        step = padding(size)
        try:
            self._graphs[size] = self._recorded(self._recorder, step, self._sections(step))
        except Exception as error:
            self._give_up(error)
            return False
        return True

    def keep_if_faster(self, size: int, seconds: Seconds) -> None:
        """Lets go of a bucket's graph if the steps that are padded to it are launched in less time, as large ones are.

        What is launched has as many tokens as such a step has on average. Neither attends to anything.
        """
        smaller = max((other for other in self.sizes if other < size), default=0)
        fewer, reason = padding((smaller + size) // 2 + 1), None
        try:
            with torch.inference_mode():
                launched = seconds(lambda: self._launch(fewer))
                self._send(step := padding(size), self._sections(step))
                replayed = seconds(self._graphs[size].replay)
            if replayed > launched:
                reason = f"measured {launched * 1e3:.3g} ms (replayed: {replayed * 1e3:.3g})"
        except Exception as error:  # whatever a driver raises
            reason = reason_of(error)
        if reason is not None:
            self._graphs.pop(size, None)
            self._launched[size] = (
                f"graphs: steps with prompts of {smaller + 1} to {size} tokens are launched: {reason}"
            )

    def capture_draw(self, size: int, kind: DrawKind) -> bool:
        """Captures a draw behind a bucket's graph, from logits and settings of a step of padding; whether it could be.

        A draw without a graph is launched.
        """
        if self._recorder is None or kind not in self._draws.kinds:
            return False
        try:
            with torch.inference_mode():
                step = padding(size)
                self._send(step, self._sections(step))
                self._draws.capture(self._recorder, size, kind, self._graphs[size])
        except Exception as error:
            self._draws.kinds = ()
            what = "no further draws are captured" if self._draws.captured else "draws cannot be captured"
            self._notes.append(f"graphs: {what}, they are launched: {reason_of(error)}")
            return False
        return True

    def contest(self, size: int, better: Callable[[Callable[[], None], Callable[[], None]], bool]) -> bool:
        """Captures a bucket again, of a model that has come to run it in another way, and keeps one of the two graphs.

        Args:
            size: A bucket that has a graph.
            better: Takes what replays the old one and what replays the new one; whether the new one is to stay.

        Returns:
            Whether it does. If it cannot be captured, the error is raised and the old one stays.
        """
        assert self._recorder is not None
        step = padding(size)
        new = self._recorded(self._recorder, step, self._sections(step))
        kept = better(self._graphs[size].replay, new.replay)
        if kept:
            self._graphs[size] = new
            self._redraw(size)
        return kept

    def renew(self, size: int) -> bool:
        """Captures a bucket anew if memory that its graph refers to was replaced since; whether that was possible.

        The old graph must not be replayed: where it looks for a step lies that of another time, which is written again.
        """
        step = padding(size)
        sections = self._sections(step)
        with torch.inference_mode():
            key, _ = self._send(step, sections)
        return self._graphs[size].key == key or self._replace(size, step, sections)

    def run(self, batch: StepBatch, sampler: Sampler | None = None) -> Ran | None:
        """Queues a step by a graph; None where none fits, and then nothing was done.

        Args:
            batch: The step.
            sampler: Knows what its rows ask for. Without, no tokens are drawn.
        """
        if not self._graphs or not self._takes(batch):
            return None
        size = self._size(len(batch.token_ids))
        rows = len(batch.sample_index)
        if size is None or rows > self._samples(size):
            return None
        step = padded(batch, size)
        kind, sections = None, self._sections(step)
        if sampler is not None:
            slots, positions = batch.sample_slots, batch.sample_positions
            kind = sampler.kind(slots, positions)
            sections |= sampler.settings(kind, slots, positions, self._samples(size))
        key, sent = self._send(step, sections)
        captured = self._graphs[size]
        if captured.key != key:
            # Where there are drafts, how many tokens its rows have decides what is launched: the next step has others.
            # Else memory that the graph refers to was replaced by a larger one, and this is the first step with that.
            replaced = batch.draft_lengths is None and self._replace(size, step, sections)
            if batch.draft_lengths is None:  # what was sent for the capture lies in its place
                _, sent = self._send(_without_copies(step), sections)
            if not replaced:
                return Ran(self._forward(sent)[:rows], self._slots(sent)[:rows])
            captured = self._graphs[size]
        captured.replay()
        slots_there, logits = self._slots(sent)[:rows], captured.logits[:rows]
        if kind is None:
            return Ran(logits, slots_there)
        # A copy: on its way to the host it must outlive the next step, which writes to the same place.
        return Ran(logits, slots_there, self._draws.drawn(size, kind, captured, rows).clone())

    def clear(self) -> None:
        """Lets go of all graphs: the memory that they refer to is about to be freed. They can be captured anew."""
        self._graphs.clear()
        self._draws.clear()
        self._launched.clear()

    def _launch(self, step: StepBatch) -> None:
        _, sent = self._send(step, self._sections(step))
        self._step(sent)

    def _size(self, tokens: int) -> int | None:
        size = self._buckets.of(tokens)
        if size is None or size in self._graphs:
            return size
        if self._most_samples is not None:  # more padding may take longer than launching does
            return None
        return min((captured for captured in self._graphs if captured >= tokens), default=None)

    def _takes(self, batch: StepBatch) -> bool:
        """Whether it is a step of the kind that is captured."""
        if (batch.adapters is None) != (self._adapters is None):
            return False
        if self._states is not None and batch.draft_lengths is not None:  # its rows are computed in waves
            return False
        if self._most_samples is None:
            return batch.num_decodes == len(batch.context_lens) and len(batch.sample_index) <= len(batch.token_ids)
        return batch.draft_lengths is None

    def _samples(self, size: int) -> int:
        """How many rows of logits a graph of so many tokens gives."""
        return size if self._most_samples is None else min(size, self._most_samples)

    def _give_up(self, error: Exception) -> None:
        """Captures no further steps."""
        self._recorder = None
        what = "no further steps are captured" if self._graphs else "the model cannot be captured, it runs without"
        if self._most_samples is not None:
            what = f"no {'further ' if self._graphs else ''}steps with prompts are captured"
        if self._adapters is not None:
            what = f"no {'further ' if self._graphs else ''}steps with adapters are captured"
        self._notes.append(f"graphs: {what}: {reason_of(error)}")

    def _recorded(self, recorder: Recorder, step: StepBatch, sections: Mapping[str, NDArray[Any]]) -> CapturedStep:
        with torch.inference_mode():
            key, sent = self._send(step, sections)
            replay, (logits, likeliest) = recorder.record(lambda: self._step(sent))
        return CapturedStep(key, replay, logits, likeliest, sent)

    def _redraw(self, size: int) -> None:
        """Captures the draws behind a bucket's graph anew."""
        kinds = self._draws.of(size)
        self._draws.forget(size)
        for kind in kinds:
            self.capture_draw(size, kind)

    def _replace(self, size: int, step: StepBatch, sections: Mapping[str, NDArray[Any]]) -> bool:
        """Captures a bucket anew, with a step that is about to be run.

        While that is captured it is run, more than once; so its rows store what they draw, and their states, nowhere.
        """
        del self._graphs[size]
        if self._recorder is None:
            return False
        sections = dict(sections)
        if self._last is not None:
            sections["slots"] = np.full(self._samples(size), self._last.nowhere)
        if self._states is not None:
            sections["states"] = np.full(size, self._states.nowhere)
        try:
            self._graphs[size] = self._recorded(self._recorder, _without_copies(step), sections)
        except Exception as error:
            self.clear()  # the others refer to what was replaced, too
            self._give_up(error)
            return False
        self._redraw(size)
        return True

    def _sections(self, step: StepBatch) -> dict[str, NDArray[Any]]:
        """What a step brings to the device, greedy; where each section goes depends on the number of tokens alone."""
        rows, samples = self._samples(len(step.token_ids)), len(step.sample_index)
        index = np.zeros(rows, np.int64)
        index[:samples] = step.sample_index
        sections: dict[str, NDArray[Any]] = {"ids": step.token_ids, "positions": step.positions, "index": index}
        if self._last is not None:
            slots = np.full(rows, self._last.nowhere)
            slots[: len(step.sample_slots)] = step.sample_slots
            sections |= {"sources": sources_of(step), "slots": slots}
        if self._adapters is not None:
            sections["adapters"] = places_of(step, len(step.token_ids))
        if self._states is not None:
            sections["states"] = self._states.places_of(step, len(step.token_ids))
        return sections | token_draw.sections(rows)

    def _send(self, step: StepBatch, sections: Mapping[str, NDArray[Any]]) -> tuple[Hashable, dict[str, torch.Tensor]]:
        """One copy to the device, where the attention's plan can take the sections along; else two.

        Returns:
            Equal for steps that launch the same on the same addresses; and the sections on the device.
        """
        plan, sent = self._model.begin_with(step, sections, True, self._most_samples is not None)
        key: Hashable = getattr(plan, "graph_key", None)
        if sent is not None:
            return key, sent
        sent = self._buffer.send_sections(sections)
        return (key, self._buffer.generation), sent

    def _step(self, sent: Mapping[str, torch.Tensor]) -> Tensors:
        logits = self._forward(sent)
        likeliest = argmax(logits)
        self._store(sent, likeliest)
        return logits, likeliest

    def _forward(self, sent: Mapping[str, torch.Tensor]) -> torch.Tensor:
        ids, positions, index = (sent[name].long() for name in ("ids", "positions", "index"))
        if self._last is not None:
            ids = self._last.fill(ids, sent["sources"])
        with contextlib.ExitStack() as around:
            if self._adapters is not None:
                around.enter_context(self._adapters.looked_up(sent["adapters"]))
            if self._states is not None:
                around.enter_context(self._states.decoding(sent["states"]))
            return self._model.forward(ids[None], positions[None], index)

    def _store(self, sent: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> None:
        if self._last is not None:
            self._last.store(sent["slots"], tokens)

    def _slots(self, sent: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return sent["index"][:0] if self._last is None else sent["slots"]


def graphs_for(
    model: Steppable,
    backend: AttentionBackend,
    sequences: int,
    device: torch.device,
    last: LastTokens | None = None,
    waits: str | None = None,
    states: States | None = None,
) -> tuple[StepGraphs | None, tuple[str, ...]]:
    """Graphs, none of them captured yet, of the decodes of up to `sequences` sequences.

    Without last tokens on the device nobody draws behind a graph, and draws cannot be captured. If it is known why a
    forward `waits`, nothing can, and it is not tried: a capture that fails costs memory.

    Returns:
        The graphs, or None where device or attention do not allow them; and what does not work, in words.
    """
    if device.type != "cuda":
        return None, ()
    if not is_capturable(backend):
        return None, (f"graphs: the {backend.name} attention plans in tensors of changing sizes; none are captured",)
    if waits is not None:
        return None, (f"graphs: {waits}; none are captured",)
    kinds = () if last is None else FILTERED
    return StepGraphs(model, Buckets.upto(sequences), device, last=last, kinds=kinds, states=states), ()


def _without_copies(step: StepBatch) -> StepBatch:
    """A step that was sent once already."""
    return dataclasses.replace(step, copies=NO_PAIRS, state_copies=NO_PAIRS)


def reason_of(error: Exception) -> str:
    """What an error says, in a line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
