"""Stand-ins for FlashInfer and FlashAttention-3, which cannot be installed where there is no GPU.

Each takes what the real one documents (names, order, shapes, dtypes, where things lie), refuses everything else, and
computes in float64. They were written after flashinfer 0.6.18 (`prefill.py`, `decode.py`) and
flash_attn_3 (`hopper`, August 2026).
"""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import torch


def attended(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window_left: int,
    soft_cap: float,
) -> torch.Tensor:
    """One row, causal from its last token: (n, heads, dim) over (context, kv heads, dim)."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (numbers.double().repeat_interleave(group, 1) for numbers in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    new, context = query.shape[0], keys.shape[0]
    at, position = torch.arange(context), context - new + torch.arange(new)[:, None]
    seen = at <= position
    if window_left >= 0:
        seen &= at >= position - window_left
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)


def int32(tensor: torch.Tensor, *shape: int) -> list[int]:
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype is torch.int32 and tuple(tensor.shape) == shape and tensor.is_contiguous()
    return tensor.tolist()


class BatchPrefillWithPagedKVCacheWrapper:
    """As flashinfer's of that name."""

    made: list[BatchPrefillWithPagedKVCacheWrapper]

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype is torch.uint8 and float_workspace_buffer.ndim == 1
        assert kv_layout == "NHD"
        self.plans = 0
        self.made.append(self)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        rows = len(qo_indptr) - 1
        assert rows > 0 and causal
        self.queries = int32(qo_indptr, rows + 1)
        self.pages = int32(paged_kv_indptr, rows + 1)
        self.indices = int32(paged_kv_indices, self.pages[-1])
        self.last = int32(paged_kv_last_page_len, rows)
        assert self.queries[0] == self.pages[0] == 0
        assert all(1 <= tokens <= page_size for tokens in self.last)
        # Empty rows are a matter of each of its kernels; ours never have any.
        assert all(b > a for a, b in zip(self.queries[:-1], self.queries[1:], strict=True))
        assert all(b > a for a, b in zip(self.pages[:-1], self.pages[1:], strict=True))
        assert num_qo_heads % num_kv_heads == 0
        self.heads = (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk)
        self.page_size = page_size
        self.scale = 1 / math.sqrt(head_dim_qk) if sm_scale is None else sm_scale
        self.window_left, self.soft_cap = window_left, logits_soft_cap or 0.0
        self.dtypes = (q_data_type, kv_data_type or q_data_type)
        self.plans += 1

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        keys, values = paged_kv_cache
        heads, kv_heads, key_dim, value_dim = self.heads
        assert q.shape == (self.queries[-1], heads, key_dim) and q.is_contiguous()
        assert keys.shape[1:] == (self.page_size, kv_heads, key_dim)
        assert values.shape == (*keys.shape[:3], value_dim)
        assert (q.dtype, keys.dtype) == self.dtypes and values.dtype is keys.dtype
        outputs = []
        for row, last in enumerate(self.last):
            pages = self.indices[self.pages[row] : self.pages[row + 1]]
            length = (len(pages) - 1) * self.page_size + last
            context = [numbers[pages].flatten(0, 1)[:length] for numbers in (keys, values)]
            query = q[self.queries[row] : self.queries[row + 1]]
            outputs.append(attended(query, context[0], context[1], self.scale, self.window_left, self.soft_cap))
        return torch.cat(outputs)


class BatchDecodeWithPagedKVCacheWrapper:
    """As flashinfer's of that name, for CUDA graphs: its launches read what `plan` wrote to tensors that were given."""

    made: list[BatchDecodeWithPagedKVCacheWrapper]

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        assert float_workspace_buffer.dtype is torch.uint8 and kv_layout == "NHD"
        assert use_cuda_graph and use_tensor_cores
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        assert all(isinstance(buffer, torch.Tensor) and buffer.dtype is torch.int32 for buffer in buffers)
        self.start, self.indices, self.last = (buffer for buffer in buffers if buffer is not None)
        self.rows = len(self.last)
        if len(self.start) != self.rows + 1:
            raise ValueError("The size of paged_kv_indptr_buffer should be batch_size + 1")
        self.workspace = float_workspace_buffer
        self.schedule = torch.zeros(8 << 20, dtype=torch.uint8)
        self.plans = 0
        self.made.append(self)

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        assert int_workspace_buffer.dtype is torch.uint8 and len(int_workspace_buffer) == 8 << 20
        assert float_workspace_buffer is self.workspace
        self.schedule = int_workspace_buffer

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        if len(last_page_len) != self.rows:
            raise ValueError("The batch size should be fixed in cudagraph mode")
        starts = int32(indptr, self.rows + 1)
        int32(indices, starts[-1])
        assert all(1 <= tokens <= page_size for tokens in int32(last_page_len, self.rows))
        assert starts[0] == 0 and all(b > a for a, b in itertools.pairwise(starts))
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size, window_left, logits_soft_cap or 0.0, sm_scale)
        assert not self.plans or shape == self.shape
        self.shape, self.dtypes = shape, (q_data_type, kv_data_type or q_data_type)
        self.start.copy_(indptr)
        self.indices[: len(indices)].copy_(indices)
        self.last.copy_(last_page_len)
        self._scheduled()[:] = self._wanted()
        self.plans += 1

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        # What a captured launch reads: nothing but tensors, at the addresses that they had then.
        assert torch.equal(self._scheduled(), self._wanted()), "the rows are not those that were planned last"
        keys, values = paged_kv_cache
        heads, kv_heads, dim, page_size, window_left, soft_cap, scale = self.shape
        assert q.shape == (self.rows, heads, dim) and q.is_contiguous()
        assert keys.shape[1:] == values.shape[1:] == (page_size, kv_heads, dim)
        assert (q.dtype, keys.dtype) == self.dtypes and values.dtype is keys.dtype
        outputs = []
        for row, (begin, end) in enumerate(itertools.pairwise(self.start.tolist())):
            length = (end - begin - 1) * page_size + int(self.last[row])
            context = [numbers[self.indices[begin:end].long()].flatten(0, 1)[:length] for numbers in (keys, values)]
            row_scale = 1 / math.sqrt(dim) if scale is None else scale
            outputs.append(attended(q[row : row + 1], context[0], context[1], row_scale, window_left, soft_cap))
        return torch.cat(outputs)

    def _scheduled(self) -> torch.Tensor:
        return self.schedule.view(torch.int32)[: len(self._wanted())]

    def _wanted(self) -> torch.Tensor:
        window = torch.tensor([self.rows, self.shape[4]], dtype=torch.int32)
        return torch.cat((window, self.start, self.last))


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> torch.Tensor:
    """As flash_attn_interface's of that name, with a page table and queries of several lengths."""
    rows = len(cu_seqlens_q) - 1
    blocks, page_size, kv_heads, dim = k_cache.shape
    assert q.ndim == 3 and q.shape[2] == dim and q.shape[1] % kv_heads == 0 and q.stride(-1) == 1
    assert q.dtype in (torch.float16, torch.bfloat16) and k_cache.dtype is q.dtype and v_cache.dtype is q.dtype
    assert v_cache.shape == k_cache.shape and dim <= 256 and dim % 8 == 0
    starts, lengths = int32(cu_seqlens_q, rows + 1), int32(cache_seqlens, rows)
    tables = int32(page_table, rows, page_table.shape[1])
    assert starts[0] == 0 and starts[-1] == len(q)
    counts = [end - start for start, end in itertools.pairwise(starts)]
    assert max_seqlen_q == max(counts) and causal and window_size[1] in (-1, 0)
    assert all(0 <= block < blocks for table in tables for block in table)
    outputs = []
    for start, count, length, table in zip(starts, counts, lengths, tables, strict=False):
        used = table[: -(-length // page_size)]
        keys, values = (numbers[used].flatten(0, 1)[:length] for numbers in (k_cache, v_cache))
        scale = dim**-0.5 if softmax_scale is None else softmax_scale
        outputs.append(attended(q[start : start + count], keys, values, scale, window_size[0], softcap))
    return torch.cat(outputs)


def modules() -> dict[str, ModuleType]:
    """By the names under which they are imported."""
    flashinfer, flash_attn_interface = ModuleType("flashinfer"), ModuleType("flash_attn_interface")
    wrapper: Any = type("Wrapper", (BatchPrefillWithPagedKVCacheWrapper,), {"made": []})
    flashinfer.BatchPrefillWithPagedKVCacheWrapper = wrapper  # type: ignore[attr-defined]
    decode: Any = type("DecodeWrapper", (BatchDecodeWithPagedKVCacheWrapper,), {"made": []})
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = decode  # type: ignore[attr-defined]
    flash_attn_interface.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    return {"flashinfer": flashinfer, "flash_attn_interface": flash_attn_interface}
