"""Paged attention on CUDA: Triton kernels that work through a list which the host makes for each step.

The kernels are described at the top of triton_kernels.py, the list in work_list.py, the sizes of tiles in
triton_tiles.py and, where they were measured on a device, in tuned_tiles.py.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from asyncengine.model.attention import fp8, tuned_tiles, work_list
from asyncengine.model.attention.protocol import BackendUnavailableError, LayerSpec
from asyncengine.model.attention.token_major import numbers_kept
from asyncengine.model.attention.triton_launch import (
    MERGE_LAUNCH,
    WRITE_LAUNCH,
    attend_constants,
    launch_options,
    merge_constants,
    write_constants,
)
from asyncengine.model.attention.triton_tiles import Launch, Tiles, tiles_for
from asyncengine.model.attention.tuned_tiles import Key
from asyncengine.model.attention.work_list import Cut, WorkLists
from asyncengine.model.packed_buffer import PackedBuffer
from asyncengine.step.batch import StepBatch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, fp8.E4M3)
_FP8_CAPABILITY = (8, 9)
"""The first devices that turn fp8 into other numbers by themselves (Ada, Hopper)."""
# Programs of the persistent grid, for each multiprocessor. Small tiles wait for memory, so several share one.
_SHORT_PROGRAMS, _LONG_PROGRAMS = 4, 2
_PLAN = "plan"


@dataclass(frozen=True, slots=True)
class TritonCache:
    """The KV cache of one layer.

    Attributes:
        keys: (blocks, kv heads, page size, key_dim).
        values: (blocks, kv heads, page size, value_dim); a part of `keys` where values are in keys.
        stored: Those that have memory of their own.
    """

    keys: torch.Tensor
    values: torch.Tensor
    stored: tuple[torch.Tensor, ...]


@dataclass(slots=True)
class TritonPlan:
    """A step's work. It holds until the next one is made, which takes its place on the device.

    Attributes:
        batch: The step.
        page_size: Tokens to a block.
        tokens: Query tokens that it speaks of, padding included.
        cuts: How many kinds of layers it speaks of.
        launched: The work lists that are launched: 2 * cut is its short one, 2 * cut + 1 its long one.
        merged: Those of them whose parts are merged.
        start: Where its numbers lie in the back end's buffer; what the step brings besides lies before them.
        buffer: The numbers that the kernels read.
        graph_key: Equal for steps that launch the same kernels on the same addresses.
        mixed: Whether every work list is launched, and merged, be it empty.
    """

    batch: StepBatch
    page_size: int
    tokens: int
    cuts: int
    launched: tuple[int, ...]
    merged: tuple[int, ...]
    start: int
    buffer: torch.Tensor
    graph_key: tuple[Any, ...]
    mixed: bool = False


class TritonAttention:
    """The `AttentionBackend` for CUDA, also on the CPU if Triton interprets (slowly, for tests).

    A token gets the same bits whatever else is in the batch, and however its row is shared out.
    """

    name = "triton"

    def __init__(
        self, programs: int | None = None, parts_bytes: int | None = None, tuned: Mapping[Key, Tiles] | None = None
    ) -> None:
        """Imports the kernels.

        Args:
            programs: Programs that run side by side; as many as the device holds, if not given.
            parts_bytes: Memory for what programs hand on when they share a row's context; by the device's size, if not
                given.
            tuned: How layers are cut; what was found for the device, if not given. The others as the tables say.

        Raises:
            BackendUnavailableError: Triton is not there, or does not work.
        """
        try:
            self._kernels: Any = importlib.import_module("asyncengine.model.attention.triton_kernels")
        except Exception as error:  # whatever a package that does not fit the system raises when it is imported
            raise BackendUnavailableError(f"triton cannot be imported: {error}") from error
        self._given_programs = programs
        self._given_parts_bytes = parts_bytes
        self._parts_bytes = 0
        self._tuned = tuned
        self._cuts: list[Cut] = []
        self._buffer: PackedBuffer | None = None
        self._parts: torch.Tensor | None = None
        self._statistics: torch.Tensor | None = None
        self._max_parts = 0
        self._widest = 0
        self._heads = 0
        self._processors = 0
        self._generation = 0

    def check_dtype(self, dtype: torch.dtype, device: torch.device) -> None:
        """As the protocol says."""
        if dtype not in _DTYPES:
            known = ", ".join(str(name).removeprefix("torch.") for name in _DTYPES)
            raise BackendUnavailableError(f"the triton attention back end stores {known}, not {dtype}")
        if dtype is fp8.E4M3 and device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < _FP8_CAPABILITY:
                raise BackendUnavailableError(
                    "the triton attention back end stores fp8 on devices of compute capability 8.9 and later, not "
                    f"{capability[0]}.{capability[1]} ({torch.cuda.get_device_name(device)})"
                )

    def bytes_per_block(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block of one layer takes."""
        return page_size * spec.num_kv_heads * numbers_kept(spec) * dtype.itemsize

    def allocate(
        self, spec: LayerSpec, num_blocks: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> TritonCache:
        """Returns the uninitialised KV cache of one layer.

        Raises:
            BackendUnavailableError: The kernel does not know the dtype or the size of the heads.
        """
        self.check_dtype(dtype, device)
        self._prepare(device)
        if self._tiles(spec, dtype) is None:
            raise BackendUnavailableError(
                f"the triton attention back end has no tiles for heads of {spec.key_dim} and {spec.value_dim}"
            )
        if spec.scaling <= 0:
            raise BackendUnavailableError(f"the triton attention back end does not scale scores by {spec.scaling:g}")
        assert self._buffer is not None
        # Room for block tables in which every block stands twice. More, where rows share a prefix, makes it grow later.
        self._buffer.reserve((1 << 16) + 2 * num_blocks)
        self._know(spec, dtype)
        shape = (num_blocks, spec.num_kv_heads, page_size)
        keys = torch.empty(*shape, spec.key_dim, dtype=dtype, device=device)
        if spec.values_in_keys:
            return TritonCache(keys, keys[..., : spec.value_dim], (keys,))
        values = torch.empty(*shape, spec.value_dim, dtype=dtype, device=device)
        return TritonCache(keys, values, (keys, values))

    def _prepare(self, device: torch.device) -> None:
        """Makes what is made once for a device."""
        if self._buffer is not None:
            return
        self._buffer = PackedBuffer(device)
        properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        self._processors = 1 if properties is None else properties.multi_processor_count
        self._parts_bytes = self._given_parts_bytes or parts_bytes_of(
            0 if properties is None else properties.total_memory
        )
        self._look_up(device)

    def _look_up(self, device: torch.device) -> None:
        """Finds what was tuned on such a device."""
        if self._tuned is None:
            self._tuned = tuned_tiles.read(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}

    def _tiles(self, spec: LayerSpec, dtype: torch.dtype) -> Tiles | None:
        """How a layer is cut, or None where its heads are too large for the kernel."""
        assert self._tuned is not None
        biased = bool(spec.distances)
        found = None if biased else self._tuned.get((dtype.itemsize, spec.key_dim, spec.value_dim))
        return found or tiles_for(dtype.itemsize, spec.key_dim, spec.value_dim, spec.values_in_keys, biased)

    def _know(self, spec: LayerSpec, dtype: torch.dtype) -> int:
        """The index of the layer's cut, and room for its parts."""
        width, heads = spec.num_heads * spec.value_dim, spec.num_heads
        if width > self._widest or heads > self._heads:
            assert self._buffer is not None
            self._widest, self._heads = max(width, self._widest), max(heads, self._heads)
            self._max_parts = self._parts_bytes // (4 * self._widest)
            device = self._buffer.tensor.device
            self._parts = torch.empty(self._max_parts * self._widest, dtype=torch.float32, device=device)
            self._statistics = torch.empty(self._max_parts * self._heads * 2, dtype=torch.float32, device=device)
            self._generation += 1
        tiles = self._tiles(spec, dtype)
        assert tiles is not None
        cut = _cut(spec, tiles)
        if cut not in self._cuts:
            self._cuts.append(cut)
        return self._cuts.index(cut)

    def plan(self, batch: StepBatch, page_size: int, device: torch.device) -> TritonPlan:
        """Makes the work lists and copies them to the device. Nothing waits for the device."""
        return self.plan_with(batch, page_size, device, {})[0]

    def plan_with(
        self,
        batch: StepBatch,
        page_size: int,
        device: torch.device,
        sections: Mapping[str, NDArray[Any]],
        mixed: bool = False,
    ) -> tuple[TritonPlan, dict[str, torch.Tensor]]:
        """As `CarryingBackend` says: one copy for the sections and the work lists. Nothing waits for the device."""
        self._prepare(device)
        buffer = self._buffer
        assert buffer is not None
        lists = self._lists(batch, page_size)
        sent = buffer.send_sections({**sections, _PLAN: lists.values})
        numbers = sent.pop(_PLAN)
        start = int(numbers.storage_offset())
        return self._plan(batch, page_size, lists, numbers, start, mixed), sent

    def _lists(self, batch: StepBatch, page_size: int) -> WorkLists:
        programs = self._given_programs or self._processors * _LONG_PROGRAMS
        return work_list.work_lists(batch, page_size, self._cuts, programs, self._max_parts)

    def _plan(
        self, batch: StepBatch, page_size: int, lists: WorkLists, numbers: torch.Tensor, start: int, mixed: bool
    ) -> TritonPlan:
        assert self._buffer is not None
        tokens = len(batch.slot_mapping)
        # A step of short rows alone launches the same kernels whatever there is to merge, so that it can be replayed.
        short_alone = not any(lists.items[1::2])
        always = [mixed or (short_alone and i % 2 == 0) for i in range(len(lists.items))]
        launched = tuple(i for i, count in enumerate(lists.items) if count or always[i])
        merged = tuple(i for i in launched if lists.merges[i] or always[i])
        ahead = batch.reach is not None
        key = (tokens, start, self._buffer.generation, self._generation, launched, merged, ahead)
        return TritonPlan(batch, page_size, tokens, len(self._cuts), launched, merged, start, numbers, key, mixed)

    def _replace(self, plan: TritonPlan) -> None:
        """Makes a plan anew, at its place, for all layers that are known by now."""
        assert self._buffer is not None
        lists = self._lists(plan.batch, plan.page_size)
        numbers = self._buffer.send(lists.values, plan.start)
        again = self._plan(plan.batch, plan.page_size, lists, numbers, plan.start, plan.mixed)
        plan.cuts, plan.launched, plan.merged, plan.buffer = again.cuts, again.launched, again.merged, again.buffer

    def attend(
        self,
        spec: LayerSpec,
        cache: TritonCache,
        plan: TritonPlan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`. Three or four launches; captured ones serve for every plan of one key."""
        query, key, value = _readable(query), _readable(key), _readable(value)
        tokens = query.shape[0]
        output = torch.empty((tokens, spec.num_heads, spec.value_dim), dtype=query.dtype, device=query.device)
        if tokens > plan.tokens:  # the model was padded, and the plan does not know of it
            output[plan.tokens :] = 0
        if not plan.tokens:
            return output
        dtype = cache.keys.dtype
        cut = self._know(spec, dtype)
        if cut >= plan.cuts:
            # The plan was made before a layer like this was known. Those before have been queued: it may be replaced.
            self._replace(plan)
        tiles = self._tiles(spec, dtype)
        assert tiles is not None
        with _current(query.device):
            self._write(spec, cache, plan, key, value)
            for i in plan.launched:
                if i // 2 == cut:
                    launch, per_processor = ((tiles.short, _SHORT_PROGRAMS), (tiles.long, _LONG_PROGRAMS))[i % 2]
                    grid = self._given_programs or self._processors * per_processor
                    operands = query, sinks, None if bias is None else bias.contiguous()
                    self._attend(spec, cache, plan, operands, output, i, launch, tiles, grid)
                    if i in plan.merged:
                        self._merge(spec, dtype, plan, sinks, output, i, grid)
        return output

    def _write(
        self, spec: LayerSpec, cache: TritonCache, plan: TritonPlan, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        self._kernels.write[(-(-plan.tokens * spec.num_kv_heads // WRITE_LAUNCH.rows),)](
            plan.buffer, key, value, fp8.movable(cache.keys), fp8.movable(cache.values), plan.tokens,
            key.stride(0), key.stride(1), value.stride(0), value.stride(1), *fp8.scales(spec, cache.keys.dtype),
            **write_constants(spec, cache.keys.dtype, cache.keys.shape[2]), **launch_options(WRITE_LAUNCH),
        )  # fmt: skip

    def _attend(
        self,
        spec: LayerSpec,
        cache: TritonCache,
        plan: TritonPlan,
        operands: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        output: torch.Tensor,
        index: int,
        launch: Launch,
        tiles: Tiles,
        grid: int,
    ) -> None:
        query, sinks, bias = operands
        key_scale, value_scale = fp8.scales(spec, cache.keys.dtype)
        self._kernels.attend[(grid,)](
            plan.buffer, query, cache.keys, cache.values, sinks, bias, output, self._parts, self._statistics,
            query.stride(0), query.stride(1), spec.scaling * key_scale, float(spec.soft_cap or 0.0), value_scale,
            **attend_constants(
                spec, cache.keys.dtype, cache.keys.shape[2], index, launch, tiles, self._widen(cache),
                plan.batch.reach is not None,
            ), **launch_options(launch),
        )  # fmt: skip

    def _widen(self, cache: TritonCache) -> bool:
        return cache.keys.dtype is torch.bfloat16 and cache.keys.device.type == "cpu"

    def _merge(
        self,
        spec: LayerSpec,
        dtype: torch.dtype,
        plan: TritonPlan,
        sinks: torch.Tensor | None,
        output: torch.Tensor,
        index: int,
        grid: int,
    ) -> None:
        self._kernels.merge[(grid,)](
            plan.buffer, sinks, output, self._parts, self._statistics, fp8.scales(spec, dtype)[1],
            **merge_constants(spec, index), **launch_options(MERGE_LAUNCH),
        )  # fmt: skip

    def keys(self, spec: LayerSpec, cache: TritonCache, blocks: torch.Tensor) -> torch.Tensor:
        """See `AttentionBackend.keys`."""
        return cache.keys[blocks].transpose(1, 2).flatten(0, 1)

    def copy_blocks(self, caches: Sequence[TritonCache], copies: torch.Tensor) -> None:
        """Copies whole blocks in every layer, all of them read before any is written; `copies` is (C, 2)."""
        if not caches:
            return
        device = caches[0].keys.device
        if device.type == "cuda" and copies.device.type == "cpu":
            copies = copies.pin_memory().to(device, non_blocking=True)
        source, destination = copies.long().unbind(1)
        for cache in caches:
            for numbers in map(fp8.movable, cache.stored):
                numbers.index_copy_(0, destination, numbers[source])


def parts_bytes_of(device_bytes: int) -> int:
    """Memory for parts on a device of that size: allocated with a model's first layer, before the KV cache is sized.

    What is shared out are few rows, fewer than can run side by side, but they may be long. A part for each 256 tokens
    of a KV cache takes far less than a 512th of it, and what rows have in common counts in each of them.
    """
    return max(64 << 20, device_bytes // 512)


def _cut(spec: LayerSpec, tiles: Tiles) -> Cut:
    return Cut(
        group=spec.num_heads // spec.num_kv_heads,
        ways=spec.num_kv_heads,
        short_rows=tiles.short.rows,
        long_rows=tiles.long.rows,
        split=tiles.split,
        window=spec.sliding_window,
        looks_ahead=spec.looks_ahead,
    )


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the thread's current device, whatever device its arguments are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
