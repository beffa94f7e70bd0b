"""Paged attention in plain torch: gathers each row's keys and values, then a softmax in float32. Runs anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from asyncengine.model.attention import fp8
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention.token_major import TokenMajorCache, TokenMajorLayout, Writes
from asyncengine.step.batch import Int64, StepBatch

# How many context tokens one group may gather, and how many scores it may hold at once: bounds on memory.
_GATHERED_TOKENS = 1 << 17
_SCORES = 1 << 25


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows with equally many query tokens (n) and similar contexts, attended to as one batch.

    Attributes:
        tokens: (rows * n,) indices of the query tokens.
        positions: (rows, n) their positions.
        reach: (rows, n) how many tokens of their sequence they attend to in layers that look ahead; None if no more
            than in others.
        slots: (rows, longest context) cache slot of each position; past a row's end its last slot, which is written.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    reach: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """What all layers of one step share, on the device.

    Attributes:
        writes: Where keys and values go.
        groups: Together they hold every row once.
    """

    writes: Writes
    groups: tuple[RowGroup, ...]


class TorchAttention(TokenMajorLayout):
    """The reference `AttentionBackend`: needs no compiler and runs on every device."""

    name = "torch"

    def check_dtype(self, dtype: torch.dtype, device: torch.device) -> None:
        """As the protocol says: it stores whatever torch has."""

    def plan(self, batch: StepBatch, page_size: int, device: torch.device) -> TorchPlan:
        """Groups the rows and copies their slots to the device. Nothing waits for the device."""
        return TorchPlan(
            writes=Writes.of(batch, device),
            groups=tuple(_group(batch, rows, page_size, device) for rows in _similar_rows(batch)),
        )

    def attend(
        self,
        spec: LayerSpec,
        cache: TokenMajorCache,
        plan: TorchPlan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        key_scale, value_scale = fp8.scales(spec, cache.keys.dtype)
        if (key_scale, value_scale) != (1.0, 1.0):
            key, value = key.float() / key_scale, value.float() / value_scale
            spec = dataclasses.replace(spec, scaling=spec.scaling * key_scale)
        plan.writes.write(cache, key, value)
        keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
        output = query.new_zeros(query.shape[0], spec.num_heads, spec.value_dim)
        for group in plan.groups:
            rows, n = group.positions.shape
            until = group.positions + 1 if group.reach is None or not spec.looks_ahead else group.reach
            # (rows, kv heads, context, dim)
            group_keys, group_values = (
                fp8.movable(cached)[group.slots].view(cached.dtype).transpose(1, 2).float() for cached in (keys, values)
            )
            queries = query[group.tokens].float().view(rows, n, spec.num_heads, spec.key_dim)
            at_once = max(1, _SCORES // (rows * spec.num_heads * group.slots.shape[1]))
            parts = [
                _softmax_attention(
                    spec,
                    queries[:, i : i + at_once],
                    group_keys,
                    group_values,
                    group.positions[:, i : i + at_once],
                    until[:, i : i + at_once],
                    sinks,
                    bias,
                )
                for i in range(0, n, at_once)
            ]
            attended = torch.cat(parts, 1).flatten(0, 1) * value_scale
            output.index_copy_(0, group.tokens, attended.to(output.dtype))
        return output


def _to(array: np.ndarray[tuple[int, ...], np.dtype[np.int64]], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.int64)).to(device, non_blocking=True)


def _similar_rows(batch: StepBatch) -> Iterator[Int64]:
    """Yields row indices: equally many query tokens, total lengths within a factor of two, bounded altogether."""
    queries = np.diff(batch.query_start)
    lengths = batch.context_lens + queries
    magnitude = np.frexp(lengths.astype(np.float64))[1]
    order = np.lexsort((lengths, magnitude, queries))
    start = 0
    for end in range(1, len(order) + 1):
        first = order[start]
        if (
            end == len(order)
            or queries[order[end]] != queries[first]
            or magnitude[order[end]] != magnitude[first]
            or (end - start + 1) * int(lengths[order[end]]) > _GATHERED_TOKENS
        ):
            if queries[first]:
                yield order[start:end]
            start = end


def _group(batch: StepBatch, rows: Int64, page_size: int, device: torch.device) -> RowGroup:
    starts = batch.query_start[rows].astype(np.int64)
    contexts = batch.context_lens[rows].astype(np.int64)
    steps = np.arange(batch.query_start[rows[0] + 1] - starts[0])
    lengths = contexts + len(steps)
    positions = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
    blocks = np.take_along_axis(batch.block_tables[rows].astype(np.int64), positions // page_size, 1)
    tokens = starts[:, None] + steps
    return RowGroup(
        tokens=_to(tokens.ravel(), device),
        positions=_to(contexts[:, None] + steps, device),
        slots=_to(blocks * page_size + positions % page_size, device),
        reach=None if batch.reach is None else _to(batch.reach[tokens].astype(np.int64), device),
    )


def _softmax_attention(
    spec: LayerSpec,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    until: torch.Tensor,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attends in float32.

    Args:
        spec: The layer.
        queries: (rows, n, heads, key_dim).
        keys: (rows, kv heads, context, key_dim).
        values: (rows, kv heads, context, value_dim).
        positions: (rows, n), of the queries.
        until: (rows, n), how many tokens of its row each of them sees, but for a window.
        sinks: (heads,) or None.
        bias: (heads, distances) or None.

    Returns:
        (rows, n, heads, value_dim).
    """
    rows, n, heads, _ = queries.shape
    per_kv_head = heads // spec.num_kv_heads
    # The query heads of a KV head stand beside each other: (rows, kv heads, n * per kv head, key_dim).
    queries = queries.view(rows, n, spec.num_kv_heads, per_kv_head, -1).transpose(1, 2).flatten(2, 3)
    scores = torch.matmul(queries, keys.transpose(2, 3)).mul_(spec.scaling)
    if spec.soft_cap is not None:
        scores.div_(spec.soft_cap).tanh_().mul_(spec.soft_cap)
    scores = scores.view(rows, spec.num_kv_heads, n, per_kv_head, -1)
    at = torch.arange(keys.shape[2], device=keys.device)
    if bias is not None:
        distance = (positions[..., None] - at).clamp_(0, spec.distances - 1)
        by_kv_head = bias.reshape(spec.num_kv_heads, per_kv_head, -1)
        scores += by_kv_head[:, :, distance].permute(2, 0, 3, 1, 4)
    hidden = at >= until[..., None]
    if spec.sliding_window is not None:
        hidden |= at <= positions[..., None] - spec.sliding_window
    scores.masked_fill_(hidden[:, None, :, None], -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, spec.num_kv_heads, 1, per_kv_head, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    attended = torch.matmul(weights.flatten(2, 3), values).view(rows, spec.num_kv_heads, n, per_kv_head, -1)
    return attended.transpose(1, 2).flatten(2, 3)
