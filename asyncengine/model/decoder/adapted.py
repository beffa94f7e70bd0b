"""Adapters in the order in which the compiled step reads them. What is prepared is never changed; the rest is owned by
the step thread.

What is added to a product is ``up @ (down @ x)``, in the place of the product's own outputs. `down` is stored as a
small matrix of the compiled step, `up` as float32, an output's lane beside its neighbours'. Layers that the compiled
step has put together, as queries, keys and values, have their factors put together as well: first all of `down`, then
for each group of outputs the part of its numbers that it takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asyncengine.model.adapters import lora
from asyncengine.model.adapters.lora import Lora
from asyncengine.model.decoder.parts import Projection
from asyncengine.model.decoder.weights import MatrixStruct, PackedMatrix, Place
from asyncengine.step.adapters import NO_ADAPTER
from asyncengine.step.batch import Int32, Int64, StepBatch

MATRICES = ("qkv", "output", "gate_up", "down")
"""Of a layer, in the order of `Place` in decoder.cpp."""
_MOST = 64
"""Tokens in one piece of work."""


class AdaptedMatrixStruct(ctypes.Structure):
    """As `AdaptedMatrix` in decoder.cpp."""

    _fields_ = (
        ("down", MatrixStruct), ("up", ctypes.c_void_p), ("first", ctypes.c_void_p), ("rank", ctypes.c_int64),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One of the projections that a matrix is made of.

    Attributes:
        name: Of the linear layer in the model.
        projection: Which of that layer's outputs.
        place: Where the matrix has them.
    """

    name: str
    projection: Projection
    place: Place


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter for the compiled step.

    Attributes:
        structs: (layers * 4,) what is added to each matrix.
        held: The memory that they point to.
    """

    structs: Any
    held: tuple[object, ...]


class CompiledFormat:
    """As `asyncengine.step.model.AdapterFormat`.

    Args:
        library: The compiled code.
        dtype: In which `down` is stored.
        layers: Outputs and inputs of each linear layer, by its name.
        matrices: The parts of each matrix of each layer, by the matrix's name in `MATRICES`.
    """

    def __init__(
        self,
        library: Any,
        dtype: torch.dtype,
        layers: Mapping[str, tuple[int, int]],
        matrices: Sequence[Mapping[str, Sequence[Part]]],
    ) -> None:
        self._library = library
        self._dtype = dtype
        self._layers = layers
        self._matrices = matrices

    def prepare(self, source: Any, config: Mapping[str, Any] | None) -> PackedAdapter:
        """As the protocol says."""
        adapter = lora.read(source, config, self._layers)
        structs = (AdaptedMatrixStruct * (len(self._matrices) * len(MATRICES)))()
        held: list[object] = []
        for layer, matrices in enumerate(self._matrices):
            for at, name in enumerate(MATRICES):
                parts = [part for part in matrices.get(name, ()) if part.name in adapter]
                if parts:
                    struct, memory = self._packed(matrices[name], parts, adapter)
                    structs[len(MATRICES) * layer + at] = struct
                    held += memory
        return PackedAdapter(structs, tuple(held))

    def _packed(
        self, all_parts: Sequence[Part], parts: Sequence[Part], adapter: Lora
    ) -> tuple[AdaptedMatrixStruct, list[object]]:
        lanes = int(self._library.decoder_lanes())
        rank = max(adapter[part.name].rank for part in parts)
        inputs = adapter[parts[0].name].down.shape[1]
        stacked = torch.zeros(len(parts), rank, inputs, dtype=self._dtype)
        groups = sum(part.place.groups for part in all_parts)
        up = torch.zeros(groups, rank, lanes, dtype=torch.float32)
        first = np.full(groups, -1, dtype=np.int32)
        for number, part in enumerate(parts):
            own = adapter[part.name]
            stacked[number, : own.rank] = own.down
            rows = part.projection.taken(own.up)
            place = part.place
            padded = torch.zeros(place.groups * lanes, own.rank, dtype=torch.float32)
            padded[: len(rows)] = rows
            end = place.start + place.groups * place.step
            up[place.start : end : place.step, : own.rank] = padded.view(place.groups, lanes, own.rank).mT
            first[place.start : end : place.step] = number * rank
        down = PackedMatrix(self._library, [stacked.flatten(0, 1)], [None])
        return AdaptedMatrixStruct(down.struct, up.data_ptr(), first.ctypes.data, rank), [down, up, first]


class CompiledAdapters:
    """The adapters that a compiled step may be asked for.

    Attributes:
        format: Reads them.
    """

    def __init__(self, format: CompiledFormat) -> None:
        self.format = format
        self._packed: dict[int, PackedAdapter] = {}
        self._pointers = (ctypes.c_void_p * 0)()

    def put(self, index: int, adapter: PackedAdapter) -> None:
        """As `AdaptableModel.put_adapter`."""
        self._packed[index] = adapter
        self._point()

    def remove(self, index: int) -> None:
        """As `AdaptableModel.remove_adapter`."""
        del self._packed[index]
        self._point()

    def move(self, device: torch.device) -> None:
        """They are where they are needed."""

    def _point(self) -> None:
        self._pointers = (ctypes.c_void_p * (max(self._packed, default=-1) + 1))()
        for index, adapter in self._packed.items():
            self._pointers[index] = ctypes.addressof(adapter.structs)

    @property
    def address(self) -> int:
        """Of the addresses of each adapter's structures."""
        return ctypes.addressof(self._pointers)


def pieces_of(batch: StepBatch) -> tuple[Int32, Int64]:
    """The work that the adapters of a step's rows make.

    Returns:
        (T,) index of each token's adapter, and (P, 3) of each piece its adapter, its first token and how many it has:
        neighbours with the same adapter, at most 64.
    """
    assert batch.adapters is not None
    tokens = np.repeat(batch.adapters, np.diff(batch.query_start)).astype(np.int32)
    every = np.arange(len(tokens), dtype=np.int64)
    changes = np.append(True, tokens[1:] != tokens[:-1])
    run = np.maximum.accumulate(np.where(changes, every, 0))
    begins = np.flatnonzero(changes | ((every - run) % _MOST == 0))
    counts = np.diff(begins, append=len(tokens))
    adapted = tokens[begins] != NO_ADAPTER
    return tokens, np.stack([tokens[begins].astype(np.int64), begins, counts], axis=1)[adapted].copy()
