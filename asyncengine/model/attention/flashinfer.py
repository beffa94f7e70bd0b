"""Attention by FlashInfer (Ye et al. 2025), where its package is installed. Nobody has run this on a device.

Decodes, prefill chunks and verifications are one call of its paged prefill. How a context is shared out is planned for
the whole step, so a token's bits depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from asyncengine.model.attention.library import LibraryAttention, PagedRows, imported, with_padding
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention.token_major import TokenMajorCache, Writes
from asyncengine.step.batch import Int32, StepBatch

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends. All layers share it: they run one after the other."""
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
    """

    writes: Writes
    rows: PagedRows
    page_size: int
    place: int
    planned: dict[tuple[Any, ...], Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Planner:
    """One wrapper, and when what it copies to the device is there."""

    wrapper: Any
    copied: torch.cuda.Event | None


class FlashInferAttention(LibraryAttention):
    """The `AttentionBackend` over `BatchPrefillWithPagedKVCacheWrapper`. Its plans are not captured: no CUDA graphs."""

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
        self._steps = 0

    def allocate(
        self, spec: LayerSpec, num_blocks: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> TokenMajorCache:
        """Returns the uninitialised KV cache of one layer.

        Raises:
            BackendUnavailableError: The package has no kernel for such a layer.
        """
        cache = super().allocate(spec, num_blocks, page_size, dtype, device)
        if self._workspace is None:
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        return cache

    def plan(self, batch: StepBatch, page_size: int, device: torch.device) -> FlashInferPlan:
        """Keeps the rows for the kinds of layers, each of which is planned when its first layer attends."""
        self._steps += 1
        rows = PagedRows.of(batch, page_size)
        return FlashInferPlan(Writes.of(batch, device), rows, page_size, self._steps % _PLACES)

    def attend(
        self,
        spec: LayerSpec,
        cache: TokenMajorCache,
        plan: FlashInferPlan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        plan.writes.write(cache, key, value)
        tokens = plan.rows.tokens
        if not tokens:
            return query.new_zeros(query.shape[0], spec.num_heads, spec.value_dim)
        kind = (spec, cache.keys.dtype, query.dtype)
        wrapper = plan.planned.get(kind)
        if wrapper is None:
            wrapper = plan.planned[kind] = self._planned(kind, plan, query.device)
        attended: torch.Tensor = wrapper.run(query[:tokens].contiguous(), (cache.keys, cache.values))
        return with_padding(attended, query.shape[0])

    def _planned(self, kind: tuple[Any, ...], plan: FlashInferPlan, device: torch.device) -> Any:
        """A wrapper that has the step's rows, for one kind of layer."""
        spec, stored, computed = kind
        planner = self._planners.get((*kind, plan.place))
        if planner is None:
            wrapper = self._package.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
            planner = self._planners[*kind, plan.place] = _Planner(wrapper, event)
        if planner.copied is not None:
            planner.copied.synchronize()
        rows = plan.rows
        blocks = rows.filled.sum(1, dtype=np.int32)
        planner.wrapper.plan(
            *(
                _pinned(numbers, device)
                for numbers in (
                    rows.query_start,
                    np.concatenate(([0], np.cumsum(blocks))).astype(np.int32),
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
            sm_scale=float(spec.scaling),
            window_left=-1 if spec.sliding_window is None else spec.sliding_window - 1,
            logits_soft_cap=spec.soft_cap,
            q_data_type=computed,
            kv_data_type=stored,
        )
        if planner.copied is not None:
            planner.copied.record(torch.cuda.current_stream(device))
        return planner.wrapper


def _pinned(numbers: Int32, device: torch.device) -> torch.Tensor:
    """A tensor on the host, where FlashInfer plans; pinned, so that its copy to the device is queued like a kernel."""
    tensor = torch.from_numpy(numbers.astype(np.int32))
    return tensor.pin_memory() if device.type == "cuda" else tensor
