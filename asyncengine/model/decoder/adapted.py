"""Adapters in the order in which the compiled step reads them. What is prepared is never changed; the rest is owned by
the step thread.

What is added to a product is ``up @ (down @ x)``, before anything else becomes of the product's outputs. Layers that
the compiled step has put together, as queries, keys and values, have their factors put together as well: `down` of one
after that of the other, and for each group of outputs the first of the numbers that it takes. Both are stored in the
model's dtype; what is between them is float32 and has the adapter's scaling.
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

MATRICES = ("qkv", "output", "gate_up", "down", "router", "query")
"""Of a layer, in the order of `Place` in decoder.cpp."""
_MOST = 64
"""Tokens in one piece of work."""


class AdaptedMatrixStruct(ctypes.Structure):
    """As `AdaptedMatrix` in decoder.cpp."""

    _fields_ = (
        ("down", MatrixStruct), ("up", MatrixStruct), ("first", ctypes.c_void_p),
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
        structs: (layers * 6,) what is added to each matrix.
        held: The memory that they point to.
    """

    structs: Any
    held: tuple[object, ...]


class CompiledFormat:
    """As `asyncengine.step.model.AdapterFormat`.

    Args:
        library: The compiled code.
        dtype: In which factors are stored.
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
        adapter = lora.read(source, config, self._layers, self._dtype)
        structs = (AdaptedMatrixStruct * (len(self._matrices) * len(MATRICES)))()
        held: list[object] = []
        for layer, matrices in enumerate(self._matrices):
            for at, name in enumerate(MATRICES):
                parts = matrices.get(name, ())
                if any(part.name in adapter for part in parts):
                    struct, memory = self._packed(parts, adapter)
                    structs[len(MATRICES) * layer + at] = struct
                    held += memory
        return PackedAdapter(structs, tuple(held))

    def _packed(self, parts: Sequence[Part], adapter: Lora) -> tuple[AdaptedMatrixStruct, list[object]]:
        """What is added to the matrix that these parts make."""
        lanes = int(self._library.decoder_lanes())
        adapted = [adapter[part.name] for part in parts if part.name in adapter]
        rank = max(own.rank for own in adapted)
        rank += rank % 2  # numbers are stored in pairs
        downs = torch.zeros(len(adapted), rank, adapted[0].down.shape[1], dtype=self._dtype)
        # Every dtype is given: transformers changes the whole process's default while it makes a model.
        scalings = torch.zeros(-(-downs.shape[0] * rank // lanes) * lanes, dtype=torch.float32)
        ups, first = [], np.full(sum(part.place.groups for part in parts), -1, dtype=np.int32)
        number = 0
        for part in parts:
            own, place = adapter.get(part.name), part.place
            if own is None:
                ups.append(torch.zeros(place.groups * lanes, rank, dtype=self._dtype))
                continue
            downs[number, : own.rank] = own.down
            scalings[number * rank :][: own.rank] = own.scaling
            taken = part.projection.taken(own.up)
            ups.append(torch.zeros(len(taken), rank, dtype=self._dtype))
            ups[-1][:, : own.rank] = taken
            first[place.start : place.start + place.groups * place.step : place.step] = number * rank
            number += 1
        down = PackedMatrix(self._library, [downs.flatten(0, 1)], [None])
        up = PackedMatrix(self._library, ups, [None] * len(ups), turns=parts[0].place.step)
        down.struct.scales = scalings.data_ptr()
        return AdaptedMatrixStruct(down.struct, up.struct, first.ctypes.data), [down, up, scalings, first]


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
