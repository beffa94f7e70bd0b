"""Keys and values by block and token (NHD): the layout that torch can index and that other projects' kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from asyncengine.model.attention import fp8
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.device_copy import to_device
from asyncengine.step.batch import StepBatch


@dataclass(frozen=True, slots=True)
class TokenMajorCache:
    """The KV cache of one layer.

    Attributes:
        keys: (blocks, page size, kv heads, key_dim).
        values: (blocks, page size, kv heads, value_dim); a part of `keys` where values are in keys.
        stored: Those that have memory of their own.
    """

    keys: torch.Tensor
    values: torch.Tensor
    stored: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Writes:
    """Where a step's keys and values go.

    Attributes:
        tokens: Indices of the tokens that are written, or None for as many as there are slots, from the first.
        slots: Where each of them goes.
    """

    tokens: torch.Tensor | None
    slots: torch.Tensor

    @classmethod
    def of(cls, batch: StepBatch, device: torch.device) -> Writes:
        """Those of a step. Nothing waits for the device."""
        written = np.flatnonzero(batch.slot_mapping >= 0)
        if len(written) == len(batch.slot_mapping):
            return cls(None, to_device(batch.slot_mapping.astype(np.int64), device))
        slots = batch.slot_mapping[written].astype(np.int64)
        return cls(to_device(written.astype(np.int64), device), to_device(slots, device))

    def write(self, cache: TokenMajorCache, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes (tokens, kv heads, dim) keys and values."""
        written = slice(len(self.slots)) if self.tokens is None else self.tokens
        for cached, given in zip(cache.stored, (key, value), strict=False):
            numbers = fp8.movable(fp8.stored(given[written], cached.dtype))
            fp8.movable(cached).flatten(0, 1).index_copy_(0, self.slots, numbers)


def numbers_kept(spec: LayerSpec) -> int:
    """How many numbers a layer keeps for each token and head, where values that are in keys are kept with these."""
    return spec.key_dim if spec.values_in_keys else spec.key_dim + spec.value_dim


class TokenMajorLayout:
    """The part of an `AttentionBackend` that follows from the layout."""

    def bytes_per_block(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block of one layer takes."""
        return page_size * spec.num_kv_heads * numbers_kept(spec) * dtype.itemsize

    def allocate(
        self, spec: LayerSpec, num_blocks: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> TokenMajorCache:
        """Returns the uninitialised KV cache of one layer."""
        shape = (num_blocks, page_size, spec.num_kv_heads)
        keys = torch.empty(*shape, spec.key_dim, dtype=dtype, device=device)
        if spec.values_in_keys:
            return TokenMajorCache(keys, keys[..., : spec.value_dim], (keys,))
        values = torch.empty(*shape, spec.value_dim, dtype=dtype, device=device)
        return TokenMajorCache(keys, values, (keys, values))

    def keys(self, spec: LayerSpec, cache: TokenMajorCache, blocks: torch.Tensor) -> torch.Tensor:
        """See `AttentionBackend.keys`."""
        return cache.keys[blocks].flatten(0, 1)

    def copy_blocks(self, caches: Sequence[TokenMajorCache], copies: torch.Tensor) -> None:
        """Copies whole blocks in every layer, all of them read before any is written; `copies` is (C, 2)."""
        for cache in caches:
            source, destination = copies.to(cache.keys.device).long().unbind(1)
            for numbers in map(fp8.movable, cache.stored):
                numbers.index_copy_(0, destination, numbers[source])
