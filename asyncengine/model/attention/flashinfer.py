"""Attention by FlashInfer (Ye et al. 2025), where its package is installed. Nobody has run this on a device.

Decodes, prefill chunks and verifications are one call of its paged prefill. How a context is shared out is planned for
the whole step, so a token's bits depend on the batch.

Captured steps go through its paged decode, as in vLLM and SGLang: a wrapper of fixed shape for each kind of layer and
each number of tokens, all of them over the same tensors. With a fixed shape it launches the same kernels whatever the
rows; `plan`, on the host, writes the rows and how they are shared out to where those kernels look.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine.model.attention.library import (
    DecodeRows,
    LibraryAttention,
    PagedRows,
    imported,
    with_padding,
)
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention.token_major import TokenMajorCache, Writes
from asyncengine.model.device_copy import overwrite, pinned, to_device
from asyncengine.step.batch import StepBatch
from asyncengine.step.limits import Limits

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends; captured steps of many sequences may need more. All layers share it: they run one after
the other."""
SCHEDULE_BYTES = 8 << 20
"""What a wrapper allocates for how it shares out a step."""
_ALIGNMENT = 256
_PLACES = 2
"""Wrappers of one kind of layer. Each has a pinned array from which a plan is copied to the device: while a step runs
and the next one is planned, it must not be written again."""


@dataclass(slots=True)
class FlashInferPlan:
    """What all layers of one step share.

    Attributes:
        writes: Where keys and values go.
        rows: The step's rows, on the host.
        page_size: Tokens to a block.
        place: Which wrapper of each kind of layer has the step.
        planned: The wrappers that were planned already, by kind of layer.
        graph_key: None: it is not for captured steps.
    """

    writes: Writes
    rows: PagedRows
    page_size: int
    place: int
    planned: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    graph_key: Hashable = None


@dataclass(slots=True)
class FlashInferDecodes:
    """What all layers of one captured step share.

    Attributes:
        writes: Where keys and values go.
        tokens: Of the step, padding included.
        start: (tokens + 1,) where the blocks of each row begin, on the host.
        blocks: The blocks of all rows, on the device.
        last: (tokens,) tokens in each row's last block, on the host.
        page_size: Tokens to a block.
        planned: The wrappers that were planned already, by kind of layer.
        graph_key: Equal for steps that launch the same on the same addresses.
    """

    writes: Writes
    tokens: int
    start: torch.Tensor
    blocks: torch.Tensor
    last: torch.Tensor
    page_size: int
    graph_key: Hashable
    planned: dict[tuple[Any, ...], Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Fixed:
    """Where captured steps find their rows.

    Attributes:
        slots: (rows,) int64.
        start: (rows + 1,) int32.
        blocks: (rows x blocks of the longest sequence,) int32.
        last: (rows,) int32.
    """

    slots: torch.Tensor
    start: torch.Tensor
    blocks: torch.Tensor
    last: torch.Tensor


@dataclass(slots=True)
class _Planner:
    """One wrapper, and when what it copies to the device is there."""

    wrapper: Any
    copied: torch.cuda.Event | None

    @contextlib.contextmanager
    def copying(self, device: torch.device) -> Iterator[None]:
        """Around a plan: it writes over the pinned memory out of which the one before was copied."""
        if self.copied is not None:
            self.copied.synchronize()
        yield
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(device))


class FlashInferAttention(LibraryAttention):
    """The `AttentionBackend` and `CapturableBackend` over FlashInfer's wrappers for paged caches."""

    name = "flashinfer"
    head_dims = (64, 128, 256)
    head_dims_in_words = "one of 64, 128, 256"

    def __init__(self) -> None:
        """Imports the package.

        Raises:
            BackendUnavailableError: It is not there, or does not fit the system.
        """
        self._package = imported("flashinfer", "FlashInfer")
        self._workspace: torch.Tensor | None = None
        self._planners: dict[tuple[Any, ...], _Planner] = {}
        self._decoders: dict[tuple[Any, ...], _Planner] = {}
        self._specs: set[LayerSpec] = set()
        self._steps = 0
        self._fixed: _Fixed | None = None
        self._kinds: dict[tuple[Any, ...], torch.Tensor] = {}  # of captured steps: how they are shared out

    def allocate(
        self, spec: LayerSpec, num_blocks: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> TokenMajorCache:
        """Returns the uninitialised KV cache of one layer.

        Raises:
            BackendUnavailableError: The package has no kernel for such a layer.
        """
        cache = super().allocate(spec, num_blocks, page_size, dtype, device)
        self._specs.add(spec)
        if self._workspace is None:
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        return cache

    def plan(self, batch: StepBatch, page_size: int, device: torch.device) -> FlashInferPlan:
        """Keeps the rows for the kinds of layers, each of which is planned when its first layer attends."""
        self._steps += 1
        rows = PagedRows.of(batch, page_size)
        return FlashInferPlan(Writes.of(batch, device), rows, page_size, self._steps % _PLACES)

    def reserve(self, limits: Limits, device: torch.device) -> None:
        """As `CapturableBackend` says."""
        rows, blocks = limits.max_num_sequence, -(-limits.max_single_sequence_length // limits.page_size)
        if self._fixed is not None and len(self._fixed.last) >= rows and len(self._fixed.blocks) >= rows * blocks:
            return
        # They refer to what is replaced.
        self._decoders.clear()
        self._planners.clear()
        self._workspace = torch.zeros(_workspace_bytes(self._specs, rows, device), dtype=torch.uint8, device=device)
        self._fixed = _Fixed(
            slots=torch.zeros(rows, dtype=torch.int64, device=device),
            start=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            blocks=torch.zeros(rows * blocks, dtype=torch.int32, device=device),
            last=torch.ones(rows, dtype=torch.int32, device=device),
        )

    def capture_bytes(self, specs: Collection[LayerSpec], sequences: int, device: torch.device) -> int:
        """What its schedules take, one for each kind of layer, that of a wrapper that is being made, and work space."""
        more = _workspace_bytes(specs, sequences, device) - WORKSPACE_BYTES
        return (len(set(specs)) + 1) * SCHEDULE_BYTES + more

    def plan_captured(
        self, batch: StepBatch, page_size: int, device: torch.device
    ) -> FlashInferPlan | FlashInferDecodes:
        """Plans all kinds of layers that captured steps have had; others when their first layer attends."""
        rows = DecodeRows.of(batch, page_size, self._nowhere)
        if rows is None:
            return self.plan(batch, page_size, device)
        assert self._fixed is not None
        tokens = len(rows.slots)
        plan = FlashInferDecodes(
            writes=Writes(None, overwrite(self._fixed.slots, rows.slots)),
            tokens=tokens,
            start=_pinned(np.concatenate(([0], np.cumsum(rows.blocks))), device),
            # On the device: from the host it would be a copy that the host waits for.
            blocks=to_device(rows.tables[np.arange(rows.tables.shape[1]) < rows.blocks[:, None]], device),
            last=_pinned((rows.lengths - 1) % page_size + 1, device),
            page_size=page_size,
            graph_key=(self.name, tokens, self._fixed.slots.data_ptr()),
        )
        for kind in self._kinds:
            self._planned_decodes(kind, plan, device)
        return plan

    def attend(
        self,
        spec: LayerSpec,
        cache: TokenMajorCache,
        plan: FlashInferPlan | FlashInferDecodes,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        plan.writes.write(cache, key, value)
        kind = (spec, cache.keys.dtype, query.dtype)
        if isinstance(plan, FlashInferDecodes):
            wrapper = plan.planned.get(kind) or self._planned_decodes(kind, plan, query.device)
            decoded: torch.Tensor = wrapper.run(query.contiguous(), (cache.keys, cache.values))
            return decoded
        tokens = plan.rows.tokens
        if not tokens:
            return query.new_zeros(query.shape[0], spec.num_heads, spec.value_dim)
        wrapper = plan.planned.get(kind)
        if wrapper is None:
            wrapper = plan.planned[kind] = self._planned(kind, plan, query.device)
        attended: torch.Tensor = wrapper.run(query[:tokens].contiguous(), (cache.keys, cache.values))
        return with_padding(attended, query.shape[0])

    def _planned(self, kind: tuple[Any, ...], plan: FlashInferPlan, device: torch.device) -> Any:
        """A wrapper that has the step's rows, for one kind of layer."""
        spec, _, _ = kind
        planner = self._planners.get((*kind, plan.place))
        if planner is None:
            wrapper = self._package.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            planner = self._planners[*kind, plan.place] = _planner(wrapper, device)
        rows = plan.rows
        blocks = rows.filled.sum(1, dtype=np.int32)
        with planner.copying(device):
            planner.wrapper.plan(
                *(
                    _pinned(numbers, device)
                    for numbers in (
                        rows.query_start,
                        np.concatenate(([0], np.cumsum(blocks))),
                        rows.tables[rows.filled],
                        (rows.lengths - 1) % plan.page_size + 1,
                    )
                ),
                spec.num_heads,
                spec.num_kv_heads,
                spec.key_dim,
                plan.page_size,
                head_dim_vo=spec.value_dim,
                causal=True,
                **_common(kind),
            )
        return planner.wrapper

    def _planned_decodes(self, kind: tuple[Any, ...], plan: FlashInferDecodes, device: torch.device) -> Any:
        """A wrapper of fixed shape that has the step's rows, for one kind of layer."""
        spec, fixed = kind[0], self._fixed
        planner = self._decoders.get((*kind, plan.tokens))
        if planner is None:
            assert fixed is not None and self._workspace is not None
            wrapper = self._package.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=fixed.start[: plan.tokens + 1],
                paged_kv_indices_buffer=fixed.blocks,
                paged_kv_last_page_len_buffer=fixed.last[: plan.tokens],
            )
            if kind not in self._kinds:
                self._kinds[kind] = torch.empty(SCHEDULE_BYTES, dtype=torch.uint8, device=device)
            # Each graph's steps are planned before they are replayed, so those of all sizes can share a schedule.
            wrapper.reset_workspace_buffer(self._workspace, self._kinds[kind])
            planner = self._decoders[*kind, plan.tokens] = _planner(wrapper, device)
        with planner.copying(device):
            planner.wrapper.plan(
                plan.start,
                plan.blocks,
                plan.last,
                spec.num_heads,
                spec.num_kv_heads,
                spec.key_dim,
                plan.page_size,
                **_common(kind),
            )
        plan.planned[kind] = planner.wrapper
        return planner.wrapper


def _workspace_bytes(specs: Collection[LayerSpec], rows: int, device: torch.device) -> int:
    """Bytes for the parts of contexts that are shared out, in the largest captured step, as FlashInfer lays them out.

    In float32 for each head of each tile of its grid, which has room for two tiles on each multiprocessor, or for one
    row in each tile.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    most = WORKSPACE_BYTES
    for spec in specs:
        group = spec.num_heads // spec.num_kv_heads
        tile = next(size for size in (16, 64, 128) if group <= size or size == 128)
        tiles = max(2 * processors // spec.num_kv_heads, -(-rows * group // tile) + rows - 1)
        most = max(most, 4 * spec.num_heads * tiles * tile * (spec.value_dim + 1) + _ALIGNMENT)
    return most


def _planner(wrapper: Any, device: torch.device) -> _Planner:
    return _Planner(wrapper, torch.cuda.Event() if device.type == "cuda" else None)  # type: ignore[no-untyped-call]


def _common(kind: tuple[Any, ...]) -> dict[str, Any]:
    """What both sorts of wrappers are told of a kind of layer."""
    spec, stored, computed = kind
    return {
        "sm_scale": float(spec.scaling),
        "window_left": -1 if spec.sliding_window is None else spec.sliding_window - 1,
        "logits_soft_cap": spec.soft_cap,
        "q_data_type": computed,
        "kv_data_type": stored,
    }


def _pinned(numbers: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor on the host, where FlashInfer plans."""
    return pinned(numbers.astype(np.int32), device)
