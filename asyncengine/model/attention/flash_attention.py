"""Attention by FlashAttention-3 (Shah et al. 2024), where its package is installed. Nobody has run this on a device.

Its kernels choose by the whole step how to share out a context, so a token's bits depend on the batch. What a launch
looks like follows from shapes alone: how many rows there are, and how wide the page table is. How the rows are shared
out is computed on the device by each call, so a captured one does that anew; to have it computed once for all layers
(`scheduler_metadata`) would save a small launch in each.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass

import torch

from asyncengine.model.attention.library import (
    DecodeRows,
    LibraryAttention,
    PagedRows,
    imported,
    with_padding,
)
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention.token_major import TokenMajorCache, Writes
from asyncengine.model.device_copy import overwrite, to_device
from asyncengine.step.batch import StepBatch
from asyncengine.step.limits import Limits

_PROCESSORS = 132
"""Multiprocessors of the devices that it was written for."""


@dataclass(frozen=True, slots=True)
class FlashAttentionPlan:
    """What all layers of one step share, on the device.

    Attributes:
        writes: Where keys and values go.
        tokens: Query tokens of all rows.
        query_start: (R + 1,) int32.
        lengths: (R,) int32, those of this step included.
        tables: (R, blocks) int32.
        longest_query: Query tokens of the row that has most.
        graph_key: Equal for steps that launch the same on the same addresses; None for those that are not captured.
    """

    writes: Writes
    tokens: int
    query_start: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    longest_query: int
    graph_key: Hashable = None


@dataclass(frozen=True, slots=True)
class _Fixed:
    """Where captured steps find their rows.

    Attributes:
        slots: (rows,) int64.
        query_start: (rows + 1,) int32, of rows of one token.
        lengths: (rows,) int32.
        tables: (rows, blocks of the longest sequence) int32.
    """

    slots: torch.Tensor
    query_start: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor


class FlashAttention3(LibraryAttention):
    """The `AttentionBackend` and `CapturableBackend` over `flash_attn_with_kvcache`."""

    name = "flash_attention_3"
    head_dims = tuple(range(8, 257, 8))
    head_dims_in_words = "a multiple of 8 up to 256"

    def __init__(self) -> None:
        """Imports the package.

        Raises:
            BackendUnavailableError: It is not there, or does not fit the system.
        """
        self._package = imported("flash_attn_interface", "FlashAttention-3")
        self._fixed: _Fixed | None = None

    def reserve(self, limits: Limits, device: torch.device) -> None:
        """As `CapturableBackend` says."""
        rows, blocks = limits.max_num_sequence, -(-limits.max_single_sequence_length // limits.page_size)
        if self._fixed is not None:
            there = self._fixed.tables.shape
            if there[0] >= rows and there[1] >= blocks:
                return
        self._fixed = _Fixed(
            slots=torch.zeros(rows, dtype=torch.int64, device=device),
            query_start=torch.arange(rows + 1, dtype=torch.int32, device=device),
            lengths=torch.ones(rows, dtype=torch.int32, device=device),
            tables=torch.zeros(rows, blocks, dtype=torch.int32, device=device),
        )

    def capture_bytes(self, specs: Collection[LayerSpec], sequences: int, device: torch.device) -> int:
        """What the parts of contexts take that are shared out: as many of them as there are multiprocessors."""
        heads = max(spec.num_heads // spec.num_kv_heads * (spec.value_dim + 1) for spec in specs)
        return _PROCESSORS * heads * sequences * 4

    def plan_captured(self, batch: StepBatch, page_size: int, device: torch.device) -> FlashAttentionPlan:
        """Copies the rows to where captured launches look for them. Nothing waits for it."""
        rows = DecodeRows.of(batch, page_size, self._nowhere)
        if rows is None:
            return self.plan(batch, page_size, device)
        fixed, tokens = self._fixed, len(rows.slots)
        assert fixed is not None
        fixed.tables[:tokens, : rows.tables.shape[1]] = to_device(rows.tables, device)
        return FlashAttentionPlan(
            writes=Writes(None, overwrite(fixed.slots, rows.slots)),
            tokens=tokens,
            query_start=fixed.query_start[: tokens + 1],
            lengths=overwrite(fixed.lengths, rows.lengths),
            tables=fixed.tables[:tokens],
            longest_query=1,
            graph_key=(self.name, tokens, fixed.slots.data_ptr()),
        )

    def plan(self, batch: StepBatch, page_size: int, device: torch.device) -> FlashAttentionPlan:
        """Copies the rows to the device. Nothing waits for it."""
        rows = PagedRows.of(batch, page_size)
        return FlashAttentionPlan(
            writes=Writes.of(batch, device),
            tokens=rows.tokens,
            query_start=to_device(rows.query_start, device),
            lengths=to_device(rows.lengths, device),
            tables=to_device(rows.tables, device),
            longest_query=rows.longest_query,
        )

    def attend(
        self,
        spec: LayerSpec,
        cache: TokenMajorCache,
        plan: FlashAttentionPlan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        plan.writes.write(cache, key, value)
        if not plan.tokens:
            return query.new_zeros(query.shape[0], spec.num_heads, spec.value_dim)
        attended = self._package.flash_attn_with_kvcache(
            query[: plan.tokens].contiguous(),
            cache.keys,
            cache.values,
            cache_seqlens=plan.lengths,
            page_table=plan.tables,
            cu_seqlens_q=plan.query_start,
            max_seqlen_q=plan.longest_query,
            softmax_scale=float(spec.scaling),
            causal=True,
            # Both ends are inclusive, and counted from the token itself.
            window_size=(-1, -1) if spec.sliding_window is None else (spec.sliding_window - 1, 0),
            softcap=float(spec.soft_cap or 0.0),
        )
        return with_padding(attended, query.shape[0])
