"""Paged attention on the CPU: one compiled kernel that writes a step's keys and values and attends to them.

What the kernel does, and in which order the pages lie, is described at the top of paged_attention.cpp.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from asyncengine.model.attention import kernel
from asyncengine.model.attention.kernel import Kind
from asyncengine.model.attention.protocol import BackendUnavailableError, LayerSpec
from asyncengine.step.batch import Int32, Int64, StepBatch

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The structures Layer, Plan and Call of paged_attention.cpp.
_LAYER = struct.Struct("@2P8q2d")
_PLAN = struct.Struct("@6P4q")
_CALL = struct.Struct("@" + "P2q" * 3 + "3Pq")
# The kernel loads whole vectors, also where fewer dimensions are left: so far past the end it may read.
_SLACK = 64


class _Struct:
    """Bytes at a fixed address, for the kernel to read."""

    __slots__ = ("address", "buffer")

    def __init__(self, layout: struct.Struct) -> None:
        self.buffer = ctypes.create_string_buffer(layout.size)
        self.address = ctypes.addressof(self.buffer)


@dataclass(frozen=True, slots=True)
class CpuCache:
    """The KV cache of one layer.

    Attributes:
        keys: (blocks, kv heads, steps, page size, pair): a step is one key dimension, or two, beside each other.
        values: (blocks, kv heads, steps, value_dim, pair): a step is one token, or two.
        page_size: Tokens to a block.
        layers: The kernel's description of each layer that uses this cache: one, unless layers share keys and values.
    """

    keys: torch.Tensor
    values: torch.Tensor
    page_size: int
    layers: dict[LayerSpec, _Struct] = field(default_factory=dict)

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """Those that have memory of their own."""
        return self.keys, self.values

    def layer(self, spec: LayerSpec) -> _Struct:
        """Describes `spec` over this cache to the kernel."""
        if spec.scaling <= 0:  # the kernel takes the maximum before it scales
            raise BackendUnavailableError(f"the cpu attention back end cannot scale by {spec.scaling}")
        layer = _Struct(_LAYER)
        _LAYER.pack_into(
            layer.buffer,
            0,
            self.keys.data_ptr(),
            self.values.data_ptr(),
            _DTYPES[self.keys.dtype],
            self.page_size,
            spec.num_heads,
            spec.num_kv_heads,
            spec.key_dim,
            spec.value_dim,
            spec.sliding_window or 0,
            spec.looks_ahead,
            spec.scaling,
            spec.soft_cap or 0.0,
        )
        self.layers[spec] = layer
        return layer


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """The step's batch as the kernel reads it. Refers to the batch's arrays, which must not change meanwhile."""

    address: int
    num_tokens: int
    owner: tuple[_Struct, tuple[Int32 | Int64, ...]]


class CpuAttention:
    """The `AttentionBackend` for the CPU. The same token gets the same bits whatever else is in the batch.

    Args:
        kind: Whose library is built, where the user's cache has none that fits, and loaded at once; that for another
            dtype, when its first cache is allocated.
        progress: Called with a sentence before something slow happens.
        target: As `kernel.build` has it.

    Raises:
        BackendUnavailableError: A library cannot be built or loaded here; the message says why.
    """

    name = "cpu"

    def __init__(
        self,
        kind: Kind = "float32",
        progress: Callable[[str], None] | None = None,
        target: Sequence[str] | None = None,
    ) -> None:
        self._target = target
        self._libraries = {kind: kernel.load(kernel.build(kind, progress, target))}
        self._attends: dict[torch.dtype, Any] = {}
        self._call = _Struct(_CALL)

    def library(self, kind: Kind) -> ctypes.CDLL:
        """The compiled code for a kind of numbers.

        Raises:
            BackendUnavailableError: It cannot be built or loaded.
        """
        if kind not in self._libraries:
            self._libraries[kind] = kernel.load(kernel.build(kind, target=self._target))
        return self._libraries[kind]

    def _for(self, dtype: torch.dtype) -> ctypes.CDLL:
        """A library that attends in a dtype; those for narrower weights do so in bfloat16."""
        if dtype is torch.bfloat16:
            for kind in kernel.NARROW:
                if kind in self._libraries:
                    return self._libraries[kind]
        return self.library(kernel.DTYPES[dtype])

    def check_dtype(self, dtype: torch.dtype, device: torch.device) -> None:
        """As the protocol says."""
        if device.type != "cpu":
            raise BackendUnavailableError(f"the cpu attention back end cannot run on {device}")
        if dtype not in _DTYPES:
            known = ", ".join(str(name).removeprefix("torch.") for name in _DTYPES)
            raise BackendUnavailableError(f"the cpu attention back end stores {known}, not {dtype}")

    @staticmethod
    def bytes_per_block(spec: LayerSpec, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block of one layer takes."""
        key_steps, pair = _key_steps(spec, dtype)
        return spec.num_kv_heads * page_size * (key_steps * pair + spec.value_dim) * dtype.itemsize

    def allocate(
        self, spec: LayerSpec, num_blocks: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> CpuCache:
        """Returns the uninitialised KV cache of one layer; memory is taken as pages are first written.

        Raises:
            BackendUnavailableError: The kernel does not know the dtype or the device.
        """
        self.check_dtype(dtype, device)
        key_steps, pair = _key_steps(spec, dtype)
        value_pair = pair if page_size % pair == 0 else 1
        cache = CpuCache(
            self._empty((num_blocks, spec.num_kv_heads, key_steps, page_size, pair), dtype),
            self._empty((num_blocks, spec.num_kv_heads, page_size // value_pair, spec.value_dim, value_pair), dtype),
            page_size,
        )
        cache.layer(spec)
        return cache

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        elements = int(np.prod(shape))
        memory = torch.empty(elements + _SLACK, dtype=dtype)
        self._for(dtype).paged_attention_advise(memory.data_ptr(), memory.nbytes)
        return memory[:elements].view(shape)

    def plan(self, batch: StepBatch, page_size: int, device: torch.device) -> CpuPlan:
        """Hands the batch's arrays to the kernel, without copying them."""
        query_start = np.ascontiguousarray(batch.query_start, np.int32)
        context_lens = np.ascontiguousarray(batch.context_lens, np.int32)
        slots = np.ascontiguousarray(batch.slot_mapping, np.int64)
        tables = batch.block_tables
        if tables.dtype != np.int32 or tables.strides[-1] != tables.itemsize:
            tables = np.ascontiguousarray(tables, np.int32)
        # Rows in order of falling work, so that the threads end together.
        queries = query_start[1:] - query_start[:-1]
        order = np.argsort(-(queries.astype(np.int64) * (context_lens + queries)), kind="stable")
        reach = None if batch.reach is None else np.ascontiguousarray(batch.reach, np.int32)
        arrays = (query_start, context_lens, tables, slots, order)
        rows, tokens = len(context_lens), int(query_start[-1])
        plan = _Struct(_PLAN)
        _PLAN.pack_into(
            plan.buffer,
            0,
            *(array.ctypes.data for array in arrays),
            0 if reach is None else reach.ctypes.data,
            tables.strides[0] // tables.itemsize,
            rows,
            tokens,
            torch.get_num_threads(),
        )
        return CpuPlan(plan.address, tokens, (plan, arrays if reach is None else (*arrays, reach)))

    def attend(
        self,
        spec: LayerSpec,
        cache: CpuCache,
        plan: CpuPlan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`. One call of the kernel, which releases the GIL."""
        dtype, wanted = cache.keys.dtype, query.dtype
        query, key, value = _readable(query, dtype), _readable(key, dtype), _readable(value, dtype)
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        if bias is not None:
            bias = bias.contiguous()
        tokens = query.shape[0]
        output = torch.empty((tokens, spec.num_heads, spec.value_dim), dtype=dtype)
        if tokens > plan.num_tokens:  # the model was padded
            output[plan.num_tokens :] = 0
        query_token, query_head, _ = query.stride()
        key_token, key_head, _ = key.stride()
        value_token, value_head, _ = value.stride()
        _CALL.pack_into(
            self._call.buffer,
            0,
            query.data_ptr(),
            query_token,
            query_head,
            key.data_ptr(),
            key_token,
            key_head,
            value.data_ptr(),
            value_token,
            value_head,
            0 if sinks is None else sinks.data_ptr(),
            output.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            spec.distances,
        )
        layer = cache.layers.get(spec) or cache.layer(spec)
        attend = self._attends.get(dtype)
        if attend is None:
            attend = self._attends[dtype] = self._for(dtype).paged_attention
        if attend(layer.address, plan.address, self._call.address):
            raise MemoryError("no memory for the attention kernel's scratch space")
        return output if wanted is dtype else output.to(wanted)

    def keys(self, spec: LayerSpec, cache: CpuCache, blocks: torch.Tensor) -> torch.Tensor:
        """See `AttentionBackend.keys`."""
        by_place = cache.keys[blocks].permute(0, 3, 1, 2, 4)  # (blocks, page size, kv heads, steps, pair)
        return by_place.flatten(3).flatten(0, 1)[..., : spec.key_dim]

    def copy_blocks(self, caches: Sequence[CpuCache], copies: torch.Tensor) -> None:
        """Copies whole blocks in every layer, all of them read before any is written; `copies` is (C, 2)."""
        source, destination = copies.long().unbind(1)
        for cache in caches:
            cache.keys.index_copy_(0, destination, cache.keys[source])
            cache.values.index_copy_(0, destination, cache.values[source])


def _key_steps(spec: LayerSpec, dtype: torch.dtype) -> tuple[int, int]:
    """How many steps a key's dimensions make, and how many dimensions make a step."""
    pair = 2 if dtype is torch.bfloat16 else 1
    return -(-spec.key_dim // pair), pair


def _readable(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
