"""The compiled kernel gives a token the same bits whatever happens around it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from attention_case import Row, layer, random_row, random_sinks, run_paged

from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.protocol import LayerSpec

SPECS: dict[str, LayerSpec] = {
    "plain": layer(heads=4, kv_heads=2, key_dim=24, value_dim=40),
    "group of 3": layer(heads=3, kv_heads=1, key_dim=32),
    "group of 8": layer(heads=8, kv_heads=1, key_dim=16),
    "window": layer(sliding_window=150),
    "bias": layer(heads=6, kv_heads=2, distances=129),
    "everything": layer(sliding_window=700, soft_cap=4.0, has_sinks=True, distances=90, key_dim=33, value_dim=17),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
over_specs = pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        pytest.param(
            spec,
            dtype,
            id=f"{name}-{dtype}",  # what is cut how depends on the layer, and each dtype has code of its own
            marks=[pytest.mark.long] * (dtype is not torch.float32 and name not in ("plain", "everything")),
        )
        for name, spec in SPECS.items()
        for dtype in DTYPES
    ],
)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    integer = torch.int32 if one.dtype is torch.float32 else torch.int16
    return torch.equal(one.view(integer), other.view(integer))


def run(backend: CpuAttention, spec: LayerSpec, rows: list[Row], dtype: torch.dtype, **others: Any) -> Any:
    return run_paged(backend, spec, rows, others.pop("page_size", 16), dtype, random_sinks(spec), **others)


@over_specs
def test_same_bits_alone_and_in_a_batch(cpu_backend: CpuAttention, spec: LayerSpec, dtype: torch.dtype) -> None:
    shapes = [(1300, 1), (3, 1), (512, 1), (0, 70), (1000, 90), (511, 2)]
    rows = [random_row(spec, context, new, dtype, i) for i, (context, new) in enumerate(shapes)]
    together = run(cpu_backend, spec, rows, dtype)
    for row, output in zip(rows, together, strict=True):
        (alone,) = run(cpu_backend, spec, [row], dtype, seed=5)
        assert same_bits(alone, output)


@over_specs
def test_same_bits_as_decode_and_in_any_prefill_chunk(
    cpu_backend: CpuAttention, spec: LayerSpec, dtype: torch.dtype
) -> None:
    whole = random_row(spec, 0, 1100, dtype, 0)
    (expected,) = run(cpu_backend, spec, [whole], dtype)
    cuts = [0, 1, 2, 50, 63, 64, 65, 511, 512, 513, 700, 1024, 1099, 1100]
    for first, last in itertools.pairwise(cuts):
        chunk = Row(first, last - first, whole.keys[:last], whole.values[:last], whole.query[first:last])
        (output,) = run(cpu_backend, spec, [chunk], dtype, seed=first)
        assert same_bits(output, expected[first:last])
    for position in (0, 63, 64, 300, 511, 512, 1099):
        decode = Row(
            position, 1, whole.keys[: position + 1], whole.values[: position + 1], whole.query[position : position + 1]
        )
        (output,) = run(cpu_backend, spec, [decode], dtype, seed=position)
        assert same_bits(output, expected[position : position + 1])


@over_specs
def test_same_bits_on_any_number_of_threads(cpu_backend: CpuAttention, spec: LayerSpec, dtype: torch.dtype) -> None:
    """One long row: with several threads its splits are shared out, with one they are not."""
    rows = [random_row(spec, 2100, 1, dtype, 0), random_row(spec, 600, 5, dtype, 1)]
    outputs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outputs.append(run(cpu_backend, spec, rows, dtype))
    for other in outputs[1:]:
        assert all(map(same_bits, outputs[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_any_page_size(cpu_backend: CpuAttention, dtype: torch.dtype) -> None:
    spec = layer(heads=4, kv_heads=2, key_dim=33, value_dim=20, sliding_window=500)
    rows = [random_row(spec, 900, 1, dtype, 0), random_row(spec, 77, 100, dtype, 1)]
    expected = run(cpu_backend, spec, rows, dtype, page_size=64)
    for page_size in (1, 7, 16, 32, 48, 256):
        assert all(map(same_bits, expected, run(cpu_backend, spec, rows, dtype, page_size=page_size)))
