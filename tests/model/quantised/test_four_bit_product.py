"""Products with weights of four bits, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from asyncengine.model.decoder.experts import CLAMPED
from asyncengine.model.quantised import four_bit_product
from asyncengine.model.quantised.four_bit_product import Gate, Matrices, multiply, multiply_experts
from asyncengine.model.quantised.four_bits import FP4, INT4, NONLINEAR, FourBits, packed
from tests.model.attention.triton_device import DEVICE, require_triton
from tests.model.fused.interpreted import large_tiles

pytestmark = pytest.mark.loops("either")

require_triton()

EXPERTS, HIDDEN, INNER = 6, 64, 96
NUMBERS = ("integers", "integers with zeros", "floats", "nonlinear")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def some(outputs: int, inputs: int, group: int = 32, numbers: str = "integers", power: bool = False) -> FourBits:
    """Weights of about 1, with scales that are powers of two if `power`."""
    scales = torch.rand(outputs, inputs // group) + 0.5
    scales = torch.exp2(torch.randint(-6, 0, scales.shape).float()) if power else scales / 8
    zeros = torch.randint(-8, 8, scales.shape).float() if numbers == "integers with zeros" else None
    codes = packed(torch.randint(0, 16, (outputs, inputs)))
    values = {"floats": FP4, "nonlinear": NONLINEAR}.get(numbers, INT4)
    return there(FourBits(codes, scales / 16 if values == NONLINEAR else scales, zeros, values))


def there(weights: FourBits) -> FourBits:
    parts = {name: getattr(weights, name) for name in ("codes", "scales", "zeros")}
    return dataclasses.replace(weights, **{name: part.to(DEVICE) for name, part in parts.items() if part is not None})


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize(
    ("inputs", "group", "numbers"),
    [
        *((96, 32, numbers) for numbers in NUMBERS),
        *((inputs, group, "integers with zeros") for inputs, group in ((64, 16), (640, 128), (192, 96), (32, 32))),
    ],
)
@pytest.mark.in_short(
    "96-32-integers with zeros", "96-32-floats", "96-32-integers", "96-32-nonlinear", "640-128-integers with zeros"
)
def test_a_product_is_that_of_the_weights(inputs: int, group: int, numbers: str, tokens: int) -> None:
    weights, x, bias = some(37, inputs, group, numbers), normal(tokens, inputs), normal(37)
    found = multiply(x, weights, bias)
    assert off(found, x @ weights.weight(torch.float32).T + bias) < 1e-6
    assert off(multiply(x, weights), found - bias) < 1e-6


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        *((numbers, dtype) for numbers in NUMBERS for dtype in (torch.bfloat16, torch.float16)),
        ("integers with zeros", torch.float32),
    ],
    ids=str,
)
@pytest.mark.in_short("torch.bfloat16")
def test_weights_that_the_dtype_holds_are_exact(numbers: str, dtype: torch.dtype) -> None:
    weights = some(40, 64, numbers=numbers, power=True)
    each = torch.eye(64, dtype=dtype, device=DEVICE)
    wanted = weights.weight(dtype).T
    assert torch.equal(wanted.float(), weights.weight(torch.float32).T)
    for tokens in (2, 16, 40, 64):  # as many as there are kinds of tiles
        assert torch.equal(multiply(each[:tokens], weights), wanted[:tokens])
    for token in (0, 13, 63):
        assert torch.equal(multiply(each[token : token + 1], weights), wanted[token : token + 1])


@pytest.mark.parametrize("tokens", [1, 5, 33, 49, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_bytes_are_off_by_little_more_than_rounding(dtype: torch.dtype, tokens: int) -> None:
    """Interpreted, what is stored in bfloat16 is cut off, not rounded: weights, scales and results."""
    weights, x = some(70, 256, 128), normal(tokens, 256, dtype=dtype)
    found = multiply(x, weights)
    assert found.dtype is dtype
    assert off(found, x.float() @ weights.weight(torch.float32).T) < (1e-2 if dtype is torch.bfloat16 else 1e-3)


def test_scales_may_be_in_two_bytes() -> None:
    weights, x = some(24, 64, numbers="floats", power=True), normal(3, 64)
    short = dataclasses.replace(weights, scales=weights.scales.to(torch.bfloat16))
    for rows in (x, x[:1]):
        assert torch.equal(multiply(rows, short), multiply(rows, weights))


def test_tiny_and_huge_scales_and_inputs_are_multiplied_as_any() -> None:
    for numbers in NUMBERS:
        weights, x = some(16, 32, numbers=numbers, power=True), normal(2, 32)
        wanted = multiply(x, weights), multiply(x[:1], weights)
        for of_scales, of_x in ((2.0**-60, 2.0**40), (2.0**40, 2.0**-40)):
            moved = dataclasses.replace(weights, scales=weights.scales * of_scales)
            found = multiply(x * of_x, moved), multiply(x[:1] * of_x, moved)
            for mine, theirs in zip(found, wanted, strict=True):
                assert torch.equal(mine, theirs * (of_scales * of_x))


def test_rows_between_which_something_lies_are_multiplied() -> None:
    weights, wide = some(16, 64), normal(5, 200)
    assert off(multiply(wide[:, 7:71], weights), wide[:, 7:71] @ weights.weight(torch.float32).T) < 1e-6
    odd = normal(65)[1:].view(1, 64).to(torch.bfloat16)
    assert torch.equal(multiply(odd, weights), multiply(odd.clone(), weights))


def test_no_tokens_make_no_results() -> None:
    assert multiply(normal(0, 64), some(16, 64)).shape == (0, 16)
    gate_up, down, _, _ = both("floats", biased=False)
    none = torch.empty(0, 2, dtype=torch.long, device=DEVICE)
    assert multiply_experts(normal(0, HIDDEN), gate_up, down, none, normal(0, 2), Gate()).shape == (0, HIDDEN)


def test_weights_that_no_kernel_reads_are_refused() -> None:
    x = normal(1, 64)
    whole = some(16, 64)
    for wrong, reason in (
        (some(16, 48, 16), "48 inputs in groups of 16"),
        (some(16, 64, 8), "64 inputs in groups of 8"),
        (
            dataclasses.replace(whole, values=tuple(map(float, range(16)))),
            "integers, or FP4 or NONLINEAR without zeros",
        ),
        (
            dataclasses.replace(some(16, 64, numbers="integers with zeros"), values=FP4),
            "FP4 or NONLINEAR without zeros",
        ),
        (whole.rows(0, 16, 2), "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=reason):
            multiply(x[:, : wrong.shape[1]], wrong)


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_nothing_is_read_or_written_beside(tokens: int) -> None:
    """Around everything that is read are numbers that would show, and around what is written some that must stay."""
    outputs, inputs = 21, 96

    def amid(part: torch.Tensor, around: float) -> torch.Tensor:
        size = part.numel()
        buffer = torch.full((size + 128,), around, dtype=part.dtype, device=DEVICE)
        buffer[64 : 64 + size] = part.flatten()
        return buffer[64 : 64 + size].view(part.shape)

    inside = some(outputs, inputs, numbers="integers with zeros")
    assert inside.zeros is not None
    nan = float("nan")
    weights = FourBits(amid(inside.codes, 255), amid(inside.scales, nan), amid(inside.zeros, nan))
    x, bias = amid(normal(tokens, inputs), nan), amid(normal(outputs), nan)
    buffer = torch.full((tokens * outputs + 128,), 7.0, device=DEVICE)
    result = buffer[64:-64].view(tokens, outputs)
    product = four_bit_product._Product(Matrices.of(weights, bias), weights, bias)
    if tokens == 1:
        product.by_row(x, result)
    else:
        product.by_tile(x, result, product.tile(tokens, x.dtype))
    assert off(result, x @ inside.weight(torch.float32).T + bias) < 1e-6
    assert buffer[:64].eq(7).all() and buffer[-64:].eq(7).all()


def both(numbers: str, biased: bool) -> tuple[FourBits, FourBits, torch.Tensor | None, torch.Tensor | None]:
    """Gate and up projections of all experts, down projections, and their biases."""
    biases = (normal(EXPERTS, 2 * INNER), normal(EXPERTS, HIDDEN)) if biased else (None, None)
    return some(EXPERTS * 2 * INNER, HIDDEN, numbers=numbers), some(EXPERTS * HIDDEN, INNER, numbers=numbers), *biases


def gpt_oss() -> tuple[Any, Gate, Any]:
    """Experts of transformers, what is between their products, and the same of four bits."""
    module: Any = GptOssExperts(
        GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    ).to(DEVICE)
    parts = both("floats", biased=True)
    wide = [part.weight(torch.float32).view(EXPERTS, -1, part.shape[1]).transpose(1, 2) for part in parts[:2]]
    for name, value in zip(("gate_up_proj", "down_proj"), wide, strict=True):
        getattr(module, name).data = value.contiguous()
    module.gate_up_proj_bias.data, module.down_proj_bias.data = parts[2], parts[3]
    return module.requires_grad_(False), Gate(CLAMPED, True, module.alpha, module.limit), parts


def mixtral() -> tuple[Any, Gate, Any]:
    """As `gpt_oss`."""
    module: Any = MixtralExperts(
        MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    ).to(DEVICE)
    parts = both("integers with zeros", biased=False)
    wide = [part.weight(torch.float32).view(EXPERTS, -1, part.shape[1]) for part in parts[:2]]
    module.gate_up_proj.data, module.down_proj.data = wide
    return module.requires_grad_(False), Gate(), parts


CHOICES = {
    "one token": [[4, 1]],
    "one that has one expert": [[2]],
    "another for each": [[0, 3], [5, 1], [2, 4]],
    "all the same": [[3, 5]] * 9,
    "some that nobody has": [[0, 1], [1, 2], [2, 0], [0, 2]] * 3,
    "one that many have": [[4, i % 4] for i in range(33)],
}


@pytest.mark.parametrize(
    ("make", "name"), [*((gpt_oss, name) for name in CHOICES), (mixtral, "one token"), (mixtral, "another for each")]
)
def test_experts_are_those_of_transformers(make: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    large_tiles(monkeypatch, 64)
    module, gate, (gate_up, down, gate_up_bias, down_bias) = make()
    chosen = torch.tensor(CHOICES[name], device=DEVICE)
    x, shares = normal(len(chosen), HIDDEN), normal(*chosen.shape).softmax(-1)
    found = multiply_experts(x, gate_up, down, chosen, shares, gate, gate_up_bias, down_bias)
    assert off(found, module(x, chosen, shares)) < 1e-6


def test_few_pairs_and_many_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    large_tiles(monkeypatch, 32)
    _, gate, (gate_up, down, gate_up_bias, down_bias) = gpt_oss()
    x, chosen = normal(1, HIDDEN, dtype=torch.bfloat16), torch.tensor([[1, 4]], device=DEVICE)
    shares = normal(1, 2).softmax(-1)
    few = multiply_experts(x, gate_up, down, chosen, shares, gate, gate_up_bias, down_bias)
    again, which = x.repeat(20, 1), chosen.repeat(20, 1)
    many = multiply_experts(again, gate_up, down, which, shares.repeat(20, 1), gate, gate_up_bias, down_bias)
    assert torch.equal(many, many[:1].expand_as(many))
    assert off(many[:1], few) < 3e-2  # interpreted, what is stored in bfloat16 is cut off


def test_what_else_is_in_a_step_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is multiplied by the same kernel, cut in the same way."""
    weights, x = some(40, 320), normal(11, 320)
    assert torch.equal(multiply(x[:3], weights), multiply(x, weights)[:3])
    large_tiles(monkeypatch, 32)
    gate_up, down, _, _ = both("integers", biased=False)
    chosen = torch.tensor([[0], [5], [5]], device=DEVICE)
    x, shares = x[:3, :HIDDEN], normal(3, 1)
    together = multiply_experts(x, gate_up, down, chosen, shares, Gate())
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(multiply_experts(x[one], gate_up, down, chosen[one], shares[one], Gate()), together[one])


@pytest.mark.parametrize("tokens", [1, 4])
def test_an_expert_that_does_not_exist_adds_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    large_tiles(monkeypatch, 32)
    _, gate, (gate_up, down, gate_up_bias, down_bias) = gpt_oss()
    x, shares = normal(tokens, HIDDEN), normal(tokens, 2)
    chosen = torch.tensor([[1, EXPERTS], [-1, 5], [2, 3], [EXPERTS, EXPERTS]], device=DEVICE)[:tokens]
    found = multiply_experts(x, gate_up, down, chosen, shares, gate, gate_up_bias, down_bias)
    absent = (chosen < 0) | (chosen == EXPERTS)
    inside, without = chosen.masked_fill(absent, 0), shares.masked_fill(absent, 0.0)
    assert off(found, multiply_experts(x, gate_up, down, inside, without, gate, gate_up_bias, down_bias)) < 1e-6
    assert tokens == 1 or found[3].eq(0).all()


@pytest.mark.parametrize(("pairs", "experts", "tokens"), [(1, 4, 16), (7, 3, 2), (40, 1, 16), (1100, 5, 64)])
def test_work_covers_every_pair_once_by_expert(pairs: int, experts: int, tokens: int) -> None:
    chosen = torch.randint(0, experts, (pairs, 1))
    chosen[torch.rand(pairs, 1) < 0.3] = experts - 1
    work = four_bit_product._Work.of(chosen.to(DEVICE), experts, tokens)
    order, seen = work.order.tolist(), list[int]()
    for expert, first, count in work.items.tolist():
        assert 0 <= count <= tokens
        mine = order[first : first + count]
        assert all(int(chosen[pair]) == expert for pair in mine)
        seen += mine
    assert sorted(seen) == list(range(pairs))
    assert seen == torch.argsort(chosen[:, 0], stable=True).tolist()
