"""The states of a model's recurrent layers, for all sequences, and how the layers use them. Owned by the step thread.

What the layers compute is transformers' own: each is called as `generate` would call it, once with all sequences that
decode, as a batch of one token each, and once for each piece of a prompt. Its first and last linear layers, which look
at no neighbours, are taken out of that and computed for all tokens of the step at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from asyncengine.model.recurrent.drafted_rows import DraftedRows
from asyncengine.model.recurrent.functions import CPU, Present, forward_with
from asyncengine.model.recurrent.layer_run import LayerRun, Outside, Tensors
from asyncengine.model.recurrent.recorded import Key, RecurrentLayer, RecurrentSpec
from asyncengine.model.recurrent.step_rows import StepRows, cut, late_saves
from asyncengine.step.batch import Int64, StepBatch
from asyncengine.step.limits import Limits

_ALIGNMENT = 64
"""States begin at multiples of so many numbers, which are whole cache lines."""


def state_bytes(specs: Iterable[RecurrentSpec], dtype: torch.dtype) -> int:
    """Bytes of the states of one sequence, of a model in a dtype."""
    return sum(state.nbytes(dtype) for spec in specs for state in spec.states)


def bytes_per_place(layers: Iterable[RecurrentLayer], dtype: torch.dtype) -> int:
    """The same, of layers."""
    return state_bytes((layer.spec for layer in layers), dtype)


class States:
    """The states of all recurrent layers of a model.

    A place is a row of each tensor: first the slots' own, then those of states that are kept, then those of states that
    a step with drafts sets aside, then one that stands for nowhere.

    Args:
        layers: In the order of execution.
        limits: Number of slots, of states that are kept, and of those that are set aside.
        dtype: The model's.
        device: Theirs.
        trying: Whether to find out which layers do not continue, and whose functions cannot work in place.

    Attributes:
        rows: Of the present step.
        places: (rows,) int64 places of the states of those that decode, on the device.
        nowhere: The place that nobody reads.
        alone: Names of layers that were found not to continue.
        apart: Of those whose functions were found not to work in place, and why not.
    """

    def __init__(
        self,
        layers: list[RecurrentLayer],
        limits: Limits,
        dtype: torch.dtype,
        device: torch.device,
        trying: bool = False,
    ) -> None:
        self._layers = layers
        self._dtype = dtype
        self._device = device
        self._rows: dict[
            torch.dtype, torch.Tensor
        ] = {}  # (places, numbers): all that is kept of a sequence, side by side
        self._tensors: list[Tensors] = []  # of each layer, views of these
        self._trying = trying
        self._aside = limits.max_num_sequence + (limits.kept_states or 0)
        self.nowhere = self._aside + limits.drafted_states
        self.rows: StepRows | None = None
        self.places = torch.empty(0, dtype=torch.int64, device=device)
        self._late: tuple[tuple[int, int], ...] = ()
        self._drafted: DraftedRows | None = None
        self.alone: set[str] = set()
        self.apart: dict[str, str] = {}
        self._tried: set[str] = set()

    def allocate(self) -> None:
        """Makes the tensors, of zeros, and lets the layers use them."""
        lengths: dict[torch.dtype, int] = {}
        starts: list[dict[Key, int]] = []
        for layer in self._layers:
            starts.append({})
            for state in layer.spec.states:
                dtype = state.dtype or self._dtype
                starts[-1][state.key] = lengths.setdefault(dtype, 0)
                lengths[dtype] += -(-math.prod(state.shape) // _ALIGNMENT) * _ALIGNMENT
        self._rows = {
            dtype: torch.zeros((self.nowhere + 1, length), dtype=dtype, device=self._device)
            for dtype, length in lengths.items()
        }
        for layer, of_layer in zip(self._layers, starts, strict=True):
            tensors = {}
            for state in layer.spec.states:
                start, rows = of_layer[state.key], self._rows[state.dtype or self._dtype]
                own = rows[:, start : start + math.prod(state.shape)]
                tensors[state.key] = own.view(self.nowhere + 1, *state.shape)
            self._tensors.append(tensors)
            layer.module.forward = self._forward(layer, tensors)

    def free(self) -> None:
        """Lets the tensors go; the layers are as transformers made them."""
        self._tensors, self._rows, self.rows, self._drafted = [], {}, None, None
        for layer in self._layers:
            layer.module.__dict__.pop("forward", None)

    def begin(self, batch: StepBatch, captured: bool = False) -> None:
        """Prepares a step: copies states, then cuts it, unless that is done in what was `captured`."""
        self._copy(batch.state_copies.tolist())
        self._drafted = None
        if batch.draft_lengths is not None:
            assert not captured and int(batch.draft_lengths.sum()) <= self.nowhere - self._aside
            self._drafted = DraftedRows(batch, self._aside, self.nowhere, self._device)
        self.rows = None if captured else cut(batch, self._drafted)
        self._late = late_saves(batch)

    def end(self) -> None:
        """Keeps states as they are behind the step."""
        self._copy(self._late)
        self._late = ()

    def take(self, taken: Int64) -> None:
        """Ends a step with drafts: each row's state is the one behind the last of its tokens that count.

        Args:
            taken: As `StepTokens.taken`.
        """
        assert self._drafted is not None
        self._copy(self._drafted.taken(taken))
        self._drafted = None

    def places_of(self, batch: StepBatch, tokens: int) -> Int64:
        """(tokens,) the place of each row of a step of decodes, padded to so many."""
        places = np.full(tokens, self.nowhere, np.int64)
        if batch.slots is not None:
            places[: len(batch.slots)] = batch.slots
        return places

    @contextlib.contextmanager
    def decoding(self, places: torch.Tensor) -> Iterator[None]:
        """Within the block the model is run once, or captured, with decodes of which these are the places."""
        self.rows, self.places = StepRows(len(places)), places.long()
        try:
            yield
        finally:
            self.rows = None

    def _copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        for source, to in pairs:
            for rows in self._rows.values():
                rows[to].copy_(rows[source])

    def _forward(self, layer: RecurrentLayer, tensors: Tensors) -> Callable[..., Any]:
        present = Present()
        functions = layer.functions
        if functions is None:
            functions = CPU if self._device.type == "cpu" else {}
        plain = forward_with(layer.module, functions, present)
        trying, name = self._trying and layer.spec.continues, layer.name
        outside = Outside.all_of(layer)

        def forward(*args: Any, **kwargs: Any) -> Any:
            rows = self.rows
            assert rows is not None
            run = LayerRun(layer, outside, plain, present, tensors, args, kwargs)
            if trying and name not in self.alone and not run.continues(rows):
                self.alone.add(name)
            if self._trying and layer.in_place and name not in self._tried:
                self._tried.add(name)
                if (reason := run.differs_in_place()) is not None:
                    self.apart[name] = reason
            continues = layer.spec.continues and name not in self.alone
            return run.over(rows, self.places, continues, layer.in_place and name not in self.apart)

        return forward
