"""Tokens of an image that attend to all of it, also to what follows them: every back end against dense attention."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from attention_case import (
    CPU,
    TOLERANCE,
    Row,
    dense,
    fresh_cache,
    layer,
    random_case,
    random_row,
    random_sinks,
    run_paged,
    step_batch,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_invariance import same_bits
from test_work_list import PLAIN, batch_of, items_of

from asyncengine.model.attention import triton_tiles
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.protocol import AttentionBackend, LayerSpec
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.attention.triton_tiles import Launch, Tiles
from asyncengine.model.attention.work_list import LISTS, REACH, WorkLists, work_lists
from asyncengine.step.batch import StepBatch

Shape = tuple[int, int, tuple[tuple[int, int], ...]]
# (context, new, images): decodes beside; images in the midst, at both ends, one after the other; one of which a part
# was computed before, and one of which all but its last two tokens were.
MIXED: list[Shape] = [
    (0, 60, ((5, 40),)), (70, 1, ()), (0, 20, ((0, 20),)), (20, 41, ((3, 33), (33, 50), (55, 60))), (0, 37, ()),
    (31, 3, ((2, 33),)), (9, 3, ((4, 8),)),
]  # fmt: skip
LONG: list[Shape] = [(500, 40, ((490, 540),)), (600, 1, ()), (0, 150, ((3, 140),)), (110, 25, ((100, 131),))]
FEATURES: list[dict[str, Any]] = [
    {},
    {"sliding_window": 1},
    {"sliding_window": 12},
    {"sliding_window": 48},
    {"sliding_window": 300, "has_sinks": True, "soft_cap": 5.0},
    {"distances": 30},
]


def row_of(spec: LayerSpec, shape: Shape, dtype: torch.dtype, seed: int) -> Row:
    context, new, images = shape
    return dataclasses.replace(random_row(spec, context, new, dtype, seed), images=images)


def assert_reaches(
    backend: AttentionBackend, spec: LayerSpec, shapes: list[Shape], page_size: int, dtype: torch.dtype
) -> None:
    cases = [random_case(spec, context, new, dtype, i, images) for i, (context, new, images) in enumerate(shapes)]
    outputs = run_paged(backend, spec, [row for row, _ in cases], page_size, dtype, random_sinks(spec))
    tolerance = TOLERANCE[dtype]
    for (_, expected), output in zip(cases, outputs, strict=True):
        torch.testing.assert_close(output.double(), expected, rtol=tolerance / 2, atol=tolerance)


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    for itemsize in (2, 4):
        monkeypatch.setitem(triton_tiles.TABLE, (itemsize, 32), Tiles(16, 32, Launch(16, 4, 2), Launch(32, 4, 2)))


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_layers_that_look_ahead(backend: AttentionBackend, features: dict[str, Any]) -> None:
    spec = layer(2, 1, value_dim=24, looks_ahead=True, **features)
    assert_reaches(backend, spec, MIXED, 16, torch.float32)


@pytest.mark.parametrize(
    ("backend", "dtype", "page_size"),
    [
        ("torch", torch.float32, 7), ("cpu", torch.float32, 7), ("cpu", torch.float32, 16), ("cpu", torch.bfloat16, 16),
        ("cpu", torch.float16, 7),
    ],
    indirect=["backend"],
)  # fmt: skip
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_over_several_blocks_and_splits(
    backend: AttentionBackend, features: dict[str, Any], page_size: int, dtype: torch.dtype
) -> None:
    assert_reaches(backend, layer(heads=6, looks_ahead=True, **features), [*LONG, *MIXED], page_size, dtype)


@pytest.mark.usefixtures("small_splits")
def test_triton_in_bfloat16_whose_query_heads_fill_several_tiles(triton_backend: AttentionBackend) -> None:
    assert_reaches(triton_backend, layer(heads=40, kv_heads=1, looks_ahead=True), MIXED[4:], 16, torch.bfloat16)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_random_images(data: st.DataObject) -> None:
    draw = data.draw
    shapes: list[Shape] = []
    for _ in range(draw(st.integers(1, 4))):
        ends = sorted(draw(st.lists(st.integers(0, 300), min_size=2, max_size=8, unique=True)))
        images = tuple(itertools.pairwise(ends))[:: draw(st.integers(1, 2))]
        end = draw(st.integers(images[-1][1], images[-1][1] + 40))
        shapes.append((draw(st.integers(0, end - 1)), 0, images))
        shapes[-1] = (shapes[-1][0], end - shapes[-1][0], images)
    spec = layer(
        heads=draw(st.sampled_from([2, 6])),
        key_dim=draw(st.sampled_from([16, 33])),
        sliding_window=draw(st.none() | st.integers(1, 200)),
        has_sinks=draw(st.booleans()),
        looks_ahead=True,
    )
    page_size, dtype = draw(st.sampled_from([1, 16, 64])), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    for each in (TorchAttention(), CpuAttention()):
        assert_reaches(each, spec, shapes, page_size, dtype)


@pytest.mark.usefixtures("small_splits")
def test_layers_with_and_without_it_share_a_plan(backend: AttentionBackend) -> None:
    ahead = layer(2, 1, looks_ahead=True)
    plain = dataclasses.replace(ahead, looks_ahead=False)
    row = row_of(ahead, (0, 40, ((4, 36),)), torch.float32, 0)
    batch = dataclasses.replace(step_batch([40], [0], [[2, 0, 1]], 16), reach=row.reach())
    caches = {spec: fresh_cache(backend, spec, 3, 16, torch.float32) for spec in (ahead, plain)}
    plan = backend.plan(batch, 16, CPU)
    for spec in (plain, ahead, plain):
        output = backend.attend(spec, caches[spec], plan, row.query, row.keys, row.values, None)
        torch.testing.assert_close(output.double(), dense(spec, row, None), rtol=1e-5, atol=1e-5)


SPECS = {
    "plain": layer(heads=2, kv_heads=1, looks_ahead=True),
    "everything": layer(
        2, 1, key_dim=32, value_dim=17, sliding_window=45, soft_cap=4.0, has_sinks=True, looks_ahead=True
    ),
}


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize(
    ("backend", "spec", "dtype"),
    [
        *(("cpu", spec, dtype) for spec in SPECS.values() for dtype in (torch.float32, torch.bfloat16)),
        ("triton", SPECS["plain"], torch.bfloat16),
        ("triton", SPECS["everything"], torch.float32),
    ],
    indirect=["backend"],
    ids=str,
)
def test_same_bits_alone_in_a_batch_and_without_looking_ahead(
    backend: AttentionBackend, spec: LayerSpec, dtype: torch.dtype
) -> None:
    """An image changes no bit of other rows, nor of tokens before or behind it."""
    shapes = MIXED if isinstance(backend, CpuAttention) else MIXED[3:]  # the interpreter takes its time
    rows, sinks = [row_of(spec, shape, dtype, i) for i, shape in enumerate(shapes)], random_sinks(spec)
    together = run_paged(backend, spec, rows, 16, dtype, sinks)
    plain = dataclasses.replace(spec, looks_ahead=False)
    without = run_paged(backend, plain, rows, 16, dtype, sinks)
    for row, output, other in zip(rows, together, without, strict=True):
        (alone,) = run_paged(backend, spec, [row], 16, dtype, sinks, seed=5)
        assert same_bits(alone, output)
        past = torch.from_numpy(row.reach() == np.arange(row.context, row.context + row.new) + 1)
        assert same_bits(output[past], other[past])
        assert bool(row.images) != torch.equal(output, other) or past.all()


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_same_bits_wherever_a_chunk_begins(cpu_backend: CpuAttention, spec: LayerSpec, dtype: torch.dtype) -> None:
    whole, sinks = row_of(spec, (0, 700, ((30, 170), (500, 516), (600, 650))), dtype, 0), random_sinks(spec)
    (expected,) = run_paged(cpu_backend, spec, [whole], 16, dtype, sinks)
    for first, end in ((1, 700), (100, 170), (169, 171), (512, 650), (30, 516), (500, 600)):
        chunk = Row(first, end - first, whole.keys[:end], whole.values[:end], whole.query[first:end], whole.images)
        (output,) = run_paged(
            cpu_backend, spec, [dataclasses.replace(chunk, images=within(whole, end))], 16, dtype, sinks
        )
        assert same_bits(output, expected[first:end])


def within(row: Row, end: int) -> tuple[tuple[int, int], ...]:
    return tuple(image for image in row.images if image[1] <= end)


@pytest.mark.parametrize("threads", [2, 5])
def test_same_bits_on_any_number_of_threads(cpu_backend: CpuAttention, threads: int) -> None:
    """A row whose splits are shared out, some of them for tokens of the image alone."""
    spec = layer(looks_ahead=True)
    rows = [row_of(spec, (505, 14, ((503, 519),)), torch.float32, 0)]
    (expected,) = run_paged(cpu_backend, spec, rows, 16, torch.float32)
    torch.set_num_threads(threads)
    (output,) = run_paged(cpu_backend, spec, rows, 16, torch.float32)
    assert same_bits(output, expected)


def lists_of(batch: StepBatch, looks_ahead: bool) -> WorkLists:
    return work_lists(batch, 16, [dataclasses.replace(PLAIN, looks_ahead=looks_ahead)], 1, 0)


def test_short_rows_that_look_ahead_are_among_the_long_ones() -> None:
    """So what is compiled for short rows stays as it is, and decodes beside an image run as ever."""
    batch = batch_of([1, 2, 2, 60], [9, 9, 600, 240])
    reach = batch.positions + 1
    reach[3:5] = 602
    reach[5:45] = 280
    with_images = dataclasses.replace(batch, reach=reach)
    lists = lists_of(with_images, True)
    assert lists.items == (2, 5)
    assert sorted(items_of(lists, 1)[:, [0, 4, 5]].tolist()) == [
        [3, 0, 3], [5, 0, 2], [21, 0, 2], [37, 0, 2], [53, 0, 2],
    ]  # fmt: skip
    assert (lists.values[lists.values[REACH] :][: len(reach)] == reach).all()
    plain = lists_of(with_images, False)
    assert plain.items == lists_of(batch, True).items == (3, 4)
    assert sorted(items_of(plain, 1)[:, 5].tolist()) == [1, 2, 2, 2]


def test_a_step_without_a_reach_has_the_same_work_whatever_layers_there_are() -> None:
    batch = batch_of([1, 4, 5, 60], [9, 9, 600, 240])
    one, other = lists_of(batch, True), lists_of(batch, False)
    assert (one.values[LISTS:] == other.values[LISTS:]).all() and one.items == other.items
