"""Codes of eight bits, what they stand for, and what numbers become."""

import pytest
import torch

from asyncengine.model.quantised.eight_bits import EightBits, as_bytes, nearest_bytes
from asyncengine.model.quantised.four_bits import FP4, INT4, NONLINEAR, FourBits, packed


def random_bytes(outputs: int, inputs: int, group: int, zeros: bool, seed: int = 0) -> EightBits:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scales = (torch.rand(outputs, inputs // group, generator=generator) * 0.01).half().float()
    offsets = torch.randint(-64, 65, scales.shape, generator=generator).float() / 4 if zeros else None
    return EightBits(codes, scales, offsets)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [16, 32, 96])
def test_a_weight_is_its_code_less_the_zero_times_the_scale(group: int, zeros: bool) -> None:
    codes = random_bytes(300, 96, group, zeros)
    assert (codes.shape, codes.group) == ((300, 96), group)
    assert codes.nbytes == 300 * (96 + 4 * 96 // group * (1 + zeros))
    numbers = codes.codes.double()
    if codes.zeros is not None:
        numbers -= codes.zeros.double().repeat_interleave(group, 1)
    wanted = numbers * codes.scales.double().repeat_interleave(group, 1)
    assert torch.equal(codes.weight(torch.float64), wanted)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(codes.weight(dtype), wanted.float().to(dtype))


def test_fp8_has_a_scale_for_each_output() -> None:
    numbers = torch.randn(5, 64).to(torch.float8_e4m3fn)
    codes = EightBits(numbers, torch.rand(5, 1))
    assert codes.group == 64
    assert torch.equal(codes.weight(torch.float32), numbers.float() * codes.scales)


@pytest.mark.parametrize("group", [16, 32])
def test_the_nearest_codes_are_near_and_stay(group: int) -> None:
    weight = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
    weight[3, :group] = 0
    codes = nearest_bytes(weight, group)
    found = codes.weight(torch.float32)
    step = weight.view(200, -1, group).abs().amax(-1).repeat_interleave(group, 1) / 127
    assert ((found - weight).abs() <= 0.501 * step).all()
    assert codes.codes.min() >= -127 and (codes.scales >= 0).all()
    assert not found[3, :group].any()
    again = nearest_bytes(found, group)
    assert torch.equal(again.codes, codes.codes)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_seen_in_its_group(strange: float) -> None:
    weight = torch.randn(4, 96)
    weight[1, 40] = strange
    found = nearest_bytes(weight).weight(torch.float32)
    assert found[1, 32:64].isnan().all()
    found[1, 32:64] = 0
    assert found.isfinite().all()


def test_the_smallest_numbers_do_not_run_over() -> None:
    weight = torch.full((1, 32), 1e-45)
    weight[0, 0] = 2e-43
    assert (nearest_bytes(weight).weight(torch.float32) - weight).abs().max() < 1e-43


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("values", [INT4, FP4, NONLINEAR], ids=["INT4", "FP4", "NONLINEAR"])
def test_four_bits_are_eight_bits_too(values: tuple[float, ...], zeros: bool) -> None:
    codes = torch.randint(0, 16, (130, 64), generator=torch.Generator().manual_seed(0))
    scales = torch.rand(130, 2)
    four = FourBits(packed(codes), scales, torch.rand(130, 2).mul(8).round() if zeros else None, values)
    assert torch.equal(as_bytes(four).weight(torch.float32), four.weight(torch.float32))
