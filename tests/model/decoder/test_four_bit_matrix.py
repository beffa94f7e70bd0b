"""Products with weights of four bits, beside those of the numbers that the codes stand for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from asyncengine.model.attention import kernel
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.decoder.byte_matrix import ByteMatrix
from asyncengine.model.decoder.compiled_linear import CompiledLinear, Products
from asyncengine.model.decoder.four_bit_matrix import FourBitMatrix, packed
from asyncengine.model.decoder.weights import MatrixStruct, PackedMatrix, Packing
from asyncengine.model.quantised.eight_bits import EightBits
from asyncengine.model.quantised.four_bits import FP4, INT4, NONLINEAR, FourBits, nearest
from asyncengine.model.quantised.four_bits import packed as packed_codes


def product(library: Any, matrix: PackedMatrix | MatrixStruct, rows: torch.Tensor, most_rows: int = 6) -> torch.Tensor:
    """(rows, groups of outputs, lanes)"""
    struct, lanes = matrix if isinstance(matrix, MatrixStruct) else matrix.struct, library.decoder_lanes()
    groups = struct.outputs // lanes if isinstance(matrix, MatrixStruct) else sum(each.groups for each in matrix.places)
    sums = torch.empty(len(rows), groups, lanes)
    library.product(ctypes.addressof(struct), rows.data_ptr(), len(rows), most_rows, sums.data_ptr())
    return sums


def of_part(matrix: PackedMatrix, part: int, outputs: int, sums: torch.Tensor) -> torch.Tensor:
    """(rows, outputs) of one of the layers."""
    place = matrix.places[part]
    return sums[:, place.start :: place.step][:, : place.groups].flatten(1)[:, :outputs]


def random_codes(outputs: int, inputs: int, group: int, values: tuple[float, ...], zeros: bool, seed: int) -> FourBits:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator)
    scales = (torch.randn(outputs, inputs // group, generator=generator) * 0.01).half().float()
    offsets = torch.randint(-8, 9, scales.shape, generator=generator).float() if zeros else None
    return FourBits(packed_codes(codes), scales, offsets, values)


def random_rows(count: int, inputs: int, exact: bool) -> torch.Tensor:
    """Rows; exact ones lose nothing when 32 neighbours share a scale."""
    rows = torch.randn(count, inputs, generator=torch.Generator().manual_seed(1))
    if exact:
        rows = (rows.clamp(-4, 4) * 8191).round()
        rows[:, ::32] = 32767
        rows /= 8192
    return rows


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("sizes", "turns", "inputs", "groups", "values", "zeros"),
    [
        ([48], 1, 256, [32], INT4, [False]),
        ([37], 1, 192, [64], INT4, [True]),
        ([48, 16, 5], 1, 256, [128, 64, 256], INT4, [True, False, True]),
        ([70, 70], 2, 96, [32, 96], FP4, [False, False]),
        ([1], 1, 32, [32], FP4, [False]),
        ([40, 24], 1, 160, [32, 32], NONLINEAR, [False, False]),
    ],
    ids=["groups of 32", "zeros", "siblings", "by turns", "least", "nonlinear"],
)
def test_products_are_those_of_the_numbers(
    sizes: list[int], turns: int, inputs: int, groups: list[int], values: Any, zeros: list[bool], library: Any
) -> None:
    """Rows are rounded to integers of 16 bits. Where that loses nothing, float32 alone rounds."""
    parts = [
        random_codes(size, inputs, group, values, zero, seed)
        for seed, (size, group, zero) in enumerate(zip(sizes, groups, zeros, strict=True))
    ]
    matrix = FourBitMatrix(library, parts, [None] * len(parts), turns=turns)
    for exact, most in ((True, 1e-6), (False, 1e-4)):
        rows = random_rows(7, inputs, exact)
        sums = product(library, matrix, rows)
        for number, part in enumerate(parts):
            wanted = rows.double() @ part.weight(torch.float64).T
            assert error(of_part(matrix, number, sizes[number], sums), wanted) < most


@pytest.mark.parametrize("code", [0, 15])
def test_the_largest_sums_of_a_bundle_are_no_wider_than_an_integer(code: int, library: Any) -> None:
    """All inputs and all values as far from 0 as they can be, on either side."""
    codes = FourBits(packed_codes(torch.full((16, 64), code)), torch.ones(16, 2), None, NONLINEAR)
    matrix = FourBitMatrix(library, [codes], [None])
    for sign in (1.0, -1.0):
        rows = torch.full((2, 64), sign)
        found = of_part(matrix, 0, 16, product(library, matrix, rows))
        assert error(found, rows.double() @ codes.weight(torch.float64).T) < 1e-6


def test_a_row_gets_the_same_bits_beside_any_number_of_others(library: Any) -> None:
    matrix = FourBitMatrix(library, [random_codes(208, 160, 32, INT4, True, 0)], [None])
    rows = random_rows(13, 160, exact=False)
    alone = product(library, matrix, rows, most_rows=1)
    for most in range(2, 7):
        assert torch.equal(product(library, matrix, rows, most), alone)


@pytest.mark.parametrize(
    ("values", "group", "zeros"),
    [(INT4, 32, False), (INT4, 64, True), (FP4, 32, False), (NONLINEAR, 32, False)],
    ids=["INT4", "zeros", "FP4", "NONLINEAR"],
)
@pytest.mark.parametrize("rows", [13, 68, 93])
def test_many_rows_have_the_bits_of_each_alone(values: Any, group: int, zeros: bool, rows: int) -> None:
    """Whatever multiplies many: more outputs, inputs and rows than go through it at a time, and the largest numbers."""
    codes = random_codes(565, 1216, group, values, zeros, 0)
    codes.codes[:2] = torch.tensor([[0x00], [0xFF]])
    check_many_rows(codes, codes.weight(torch.float64), rows)


def check_many_rows(codes: FourBits | EightBits | torch.Tensor, weight: torch.Tensor, rows: int) -> None:
    """Of a weight (565, 1216) whose first two outputs have the largest numbers of either side."""
    products = Products(CpuAttention("int4").library("int4"), torch.bfloat16, "int4")
    layer = nn.Linear(1216, 565, dtype=torch.bfloat16)
    nn.init.zeros_(layer.bias[:2])
    matrix = packed(products.library, [codes], [None], "int8" if isinstance(codes, torch.Tensor) else "int4")
    compiled = CompiledLinear(products, layer, matrix, nn.Parameter(torch.empty(0)))
    x = torch.randn(rows, 1216, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[1], x[2], x[3, 700], x[4, 40] = 1, -1, torch.nan, torch.inf
    x[5] = torch.tensor([1.0, -1.0] * 15 + [0.0, 1 / 32767]).repeat(38)  # of large sums little is left
    found, alone = compiled(x), torch.cat([compiled(row[None]) for row in x])
    assert torch.equal(found.view(torch.int16), alone.view(torch.int16))
    assert not found[3:5].isfinite().any()
    usual = [*range(3), *range(5, rows)]
    assert error(found[usual], x[usual].double() @ weight.T + layer.bias.detach().double()) < 3e-3


def test_bytes_beside_them_are_multiplied_by_the_same_integers(library: Any) -> None:
    """So the head is, and whatever is not in four bits."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (208, 160), generator=generator, dtype=torch.int8)
    scales = torch.rand(208, generator=generator)
    stored = weight.view(-1, library.decoder_lanes(), 160).transpose(1, 2).contiguous()
    struct = MatrixStruct(stored.data_ptr(), scales.data_ptr(), None, *weight.shape, None)
    rows = random_rows(13, 160, exact=True)
    found = product(library, struct, rows, most_rows=1)
    assert error(found.flatten(1), rows.double() @ weight.double().T * scales.double()) < 1e-6
    for most in range(2, 7):
        assert torch.equal(product(library, struct, rows, most), found)


def test_what_is_no_number_stays_none(library: Any) -> None:
    matrix = FourBitMatrix(library, [random_codes(16, 64, 32, INT4, False, 0)], [None])
    rows = random_rows(4, 64, exact=False)
    wanted = product(library, matrix, rows)[3]
    rows[0, 40], rows[1, 40], rows[2] = torch.nan, torch.inf, 1e-38
    found = product(library, matrix, rows)
    assert not found[:2].isfinite().any()
    assert found[2].abs().max() < 1e-36
    assert torch.equal(found[3], wanted)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scales_may_be_of_any_size(size: float, library: Any) -> None:
    """Float16 could not hold them: powers of two, as MXFP4 has them, one far from the other."""
    codes = random_codes(32, 128, 32, FP4, False, 0)
    powers = torch.randint(-12, 13, codes.scales.shape, generator=torch.Generator().manual_seed(2))
    scales = torch.tensor(size).log2().round().exp2() * powers.float().exp2()
    codes = FourBits(codes.codes, scales, None, FP4)
    rows = random_rows(3, 128, exact=True)
    matrix = FourBitMatrix(library, [codes], [None])
    found = of_part(matrix, 0, 32, product(library, matrix, rows))
    assert error(found, rows.double() @ codes.weight(torch.float64).T) < 1e-6


@pytest.mark.parametrize("values", [INT4, FP4, NONLINEAR], ids=["INT4", "FP4", "NONLINEAR"])
def test_numbers_become_the_nearest_codes(values: Any, library: Any) -> None:
    """Also beside a layer that has codes: in its groups, to what its codes stand for."""
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight[3] = 0
    beside = random_codes(24, 128, 64, values, True, 0)
    matrix = FourBitMatrix(library, [beside, weight], [None, None])
    rows = random_rows(5, 128, exact=True)
    rounded = nearest(weight, 64, values).weight(torch.float64)
    found = of_part(matrix, 1, 40, product(library, matrix, rows))
    assert error(found, rows.double() @ rounded.T) < 1e-3  # scales are rounded to float16


def test_a_weight_that_is_no_number_is_not_hidden(library: Any) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight[3, 5], weight[7, 40] = torch.nan, torch.inf
    found = product(library, FourBitMatrix(library, [weight], [None]), random_rows(2, 64, exact=False)).flatten(1)
    assert found[:, :16].isnan().nonzero().tolist() == [[0, 3], [0, 7], [1, 3], [1, 7]]


def test_new_numbers_replace_codes_and_can_be_taken_back(library: Any) -> None:
    first, second = (random_codes(40, 128, 64, INT4, zeros, seed) for seed, zeros in ((0, True), (1, False)))
    matrix, rows = FourBitMatrix(library, [first, second], [None, None]), random_rows(5, 128, exact=True)
    before = product(library, matrix, rows)
    restore = matrix.restorer()
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    matrix.write(0, weight)
    after = product(library, matrix, rows)
    assert error(of_part(matrix, 0, 40, after), rows.double() @ nearest(weight, 64).weight(torch.float64).T) < 1e-3
    assert torch.equal(of_part(matrix, 1, 40, after), of_part(matrix, 1, 40, before))
    restore()
    assert torch.equal(product(library, matrix, rows), before)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_packed_later_is_the_same(transposed: bool, library: Any) -> None:
    weight = torch.randn(128, 40, generator=torch.Generator().manual_seed(3)).bfloat16().T
    weight = weight if transposed else weight.contiguous()
    codes = random_codes(24, 128, 32, INT4, False, 0)
    at_once, later = FourBitMatrix(library, [codes, weight], [None, None]), Packing(library)
    matrix = FourBitMatrix(library, [codes, weight], [None, None], later=later)
    later.run()
    rows = random_rows(3, 128, exact=False)
    assert torch.equal(product(library, matrix, rows), product(library, at_once, rows))


def test_four_bits_take_a_quarter_and_scales_an_eighth_of_that() -> None:
    library = kernel.load(kernel.build("int4"))
    assert FourBitMatrix(library, [torch.ones(64, 256).bfloat16()], [None]).nbytes == 64 * (128 + 16 + 4)


@pytest.mark.parametrize("weight", [torch.ones(16, 48).bfloat16(), random_codes(16, 48, 16, INT4, False, 0)])
def test_half_a_bundle_is_stored_in_bytes_with_a_scale_for_each_output(weight: torch.Tensor | FourBits) -> None:
    matrix = packed(kernel.load(kernel.build("int4")), [weight], [None], "int4")
    assert matrix.weights.dtype is torch.int8
    numbers = weight.weight(torch.bfloat16) if isinstance(weight, FourBits) else weight
    assert torch.equal(matrix.weights, PackedMatrix(matrix._library, [numbers], [None], int8=True).weights)


@pytest.mark.parametrize(
    "weights",
    [
        lambda: [random_codes(16, 64, 16, INT4, False, 0)],
        lambda: [random_codes(16, 64, 32, values, False, 0) for values in (INT4, FP4)],
    ],
    ids=["small groups", "two tables"],
)
def test_codes_that_do_not_fit_become_bytes(weights: Callable[[], list[Any]]) -> None:
    given = weights()
    assert type(packed(kernel.load(kernel.build("int4")), given, [None] * len(given), "int4")) is ByteMatrix


def test_codes_beside_weights_that_are_none_become_bytes() -> None:
    """Which are left out where others are quantised, and are not to be rounded so far."""
    library = CpuAttention("int4").library("int4")
    codes = random_codes(32, 64, 32, INT4, False, 0)
    weight = torch.randn(16, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    assert type(packed(library, [codes, weight], [None, None], "int8")) is ByteMatrix
    assert type(packed(library, [codes, codes], [None, None], "int8")) is FourBitMatrix
    assert type(packed(library, [weight, weight], [None, None], "int4")) is FourBitMatrix
