"""Both back ends against dense attention in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_case import (
    CPU,
    TOLERANCE,
    dense,
    fresh_cache,
    layer,
    random_case,
    random_row,
    random_sinks,
    run_paged,
    shuffled_tables,
    step_batch,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.protocol import AttentionBackend, LayerSpec
from asyncengine.model.attention.reference import TorchAttention

# In Triton's interpreter these take too long; test_triton.py has smaller ones.
quick_backends = pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)


def over_dtypes(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """The kernel is compiled for each dtype apart; torch's own way computes in float32 whatever it is given."""
    given = [("torch", torch.float32), *(("cpu", dtype) for dtype in dtypes)]
    names = [f"{backend}-{dtype}" for backend, dtype in given]
    return pytest.mark.parametrize(("backend", "dtype"), given, ids=names, indirect=["backend"])


# (context, new): decodes, prefills from nothing, prefill chunks and prefix hits; lengths around every boundary.
MIXED = [(0, 1), (5, 1), (63, 1), (64, 1), (700, 1), (0, 37), (0, 130), (16, 17), (100, 29), (513, 70), (1, 2)]
SHORT = [(0, 1), (70, 1), (0, 20), (100, 9)]
"""For many heads, and large ones."""


def assert_matches_dense(
    backend: AttentionBackend,
    spec: LayerSpec,
    shapes: list[tuple[int, int]],
    page_size: int,
    dtype: torch.dtype,
    seed: int = 0,
    tolerance: float | None = None,
) -> None:
    tolerance = tolerance or TOLERANCE[dtype]
    cases = [random_case(spec, context, new, dtype, seed + i) for i, (context, new) in enumerate(shapes)]
    rows = [row for row, _ in cases]
    outputs = run_paged(backend, spec, rows, page_size, dtype, random_sinks(spec), seed)
    for (row, expected), output in zip(cases, outputs, strict=True):
        assert output.dtype == dtype
        assert output.shape == (row.new, spec.num_heads, spec.value_dim)
        torch.testing.assert_close(output.double(), expected, rtol=tolerance / 2, atol=tolerance)


@over_dtypes(torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_mixed_batch(backend: AttentionBackend, dtype: torch.dtype, page_size: int) -> None:
    assert_matches_dense(backend, layer(), MIXED, page_size, dtype)


@over_dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("page_size", [2, 3, 8, 24, 48, 128])
def test_uncommon_page_sizes(backend: AttentionBackend, dtype: torch.dtype, page_size: int) -> None:
    assert_matches_dense(backend, layer(value_dim=24), MIXED, page_size, dtype)


@over_dtypes(torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("group", [1, 3, 4, 5, 8, 16])
@pytest.mark.in_short("torch.bfloat16", "16")
def test_query_heads_that_share_a_kv_head(backend: AttentionBackend, group: int, dtype: torch.dtype) -> None:
    assert_matches_dense(backend, layer(heads=2 * group, kv_heads=2), MIXED, 16, dtype)


@quick_backends
def test_many_query_heads_on_one_kv_head(backend: AttentionBackend) -> None:
    assert_matches_dense(backend, layer(heads=71, kv_heads=1), SHORT, 16, torch.bfloat16)


@over_dtypes(torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(8, 8), (7, 5), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (24, 72)]
)
@pytest.mark.in_short("torch.bfloat16", "256-256")
def test_head_sizes(backend: AttentionBackend, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    assert_matches_dense(backend, layer(key_dim=key_dim, value_dim=value_dim), MIXED, 16, dtype)


FEATURES: list[dict[str, Any]] = [
    {"sliding_window": 1},
    {"sliding_window": 20},
    {"sliding_window": 128},
    {"sliding_window": 600},
    {"soft_cap": 2.0},
    {"soft_cap": 50.0},
    {"has_sinks": True},
    {"has_sinks": True, "soft_cap": 5.0, "sliding_window": 33},
    {"scaling": 1.0},
    {"distances": 1},
    {"distances": 33},
    {"distances": 1000, "heads": 6},
    {"distances": 129, "scaling": 1.0, "sliding_window": 150},
    {"distances": 20, "has_sinks": True, "soft_cap": 5.0, "sliding_window": 33},
]


@over_dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("page_size", [pytest.param(1, marks=pytest.mark.long), 16])
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_features(backend: AttentionBackend, features: dict[str, Any], page_size: int, dtype: torch.dtype) -> None:
    assert_matches_dense(backend, layer(**features), MIXED, page_size, dtype)


@over_dtypes(torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(5, 40, 32), (20, 576, 512)])
def test_values_that_are_the_beginning_of_keys(
    backend: AttentionBackend, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    spec = layer(heads, 1, key_dim, value_dim, values_in_keys=True)
    assert_matches_dense(backend, spec, MIXED[::2] if key_dim < 100 else SHORT, 16, dtype)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_batches(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads = draw(st.integers(1, 3))
    spec = layer(
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4, 8])),
        kv_heads=kv_heads,
        key_dim=draw(st.integers(1, 72)),
        value_dim=draw(st.integers(1, 72)),
        sliding_window=draw(st.none() | st.integers(1, 200)),
        soft_cap=draw(st.none() | st.floats(1, 50)),
        has_sinks=draw(st.booleans()),
        distances=draw(st.sampled_from([0, 0, 1, 5, 40, 200])),
    )
    shapes = draw(
        st.lists(st.tuples(st.integers(0, 300), st.integers(1, 4) | st.integers(1, 150)), min_size=1, max_size=6)
    )
    page_size = draw(st.sampled_from([1, 4, 16, 17, 32, 64]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    for backend in (TorchAttention(), CpuAttention()):
        assert_matches_dense(backend, spec, shapes, page_size, dtype, draw(st.integers(0, 1000)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_do_not_overflow(backend: AttentionBackend, dtype: torch.dtype) -> None:
    # Scores of up to 1,000 carry rounding errors of 6e-5 into the exponent.
    assert_matches_dense(backend, layer(scaling=30.0), [(200, 1), (0, 90)], 16, dtype, tolerance=2e-2)


def test_infinite_score_gives_all_weight_to_nobody_else(backend: AttentionBackend) -> None:
    """A query that is orthogonal to all but hates most: weights underflow to an exact zero."""
    spec = layer(heads=1, kv_heads=1, key_dim=8, scaling=1.0)
    row = random_row(spec, 99, 1, torch.float32, 0)
    row.query.fill_(1.0)
    row.keys.fill_(-50.0)
    row.keys[40] = 50.0
    (output,) = run_paged(backend, spec, [row], 16, torch.float32)
    torch.testing.assert_close(output[0, 0], row.values[40, 0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [{}, {"has_sinks": True}, {"soft_cap": 3.0}], ids=str)
def test_nan_in_a_row_stays_in_the_row_and_is_not_hidden(
    backend: AttentionBackend, features: dict[str, Any], dtype: torch.dtype
) -> None:
    spec = layer(**features)
    rows = [random_row(spec, 30, 1, dtype, i) for i in range(3)]
    rows[1].query[:] = torch.nan
    outputs = run_paged(backend, spec, rows, 16, dtype, random_sinks(spec))
    assert outputs[1].isnan().all()
    assert outputs[0].isfinite().all()
    assert outputs[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_of_a_fused_projection(backend: AttentionBackend, dtype: torch.dtype) -> None:
    spec = layer(heads=6, kv_heads=2, key_dim=16, value_dim=8)
    row = random_row(spec, 0, 50, dtype, 1)
    fused = torch.cat((row.query.flatten(1), row.keys.flatten(1), row.values.flatten(1)), 1)
    query, key, value = fused.split([6 * 16, 2 * 16, 2 * 8], 1)
    interleaved = torch.stack((row.values, row.values), -1)[..., 0]  # (..., dim) with a stride of two
    assert interleaved.stride(2) == 2
    transposed = row.keys.transpose(0, 1).contiguous().transpose(0, 1)
    tables, num_blocks = shuffled_tables([50], 16, 0)
    batch = step_batch([50], [0], tables, 16)
    for keys, values in ((key.view(50, 2, 16), value.view(50, 2, 8)), (transposed, interleaved)):
        cache = fresh_cache(backend, spec, num_blocks, 16, dtype)
        output = backend.attend(spec, cache, backend.plan(batch, 16, CPU), query.view(50, 6, 16), keys, values, None)
        assert output.is_contiguous()
        torch.testing.assert_close(
            output.double(), dense(spec, row, None), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def test_other_dtype_than_the_cache(backend: AttentionBackend) -> None:
    spec = layer(has_sinks=True)
    row = random_row(spec, 0, 20, torch.bfloat16, 1)
    sinks = random_sinks(spec, torch.bfloat16)
    tables, num_blocks = shuffled_tables([20], 16, 0)
    plan = backend.plan(step_batch([20], [0], tables, 16), 16, CPU)
    cache = fresh_cache(backend, spec, num_blocks, 16, torch.bfloat16)
    output = backend.attend(spec, cache, plan, row.query.float(), row.keys.float(), row.values.float(), sinks)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), dense(spec, row, sinks), rtol=2e-2, atol=2e-2)


def test_tokens_that_pad_the_batch_give_zero_and_write_nothing(backend: AttentionBackend) -> None:
    spec = layer()
    row = random_row(spec, 0, 3, torch.float32, 1)
    tables, num_blocks = shuffled_tables([3], 16, 0)
    cache = fresh_cache(backend, spec, num_blocks, 16, torch.float32)
    plan = backend.plan(step_batch([3], [0], tables, 16), 16, CPU)
    padded = [torch.cat((x, torch.ones(5, *x.shape[1:]))) for x in (row.query, row.keys, row.values)]
    output = backend.attend(spec, cache, plan, *padded, None)
    torch.testing.assert_close(output[:3].double(), dense(spec, row, None), rtol=1e-5, atol=1e-5)
    assert (output[3:] == 0).all()
    assert int(cache.keys.isfinite().sum()) == 3 * spec.num_kv_heads * spec.key_dim


def test_negative_slots_are_not_written(backend: AttentionBackend) -> None:
    spec = layer()
    row = random_row(spec, 0, 4, torch.float32, 1)
    tables, num_blocks = shuffled_tables([4], 16, 0)
    batch = step_batch([4], [0], tables, 16)
    cache = fresh_cache(backend, spec, num_blocks, 16, torch.float32)
    backend.attend(spec, cache, backend.plan(batch, 16, CPU), row.query, row.keys, row.values, None)
    again = dataclasses.replace(batch, slot_mapping=batch.slot_mapping * 0 - 1)
    zeros = torch.zeros_like(row.keys)
    output = backend.attend(spec, cache, backend.plan(again, 16, CPU), row.query, zeros, zeros, None)
    torch.testing.assert_close(output.double(), dense(spec, row, None), rtol=1e-5, atol=1e-5)


def test_rows_without_tokens(backend: AttentionBackend) -> None:
    spec = layer()
    rows = [random_row(spec, 20, 1, torch.float32, 0), random_row(spec, 9, 0, torch.float32, 1)]
    outputs = run_paged(backend, spec, rows, 16, torch.float32)
    torch.testing.assert_close(outputs[0].double(), dense(spec, rows[0], None), rtol=1e-5, atol=1e-5)


def test_blocks_shared_by_two_rows(backend: AttentionBackend) -> None:
    spec = layer()
    prefix = random_row(spec, 0, 32, torch.float32, 0)
    tails = [random_row(spec, 0, n, torch.float32, n) for n in (1, 7)]
    cache = fresh_cache(backend, spec, 6, 16, torch.float32)
    plan = backend.plan(step_batch([32], [0], [[4, 1]], 16), 16, CPU)
    backend.attend(spec, cache, plan, prefix.query, prefix.keys, prefix.values, None)
    plan = backend.plan(step_batch([1, 7], [32, 32], [[4, 1, 0], [4, 1, 5]], 16), 16, CPU)
    output = backend.attend(
        spec, cache, plan, *(torch.cat([getattr(t, x) for t in tails]) for x in ("query", "keys", "values")), None
    )
    for tail, got in zip(tails, output.split([1, 7]), strict=True):
        whole = dataclasses.replace(
            tail,
            context=32,
            keys=torch.cat((prefix.keys, tail.keys)),
            values=torch.cat((prefix.values, tail.values)),
        )
        torch.testing.assert_close(got.double(), dense(spec, whole, None), rtol=1e-5, atol=1e-5)


def test_two_layers_that_share_a_cache(backend: AttentionBackend) -> None:
    wide, narrow = layer(), layer(sliding_window=10)
    row = random_row(wide, 0, 40, torch.float32, 0)
    tables, num_blocks = shuffled_tables([40], 16, 0)
    plan = backend.plan(step_batch([40], [0], tables, 16), 16, CPU)
    cache = fresh_cache(backend, wide, num_blocks, 16, torch.float32)
    for spec in (wide, narrow, wide):
        output = backend.attend(spec, cache, plan, row.query, row.keys, row.values, None)
        torch.testing.assert_close(output.double(), dense(spec, row, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("shared", [{}, {"kv_heads": 1, "value_dim": 24, "values_in_keys": True}], ids=["", "shared"])
@pytest.mark.in_short("torch.bfloat16")
def test_copy_blocks(backend: AttentionBackend, page_size: int, dtype: torch.dtype, shared: dict[str, Any]) -> None:
    spec = layer(**shared)
    row = random_row(spec, 0, 2 * page_size, dtype, 0)
    caches = [fresh_cache(backend, spec, 6, page_size, dtype) for _ in range(2)]
    plan = backend.plan(step_batch([2 * page_size], [0], [[0, 1]], page_size), page_size, CPU)
    expected = [backend.attend(spec, cache, plan, row.query, row.keys, row.values, None) for cache in caches]
    # All sources are read before anything is written: 0 -> 1 does not reach 3.
    backend.copy_blocks(caches, torch.tensor([[0, 2], [1, 3], [0, 1]]))
    plan = backend.plan(step_batch([1], [2 * page_size - 1], [[2, 3]], page_size), page_size, CPU)
    for cache, whole in zip(caches, expected, strict=True):
        last = backend.attend(spec, cache, plan, row.query[-1:], row.keys[-1:], row.values[-1:], None)
        torch.testing.assert_close(last, whole[-1:])
        assert torch.equal(cache.keys[0].nan_to_num(), cache.keys[1].nan_to_num())


def test_copy_of_no_blocks(backend: AttentionBackend) -> None:
    cache = fresh_cache(backend, layer(), 2, 16, torch.float32)
    backend.copy_blocks([cache], torch.zeros(0, 2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 17])
def test_bytes_per_block_is_what_allocate_takes(backend: AttentionBackend, page_size: int, dtype: torch.dtype) -> None:
    for shared in ({}, {"kv_heads": 1, "values_in_keys": True}):
        spec = layer(key_dim=9, value_dim=5, **shared)
        cache = backend.allocate(spec, 11, page_size, dtype, CPU)
        tensors = {tensor.untyped_storage().data_ptr(): tensor for tensor in (cache.values, cache.keys)}.values()
        assert sum(each.nbytes for each in tensors) == 11 * backend.bytes_per_block(spec, page_size, dtype)
