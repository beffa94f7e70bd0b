"""Attention by FlashAttention-3 (Shah et al. 2024), where its package is installed. Nobody has run this on a device.

Its kernels choose by the whole step how to share out a context, so a token's bits depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asyncengine.model.attention.library import LibraryAttention, PagedRows, imported, with_padding
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention.token_major import TokenMajorCache, Writes
from asyncengine.model.device_copy import to_device
from asyncengine.step.batch import StepBatch


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
    """

    writes: Writes
    tokens: int
    query_start: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    longest_query: int


class FlashAttention3(LibraryAttention):
    """The `AttentionBackend` over `flash_attn_with_kvcache`. It plans in tensors of changing sizes: no CUDA graphs."""

    name = "flash_attention_3"
    head_dims = tuple(range(8, 257, 8))
    head_dims_in_words = "a multiple of 8 up to 256"

    def __init__(self) -> None:
        """Imports the package.

        Raises:
            BackendUnavailableError: It is not there, or does not fit the system.
        """
        self._package = imported("flash_attn_interface", "FlashAttention-3")

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
