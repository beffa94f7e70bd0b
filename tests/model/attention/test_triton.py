"""The Triton kernels against dense attention in float64: on a GPU if there is one, else in Triton's interpreter.

The interpreter runs a kernel line by line in numpy, so cases are few and small. The behaviours that all back ends share
are in test_parity.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from attention_case import (
    CPU,
    Row,
    fresh_cache,
    layer,
    random_row,
    random_sinks,
    run_paged,
    shuffled_tables,
    step_batch,
)
from test_invariance import same_bits
from test_parity import assert_matches_dense
from triton_device import DEVICE, TritonOnDevice, require_triton, watch_overflows

from asyncengine.model.attention import triton_tiles
from asyncengine.model.attention.protocol import BackendUnavailableError
from asyncengine.model.attention.triton import TritonPlan
from asyncengine.model.attention.triton_tiles import Launch, Tiles
from asyncengine.step.batch import StepBatch

require_triton()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (context, new): decodes within a split and over several, a prefill, a chunk after a context, a verification of 3.
MIXED = [(0, 1), (64, 1), (270, 1), (0, 21), (50, 9), (30, 3)]


def backend(programs: int = 12, parts_bytes: int = 1 << 19) -> TritonOnDevice:
    return TritonOnDevice(programs, parts_bytes)


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that cut short contexts into several splits."""
    for itemsize in (2, 4):
        monkeypatch.setitem(triton_tiles.TABLE, (itemsize, 32), Tiles(32, 32, Launch(16, 4, 2), Launch(32, 4, 2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_batch(dtype: torch.dtype) -> None:
    assert_matches_dense(backend(), layer(), MIXED, 16, dtype)


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("page_size", [1, 7, 48])
def test_mixed_batch_of_many_splits(page_size: int) -> None:
    shapes = [(100, 1), (0, 1), (40, 9), (30, 3)]
    assert_matches_dense(backend(), layer(2, 1, value_dim=24), shapes, page_size, torch.float32)


@pytest.mark.parametrize("group", [1, 3, 8, 16])
def test_query_heads_that_share_a_kv_head(group: int) -> None:
    assert_matches_dense(backend(), layer(heads=2 * group, kv_heads=2), [(60, 1), (0, 9)], 16, torch.float32)


def test_more_query_heads_on_a_kv_head_than_a_tile_has_rows() -> None:
    assert_matches_dense(backend(), layer(heads=71, kv_heads=1), [(100, 1), (0, 2)], 16, torch.bfloat16)


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(7, 5), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (24, 72)]
)
def test_head_sizes(key_dim: int, value_dim: int) -> None:
    shapes = [(65, 1), (30, 9)]
    for dtype in (torch.bfloat16, torch.float32)[: 1 + (key_dim in (7, 256))]:  # the least, and the largest tiles
        assert_matches_dense(backend(), layer(key_dim=key_dim, value_dim=value_dim), shapes, 16, dtype)


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize(
    ("heads", "key_dim", "value_dim", "features"),
    [
        (5, 40, 32, {}),
        (18, 40, 24, {"sliding_window": 20, "soft_cap": 5.0, "has_sinks": True}),
        (4, 80, 24, {}),  # the rest is the larger part
        (20, 576, 512, {}),
    ],
    ids=str,
)
def test_values_that_are_the_beginning_of_keys(
    heads: int, key_dim: int, value_dim: int, features: dict[str, Any]
) -> None:
    spec = layer(heads, 1, key_dim, value_dim, values_in_keys=True, **features)
    for dtype in (torch.float32, torch.bfloat16):
        assert_matches_dense(backend(), spec, [(40, 1), (95, 1), (30, 9)], 16, dtype)


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize(
    "features",
    [
        {"sliding_window": 1},
        {"sliding_window": 20},
        {"sliding_window": 128},
        {"soft_cap": 2.0},
        {"soft_cap": 50.0},
        {"has_sinks": True},
        {"has_sinks": True, "soft_cap": 5.0, "sliding_window": 33},
        {"scaling": 1.0},
        {"distances": 33},
        {"distances": 1000, "heads": 6, "kv_heads": 2},
        {"distances": 20, "has_sinks": True, "soft_cap": 5.0, "sliding_window": 33},
    ],
    ids=str,
)
def test_features(features: dict[str, Any]) -> None:
    shapes = [(40, 1), (95, 1), (30, 9)]
    for dtype in (torch.float32, torch.bfloat16)[: 1 + (len(features) > 1)]:  # of each alone, dtypes make no difference
        assert_matches_dense(backend(), layer(**{"heads": 2, "kv_heads": 1} | features), shapes, 16, dtype)


@pytest.mark.parametrize(
    ("length", "features"),
    [(16_000, {}), (8_000, {"has_sinks": True, "soft_cap": 5.0, "sliding_window": 5_000})],
    ids=["16 k", "8 k, all features"],
)
@pytest.mark.in_short("8 k, all features")
def test_long_contexts_are_shared_out(length: int, features: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode and a verification over much, a short row and a prefill chunk, in splits of 512 keys."""
    watch_overflows(monkeypatch)
    monkeypatch.setitem(triton_tiles.TABLE, (4, 16), Tiles(512, 512, Launch(16, 4, 1), Launch(32, 4, 1)))
    spec = layer(2, 1, key_dim=16, value_dim=8, **features)
    shapes = [(length, 1), (length + 700, 3), (40, 1), (1000, 12)]
    triton = backend(programs=33)
    assert_matches_dense(triton, spec, shapes, 64, torch.float32)
    tables, _ = shuffled_tables([context + new for context, new in shapes], 64, 0)
    plan = triton.plan(step_batch([1, 3, 1, 12], [context for context, _ in shapes], tables, 64), 64, CPU)
    assert plan.launched == plan.merged == (0, 1)


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.in_short("torch.bfloat16")
def test_same_bits_alone_and_in_a_batch_and_however_the_work_is_shared_out(dtype: torch.dtype) -> None:
    spec = layer(2, 1, sliding_window=90, soft_cap=4.0, has_sinks=True)
    shapes = [(150, 1), (3, 1), (0, 10), (70, 9), (63, 2)]
    rows = [random_row(spec, context, new, dtype, i) for i, (context, new) in enumerate(shapes)]
    sinks = random_sinks(spec)
    together = run_paged(backend(programs=1), spec, rows, 16, dtype, sinks)
    shared_out = run_paged(backend(programs=20), spec, rows, 16, dtype, sinks)
    no_room = run_paged(backend(programs=20, parts_bytes=1 << 10), spec, rows, 16, dtype, sinks)
    for i, row in enumerate(rows):
        (alone,) = run_paged(backend(programs=6), spec, [row], 48, dtype, sinks, seed=5)
        assert same_bits(alone, together[i])
        assert same_bits(alone, shared_out[i])
        assert same_bits(alone, no_room[i])


@pytest.mark.usefixtures("small_splits")
def test_same_bits_as_decode_and_in_any_prefill_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        # What the interpreter multiplies with rounds a row by its place in the tile; each row alone has no place.
        product = np.matmul

        def by_rows(left: Any, right: Any, dtype: Any = None) -> Any:
            return np.concatenate([product(left[i : i + 1], right, dtype=dtype) for i in range(len(left))])

        monkeypatch.setattr(np, "matmul", by_rows)
    spec = layer(2, 1, sliding_window=50)
    whole = random_row(spec, 0, 80, torch.float32, 0)
    (expected,) = run_paged(backend(), spec, [whole], 16, torch.float32)
    for first, last in itertools.pairwise([0, 9, 31, 32, 33, 60, 80]):
        chunk = Row(first, last - first, whole.keys[:last], whole.values[:last], whole.query[first:last])
        (output,) = run_paged(backend(), spec, [chunk], 16, torch.float32, seed=first)
        assert same_bits(output, expected[first:last])


def test_padded_batch_gives_zero_and_writes_nothing() -> None:
    """As a captured graph runs it: the plan itself speaks of tokens that belong to no row."""
    spec = layer(has_sinks=True)
    row = random_row(spec, 0, 1, torch.float32, 1)
    tables, num_blocks = shuffled_tables([1], 16, 0)
    one = step_batch([1], [0], tables, 16)
    padded_batch = type(one)(
        **{name: getattr(one, name) for name in one.__slots__}
        | {"slot_mapping": torch.tensor([int(one.slot_mapping[0]), *[-1] * 6]).numpy()}
    )
    triton = backend()
    cache = fresh_cache(triton, spec, num_blocks, 16, torch.float32)
    plan = triton.plan(padded_batch, 16, CPU)
    assert plan.tokens == 7
    inputs = [torch.cat((x, torch.full((6, *x.shape[1:]), torch.nan))) for x in (row.query, row.keys, row.values)]
    output = triton.attend(spec, cache, plan, *inputs, random_sinks(spec))
    assert output[:1].isfinite().all()
    assert (output[1:] == 0).all()
    assert int(cache.keys.isfinite().sum()) == spec.num_kv_heads * spec.key_dim


def test_steps_of_one_shape_have_one_graph_key() -> None:
    triton = backend()
    spec = layer()
    fresh_cache(triton, spec, 64, 16, torch.float32)

    def key(new: list[int], contexts: list[int]) -> object:
        tables, _ = shuffled_tables([a + b for a, b in zip(new, contexts, strict=True)], 16, 0)
        return triton.plan(step_batch(new, contexts, tables, 16), 16, CPU).graph_key

    assert key([1, 1], [5, 300]) == key([1, 1], [40, 1])
    assert key([1, 1], [5, 300]) != key([1, 1, 1], [5, 300, 1])
    assert key([40], [0]) != key([1] * 40, [0] * 40)


class EverythingLaunched(TritonOnDevice):
    """Plans as for a graph of steps with prompts."""

    def plan(self, batch: StepBatch, page_size: int, device: torch.device) -> TritonPlan:
        return self.plan_with(batch, page_size, DEVICE, {}, mixed=True)[0]


def test_steps_of_anything_have_one_graph_key_where_everything_is_launched() -> None:
    triton = EverythingLaunched(12, 1 << 19)
    fresh_cache(triton, layer(), 640, 16, torch.float32)
    fresh_cache(triton, layer(sliding_window=9), 640, 16, torch.float32)

    def plan(new: list[int], contexts: list[int]) -> TritonPlan:
        tables, _ = shuffled_tables([a + b for a, b in zip(new, contexts, strict=True)], 16, 0)
        return triton.plan(step_batch(new, contexts, tables, 16), 16, CPU)

    plans = [plan([40], [0]), plan([1] * 40, [3] * 40), plan([1, 39], [9000, 0]), plan([20, 20], [300, 0])]
    assert len({each.graph_key for each in plans}) == 1
    assert plans[0].launched == plans[0].merged == (0, 1, 2, 3)
    assert plan([41], [0]).graph_key != plans[0].graph_key


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("shapes", [[(95, 1), (30, 9)], [(95, 1), (40, 1)], [(0, 40)]], ids=str)
def test_what_is_launched_for_nothing_does_nothing(shapes: list[tuple[int, int]]) -> None:
    assert_matches_dense(EverythingLaunched(12, 1 << 19), layer(2, 1), shapes, 16, torch.float32)


def test_room_for_parts_is_made_with_the_first_layer_and_stays() -> None:
    """What a trial of the model allocates counts as in use when the KV cache is sized."""
    triton = backend(parts_bytes=1 << 16)
    triton.allocate(layer(), 2, 16, torch.float32, CPU)
    parts, statistics = triton._parts, triton._statistics
    assert parts is not None and parts.nbytes == 1 << 16
    triton.allocate(layer(), 500, 16, torch.bfloat16, CPU)
    triton.allocate(layer(sliding_window=9), 500, 16, torch.float32, CPU)
    assert triton._parts is parts and triton._statistics is statistics


def test_unknown_dtypes_head_sizes_and_scales_are_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="float64"):
        backend().allocate(layer(), 1, 16, torch.float64, CPU)
    with pytest.raises(BackendUnavailableError, match="heads of 1024"):
        backend().allocate(layer(key_dim=1024), 1, 16, torch.bfloat16, CPU)
    with pytest.raises(BackendUnavailableError, match="does not scale scores by -1"):
        backend().allocate(dataclasses.replace(layer(), scaling=-1.0), 1, 16, torch.bfloat16, CPU)
