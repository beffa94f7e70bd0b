"""Keys and values in fp8: what is stored, what is attended to, and who refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_case import (
    CPU,
    FP8,
    TOLERANCE,
    dense,
    fresh_cache,
    layer,
    random_row,
    random_sinks,
    run_paged,
    shuffled_tables,
    step_batch,
)
from test_invariance import same_bits
from triton_device import TritonOnDevice, require_triton

from asyncengine.model.attention import fp8, triton_tiles
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.protocol import AttentionBackend, BackendUnavailableError, LayerSpec
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.attention.triton_tiles import Launch, Tiles

# (context, new): decodes within a split and over several, a prefill, a chunk after a context, a verification of 3.
MIXED = [(0, 1), (64, 1), (270, 1), (0, 21), (50, 9), (30, 3)]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return TorchAttention() if request.param == "torch" else request.getfixturevalue("triton_backend")


def as_kept(row: Any, spec: LayerSpec) -> Any:
    """A row whose keys and values went through fp8."""
    keys, values = (
        (numbers / scale).to(FP8).double() * scale
        for numbers, scale in ((row.keys, spec.key_scale), (row.values, spec.value_scale))
    )
    return dataclasses.replace(row, keys=keys, values=values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"sliding_window": 33, "soft_cap": 5.0, "has_sinks": True},
        {"key_scale": 64.0, "value_scale": 2.0**-10},
        {"kv_heads": 1, "value_dim": 24, "values_in_keys": True, "key_scale": 0.5, "value_scale": 0.5},
    ],
    ids=str,
)
@pytest.mark.in_short("torch.bfloat16")
def test_what_was_rounded_to_fp8_is_attended_to_as_exactly_as_in_the_models_dtype(
    backend: AttentionBackend, features: dict[str, Any], dtype: torch.dtype
) -> None:
    spec = layer(**features)
    rows = [random_row(spec, context, new, dtype, i) for i, (context, new) in enumerate(MIXED)]
    if spec.key_scale > 1.0:  # keys that would be cut off, values that would vanish, scores and output as ever
        for row in rows:
            row.keys *= 512
            row.query /= 512
            row.values *= 2.0**-10
    sinks = random_sinks(spec)
    outputs = run_paged(backend, spec, rows, 16, dtype, sinks, kv_dtype=FP8)
    # The Triton kernel multiplies in float16, whatever the model's dtype.
    tolerance = max(TOLERANCE[dtype], TOLERANCE[torch.float16])
    for row, output in zip(rows, outputs, strict=True):
        assert output.dtype == dtype
        expected = dense(spec, as_kept(row, spec), sinks) / spec.value_scale
        torch.testing.assert_close(output.double() / spec.value_scale, expected, rtol=tolerance / 2, atol=tolerance)
        error = (output.double() - dense(spec, row, sinks)).norm() / output.double().norm()
        assert error < 0.06  # a unit in the last of 3 bits of mantissa is 1/8, so one number is at most 1/16 off


def written(backend: AttentionBackend, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes that are kept of (tokens, dim) numbers as keys, and as values."""
    spec = layer(1, 1, key_dim=numbers.shape[1])
    tables, num_blocks = shuffled_tables([len(numbers)], 16, 0)
    cache = fresh_cache(backend, spec, num_blocks, 16, FP8)
    plan = backend.plan(step_batch([len(numbers)], [0], tables, 16), 16, CPU)
    backend.attend(spec, cache, plan, numbers[:, None] * 0, numbers[:, None], numbers[:, None], None)
    place = [table * 16 + i for table in tables[0] for i in range(16)][: len(numbers)]
    # Both layouts are (blocks, page, dim) where there is one head.
    found = [x.view(torch.uint8).cpu().reshape(num_blocks * 16, -1)[place] for x in (cache.keys, cache.values)]
    return found[0], found[1]


def test_every_number_is_kept_as_the_nearest_there_is(backend: AttentionBackend) -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    between = (codes[1:] + codes[:-1]) / 2
    beside = torch.nextafter(between, torch.tensor(torch.inf)), torch.nextafter(between, torch.tensor(0.0))
    random = torch.randn(1024, generator=torch.Generator().manual_seed(0)).exp()
    some = torch.cat((codes, between, *beside, random, torch.tensor([0.0, 1e-30, 447.9])))
    numbers = torch.cat((some, -some))
    numbers = torch.cat((numbers, numbers.new_zeros(-len(numbers) % 32))).view(-1, 32)
    for found in written(backend, numbers):
        assert torch.equal(found.view(FP8).float(), numbers.to(FP8).float())


def test_what_is_too_large_is_cut_off_and_what_is_no_number_stays_none(backend: AttentionBackend) -> None:
    numbers = torch.tensor([[449.0, 1e9, torch.inf, -1e9, -torch.inf, torch.nan, 464.1, 1.0] * 2])
    for found in written(backend, numbers):
        kept = found.view(FP8).float()[0, :8]
        torch.testing.assert_close(kept[[0, 1, 2, 3, 4, 6, 7]], torch.tensor([448.0] * 3 + [-448.0] * 2 + [448, 1]))
        assert kept[5].isnan()


def test_copy_blocks(backend: AttentionBackend) -> None:
    spec = layer()
    row = random_row(spec, 0, 32, torch.bfloat16, 0)
    cache = fresh_cache(backend, spec, 6, 16, FP8)
    plan = backend.plan(step_batch([32], [0], [[0, 1]], 16), 16, CPU)
    whole = backend.attend(spec, cache, plan, row.query, row.keys, row.values, None)
    backend.copy_blocks([cache], torch.tensor([[0, 2], [1, 3], [0, 1]]))
    plan = backend.plan(step_batch([1], [31], [[2, 3]], 16), 16, CPU)
    last = backend.attend(spec, cache, plan, row.query[-1:], row.keys[-1:], row.values[-1:], None)
    torch.testing.assert_close(last, whole[-1:])


def test_a_block_takes_half_of_what_it_takes_in_bfloat16(backend: AttentionBackend) -> None:
    spec = layer(key_dim=9, value_dim=5)
    cache = backend.allocate(spec, 11, 16, FP8, CPU)
    assert cache.keys.nbytes + cache.values.nbytes == 11 * backend.bytes_per_block(spec, 16, FP8)
    assert 2 * backend.bytes_per_block(spec, 16, FP8) == backend.bytes_per_block(spec, 16, torch.bfloat16)


def test_same_bits_alone_and_in_a_batch_and_however_the_work_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    require_triton()
    monkeypatch.setitem(triton_tiles.TABLE, (1, 32), Tiles(32, 32, Launch(16, 4, 2), Launch(32, 4, 2)))
    spec = layer(2, 1, sliding_window=90)
    rows = [random_row(spec, context, new, torch.bfloat16, i) for i, (context, new) in enumerate([(150, 1), (70, 9)])]

    def run(rows: list[Any], programs: int) -> list[torch.Tensor]:
        return run_paged(TritonOnDevice(programs, 1 << 19), spec, rows, 16, torch.bfloat16, kv_dtype=FP8)

    together, shared_out = run(rows, 1), run(rows, 20)
    for i, row in enumerate(rows):
        (alone,) = run([row], 6)
        assert same_bits(alone, together[i])
        assert same_bits(alone, shared_out[i])


def test_the_kernel_for_the_cpu_refuses(cpu_backend: CpuAttention) -> None:
    with pytest.raises(BackendUnavailableError, match=r"stores float32, bfloat16, float16, not torch\.float8"):
        cpu_backend.allocate(layer(), 1, 16, FP8, CPU)


def test_devices_that_cannot_convert_fp8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from asyncengine.model.attention.triton import TritonAttention

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, refused in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        attention, device = TritonAttention(), torch.device("cuda")
        attention.check_dtype(torch.bfloat16, device)
        if refused:
            with pytest.raises(BackendUnavailableError, match=r"8\.9 and later, not 8\.0 \(NVIDIA A100\)"):
                attention.check_dtype(FP8, device)
        else:
            attention.check_dtype(FP8, device)


def test_a_scale_is_a_power_of_two_where_numbers_would_be_cut_off_or_vanish() -> None:
    for usual in (0.25, 1.0, 56.0, 0.0, float("nan"), float("inf")):
        assert fp8.scale_for(usual) == 1.0
    assert fp8.scale_for(56.1) == 2.0
    assert fp8.scale_for(2000.0) == 64.0
    assert fp8.scale_for(0.01) == 2.0**-12
    for largest in (60.0, 1e4, 0.2, 1e-5):
        assert 28.0 <= largest / fp8.scale_for(largest) <= 56.0
    assert fp8.scales(layer(key_scale=2.0), torch.bfloat16) == (1.0, 1.0)
    assert fp8.scales(layer(key_scale=2.0), FP8) == (2.0, 1.0)
