import pytest
import torch

from asyncengine.model.quantised.four_bits import FP4, INT4, NONLINEAR, FourBits, joined, nearest, packed, unpacked


def numbers(outputs: int = 24, inputs: int = 128) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


def test_codes_come_back_as_they_were() -> None:
    codes = torch.randint(0, 16, (3, 5, 8), dtype=torch.uint8)
    assert packed(codes).shape == (3, 5, 4)
    assert torch.equal(unpacked(packed(codes)), codes)
    assert unpacked(torch.tensor([0x21], dtype=torch.uint8)).tolist() == [1, 2]


@pytest.mark.parametrize("zeros", [None, torch.tensor([[1.0], [-2.0]])])
def test_a_weight_is_its_value_less_the_zero_times_the_scale(zeros: torch.Tensor | None) -> None:
    codes, scales = torch.tensor([[0, 8], [15, 3]]), torch.tensor([[0.5], [2.0]])
    off = torch.zeros(2, 1) if zeros is None else zeros
    for values in (INT4, FP4, NONLINEAR):
        found = FourBits(packed(codes), scales, zeros, values).weight(torch.float32)
        assert torch.equal(found, (torch.tensor(values)[codes] - off) * scales)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("values", "most"), [(INT4, 0.12), (FP4, 0.14), (NONLINEAR, 0.11)])
def test_the_nearest_codes_are_near_and_stay(group: int, values: tuple[float, ...], most: float) -> None:
    weight = numbers()
    found = nearest(weight, group, values)
    assert (found.group, found.shape) == (group, tuple(weight.shape))
    rounded = found.weight(torch.float32)
    assert (rounded - weight).norm() < most * weight.norm()
    torch.testing.assert_close(nearest(rounded, group, values).weight(torch.float32), rounded, rtol=1e-6, atol=0)


def test_no_other_code_is_nearer() -> None:
    weight = numbers(4, 32)
    for values in (INT4, FP4, NONLINEAR):
        found = nearest(weight, 32, values)
        each = torch.tensor(values) * found.scales[..., None]  # (outputs, 1, 16)
        least = (weight[..., None] - each).abs().amin(-1)
        torch.testing.assert_close((weight - found.weight(torch.float32)).abs(), least)


def test_zero_is_exact_whatever_stands_beside_it() -> None:
    weight = numbers(2, 64)
    weight[:, ::3] = 0
    weight[1] = 0
    for values in (INT4, FP4):
        rounded = nearest(weight, values=values).weight(torch.float32)
        assert not rounded[:, ::3].any()
        assert not rounded[1].any()
        assert not rounded.isnan().any()


def test_parts_and_what_is_joined_are_rows_of_the_whole() -> None:
    whole, other = nearest(numbers()), nearest(numbers(8))
    assert torch.equal(whole.rows(2, 9).weight(torch.float32), whole.weight(torch.float32)[2:9])
    assert torch.equal(whole.rows(1, 24, 2).weight(torch.float32), whole.weight(torch.float32)[1::2])
    with_zeros = FourBits(other.codes, other.scales, torch.ones_like(other.scales))
    both = joined([whole, with_zeros])
    wanted = torch.cat([each.weight(torch.float32) for each in (whole, with_zeros)])
    assert torch.equal(both.weight(torch.float32), wanted)
