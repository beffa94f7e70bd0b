"""Where the factors of each adapter lie on a device, for kernels that look them up. Owned by the step thread."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from asyncengine.model.adapters.lora import LowRank

COLUMNS = 1024
"""Inputs that one program multiplies by the first factor."""
_TILE = 4096
"""Weights that a program has at hand."""
_PLACES = 16
"""For so many adapters at first."""
MOST_RANK = 1024
"""What a program can have at hand without spilling."""


class FactorTable:
    """For each layer and each adapter: addresses of both factors, the rank, and the scaling.

    Args:
        layers: The names of all.
        device: Where they are.

    Attributes:
        layers: Those that some adapter has had since there were none at all.
        rank: The largest of theirs, or the next power of two; above `MOST_RANK` nothing can be added.
        generation: Another one when what was captured of a step with adapters no longer computes what it should.

    Raises:
        ImportError: Triton is not there.
    """

    def __init__(self, layers: Iterable[str], device: torch.device) -> None:
        self._kernels: Any = importlib.import_module("asyncengine.model.adapters.kernels")
        self._index = {name: index for index, name in enumerate(layers)}
        self._device = device
        self.generation = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all adapters."""
        self.generation += 1
        self.layers = frozenset[str]()
        self.rank = self._places = 0
        self._kept: dict[int, Mapping[str, LowRank]] = {}  # memory that there are addresses of
        self._pointers = self._ranks = self._scalings = torch.empty(0)
        self._addresses: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._ranks_of: list[torch.Tensor] = []
        self._scalings_of: list[torch.Tensor] = []

    def put(self, place: int, adapter: Mapping[str, LowRank]) -> None:
        """Notes where an adapter lies; `LowRank.up` is stored as its transpose would be."""
        count = len(self._index)
        pointers, numbers = torch.zeros(2, count, dtype=torch.int64), torch.zeros(2, count)
        for name, factors in adapter.items():
            index = self._index[name]
            pointers[:, index] = torch.tensor([factors.down.data_ptr(), factors.up.data_ptr()])
            numbers[:, index] = torch.tensor([float(factors.rank), factors.scaling])
        there = pointers.to(self._device), numbers[0].int().to(self._device), numbers[1].to(self._device)
        rank = _power_of_two(max(8, *(factors.rank for factors in adapter.values())))
        layers = self.layers.union(adapter)
        if place >= self._places or rank > self.rank or layers != self.layers:
            self.generation += 1
        if place >= self._places:
            self._grow(max(_PLACES, _power_of_two(place + 1)))
        self.rank, self.layers = max(rank, self.rank), layers
        for table, column in zip(self._tables(), there, strict=True):
            table[..., place] = column
        self._kept[place] = adapter

    def remove(self, place: int) -> None:
        """Forgets an adapter."""
        self._ranks[:, place : place + 1] = 0
        del self._kept[place]

    def add(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor, which: torch.Tensor) -> None:
        """Adds to a layer's results what the tokens' adapters add.

        Args:
            name: The layer.
            inputs: (tokens, inputs).
            outputs: (tokens, outputs), each token's beside each other, of the same dtype as inputs and factors.
            which: (tokens,) int32 place of each token's adapter, -1 for none.
        """
        inputs = inputs if inputs.stride(1) == 1 else inputs.contiguous()
        tokens, width, wide = inputs.shape[0], inputs.shape[1], outputs.shape[1]
        index, rank, splits = self._index[name], self.rank, -(-width // COLUMNS)
        down, up = self._addresses[index]
        ranks = self._ranks_of[index]
        each, options = outputs_of(rank), options_of(rank)
        sums = torch.empty(tokens, splits, rank, dtype=torch.float32, device=inputs.device)
        self._kernels.shrink[(tokens, splits)](
            inputs, which, down, ranks, sums, inputs.stride(0), width, splits,
            RANK=rank, COLUMNS=COLUMNS, BLOCK=each, **options,
        )  # fmt: skip
        self._kernels.expand[(tokens, -(-wide // each))](
            sums, which, up, ranks, self._scalings_of[index], outputs, outputs.stride(0), wide, splits,
            RANK=rank, OUTPUTS=each, **options,
        )  # fmt: skip

    def _grow(self, places: int) -> None:
        """Makes room; what was noted stays, and everything does if there is no memory."""
        count = len(self._index)
        pointers = torch.zeros(2, count, places, dtype=torch.int64, device=self._device)
        ranks = torch.zeros(count, places, dtype=torch.int32, device=self._device)
        scalings = torch.zeros(count, places, device=self._device)
        if self._places:
            for table, earlier in zip((pointers, ranks, scalings), self._tables(), strict=True):
                table[..., : self._places] = earlier
        self._pointers, self._ranks, self._scalings, self._places = pointers, ranks, scalings, places
        # Each launch takes a layer's own part of them.
        self._addresses = list(zip(*(list(part) for part in self._pointers), strict=True))
        self._ranks_of, self._scalings_of = list(self._ranks), list(self._scalings)

    def _tables(self) -> tuple[torch.Tensor, ...]:
        return self._pointers, self._ranks, self._scalings


def outputs_of(rank: int) -> int:
    """How many outputs, or inputs, a program has at hand of factors of such a rank."""
    return max(_TILE // rank, 16)


def options_of(rank: int) -> dict[str, int]:
    """How the compiler is to make the kernels."""
    return {"num_warps": 4 if rank < 128 else 8}


def _power_of_two(number: int) -> int:
    """The smallest that is not below it."""
    return 1 << (number - 1).bit_length()
