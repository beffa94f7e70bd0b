"""Random paged batches, and what dense attention in float64 makes of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asyncengine.model.attention import fp8
from asyncengine.model.attention.protocol import AttentionBackend, LayerSpec
from asyncengine.step.batch import StepBatch

CPU = torch.device("cpu")
# Largest error against float64, for values of order one: half a unit in the last place of the output, and for
# bfloat16 that of the softmax's weights as well.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FP8 = torch.float8_e4m3fn


def layer(
    heads: int = 4, kv_heads: int = 2, key_dim: int = 32, value_dim: int | None = None, **others: Any
) -> LayerSpec:
    return LayerSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim or key_dim,
        scaling=others.pop("scaling", 1 / math.sqrt(key_dim)),
        **others,
    )


@dataclass
class Row:
    """One sequence: `context` tokens are in the cache already, `new` are in this step.

    The tokens of each of its `images`, from and to, attend to all of it in layers that look ahead.
    """

    context: int
    new: int
    keys: torch.Tensor  # (context + new, kv heads, key_dim)
    values: torch.Tensor
    query: torch.Tensor  # (new, heads, key_dim)
    images: tuple[tuple[int, int], ...] = ()

    def reach(self) -> np.ndarray:
        """How many tokens each of the new ones attends to."""
        reach = np.arange(self.context + self.new) + 1
        for first, end in self.images:
            reach[first:end] = end
        return reach[self.context :].astype(np.int32)


def random_row(spec: LayerSpec, context: int, new: int, dtype: torch.dtype, seed: int) -> Row:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    total = context + new
    keys = normal(total, spec.num_kv_heads, spec.key_dim)
    values = normal(total, spec.num_kv_heads, spec.value_dim)
    if spec.values_in_keys:
        values = keys[..., : spec.value_dim].clone()
    return Row(context, new, keys, values, normal(new, spec.num_heads, spec.key_dim))


def random_sinks(spec: LayerSpec, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    if not spec.has_sinks:
        return None
    return torch.randn(spec.num_heads, generator=torch.Generator().manual_seed(7)).to(dtype)


def random_bias(spec: LayerSpec) -> torch.Tensor | None:
    """(heads, distances)."""
    if not spec.distances:
        return None
    return torch.randn(spec.num_heads, spec.distances, generator=torch.Generator().manual_seed(8))


def dense(spec: LayerSpec, row: Row, sinks: torch.Tensor | None) -> torch.Tensor:
    """Returns (new, heads, value_dim) in float64."""
    group = spec.num_heads // spec.num_kv_heads
    keys = row.keys.double().repeat_interleave(group, 1)
    values = row.values.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", row.query.double(), keys) * spec.scaling
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    at, position = torch.arange(row.context + row.new), row.context + torch.arange(row.new)[:, None]
    if (bias := random_bias(spec)) is not None:
        scores += bias.double()[:, (position - at).clamp(0, spec.distances - 1)]
    visible = at <= position
    if spec.looks_ahead:
        visible = at < torch.from_numpy(row.reach())[:, None]
    if spec.sliding_window is not None:
        visible &= at > position - spec.sliding_window
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, row.new, 1)), -1)
    weights = scores.softmax(-1)[..., : row.context + row.new]
    return torch.einsum("hqk,khd->qhd", weights, values)


@functools.lru_cache(maxsize=512)
def random_case(
    spec: LayerSpec, context: int, new: int, dtype: torch.dtype, seed: int, images: tuple[tuple[int, int], ...] = ()
) -> tuple[Row, torch.Tensor]:
    """A row, and what is made of it, with sinks if there are any; the same for all back ends, and not to be changed."""
    row = dataclasses.replace(random_row(spec, context, new, dtype, seed), images=images)
    return row, dense(spec, row, random_sinks(spec))


def step_batch(
    new: list[int], contexts: list[int], tables: list[list[int]], page_size: int, garbage: int = 2**31 - 1
) -> StepBatch:
    """A batch of rows whose block tables are given; table entries past a row's end are `garbage`."""
    width = max(map(len, tables)) + 2
    block_tables = np.full((len(new), width), garbage, np.int32)
    for row, table in enumerate(tables):
        block_tables[row, : len(table)] = table
    positions = [np.arange(context, context + n) for context, n in zip(contexts, new, strict=True)]
    slots = [
        np.asarray(table)[at // page_size] * page_size + at % page_size
        for table, at in zip(tables, positions, strict=True)
    ]
    tokens = sum(new)
    nothing = np.zeros(0, np.int64)
    return StepBatch(
        token_ids=np.zeros(tokens, np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        query_start=np.cumsum([0, *new]).astype(np.int32),
        context_lens=np.asarray(contexts, np.int32),
        block_tables=block_tables,
        slot_mapping=np.concatenate(slots).astype(np.int64),
        sample_index=nothing,
        sample_slots=nothing,
        sample_positions=nothing,
        copies=nothing.reshape(0, 2),
        num_decodes=sum(n == 1 for n in new),
    )


def shuffled_tables(lengths: list[int], page_size: int, seed: int) -> tuple[list[list[int]], int]:
    """Blocks for each row in random order, with unused blocks between them, and how many blocks there are."""
    needed = [-(-length // page_size) for length in lengths]
    num_blocks = sum(needed) + 3
    free = np.random.default_rng(seed).permutation(num_blocks).tolist()
    return [[free.pop() for _ in range(count)] for count in needed], num_blocks


def fresh_cache(backend: AttentionBackend, spec: LayerSpec, num_blocks: int, page_size: int, dtype: torch.dtype) -> Any:
    """A cache that is full of NaN: whatever is read without having been written shows."""
    cache = backend.allocate(spec, num_blocks, page_size, dtype, CPU)
    for numbers in (cache.keys, cache.values):
        numbers.copy_(torch.full_like(numbers, torch.nan, dtype=torch.float32))
    return cache


def run_paged(
    backend: AttentionBackend,
    spec: LayerSpec,
    rows: list[Row],
    page_size: int,
    dtype: torch.dtype,
    sinks: torch.Tensor | None = None,
    seed: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Fills a cache with the rows' contexts, then runs their new tokens as one batch; one output per row."""
    tables, num_blocks = shuffled_tables([row.context + row.new for row in rows], page_size, seed)
    cache = fresh_cache(backend, spec, num_blocks, page_size, kv_dtype or dtype)
    held = [i for i, row in enumerate(rows) if row.context]
    if held:
        batch = step_batch([rows[i].context for i in held], [0] * len(held), [tables[i] for i in held], page_size)
        keys = torch.cat([rows[i].keys[: rows[i].context] for i in held])
        values = torch.cat([rows[i].values[: rows[i].context] for i in held])
        if fill := getattr(backend, "fill", None):
            key_scale, value_scale = fp8.scales(spec, kv_dtype or dtype)
            fill(cache, batch.slot_mapping, keys / key_scale, values / value_scale)
        else:
            queries = torch.zeros(len(keys), spec.num_heads, spec.key_dim, dtype=dtype)
            backend.attend(
                spec, cache, backend.plan(batch, page_size, CPU), queries, keys, values, sinks, random_bias(spec)
            )
    batch = step_batch([row.new for row in rows], [row.context for row in rows], tables, page_size)
    if any(row.images for row in rows):
        batch = dataclasses.replace(batch, reach=np.concatenate([row.reach() for row in rows]))
    output = backend.attend(
        spec,
        cache,
        backend.plan(batch, page_size, CPU),
        torch.cat([row.query for row in rows]),
        torch.cat([row.keys[row.context :] for row in rows]),
        torch.cat([row.values[row.context :] for row in rows]),
        sinks,
        random_bias(spec),
    )
    if (kv_dtype or dtype) is not FP8:
        for row, table in zip(rows, tables, strict=True):
            kept = backend.keys(spec, cache, torch.tensor(table))[: row.context + row.new]
            assert torch.equal(kept, row.keys.to(kept.dtype))
    return list(output.split([row.new for row in rows]))
