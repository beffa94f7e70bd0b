"""Products with weights of eight bits that share scales with some inputs, beside those of the numbers."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import nn

from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.decoder.byte_matrix import ByteMatrix
from asyncengine.model.decoder.compiled_linear import CompiledLinear, Products
from asyncengine.model.decoder.four_bit_matrix import FourBitMatrix, packed
from asyncengine.model.decoder.weights import PackedMatrix, Packing
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.eight_bits import EightBits, nearest_bytes
from asyncengine.model.quantised.four_bits import FP4, INT4, NONLINEAR
from tests.model.decoder.test_four_bit_matrix import (
    check_many_rows,
    error,
    of_part,
    product,
    random_codes,
    random_rows,
)
from tests.model.quantised.test_eight_bits import random_bytes


@pytest.mark.parametrize(
    ("sizes", "turns", "inputs", "groups", "zeros"),
    [
        ([48], 1, 256, [32], [False]),
        ([37], 1, 192, [16], [False]),
        ([37], 1, 192, [16], [True]),
        ([50], 1, 160, [32], [True]),
        ([48, 16, 5], 1, 256, [128, 16, 256], [True, False, True]),
        ([70, 70], 2, 96, [32, 96], [False, True]),
        ([1], 1, 32, [32], [False]),
    ],
    ids=["groups of 32", "of 16", "of 16 with zeros", "zeros", "siblings", "by turns", "least"],
)
@pytest.mark.in_short("-march=native", "-march=x86-64-v3")
def test_products_are_those_of_the_numbers(
    sizes: list[int],
    turns: int,
    inputs: int,
    groups: list[int],
    zeros: list[bool],
    library: Any,
) -> None:
    """Rows are rounded to integers of 16 bits. Where that loses nothing, float32 alone rounds."""
    parts = [
        random_bytes(size, inputs, group, zero, seed)
        for seed, (size, group, zero) in enumerate(zip(sizes, groups, zeros, strict=True))
    ]
    matrix = ByteMatrix(library, parts, [None] * len(parts), turns=turns)
    for exact, most in ((True, 1e-6), (False, 1e-4)):
        rows = random_rows(7, inputs, exact)
        sums = product(library, matrix, rows)
        for number, part in enumerate(parts):
            wanted = rows.double() @ part.weight(torch.float64).T
            assert error(of_part(matrix, number, sizes[number], sums), wanted) < most


@pytest.mark.parametrize("code", [-128, 127])
def test_the_largest_sums_of_a_bundle_are_no_wider_than_an_integer(code: int, library: Any) -> None:
    codes = EightBits(torch.full((16, 64), code, dtype=torch.int8), torch.ones(16, 2))
    matrix = ByteMatrix(library, [codes], [None])
    for sign in (1.0, -1.0):
        rows = torch.full((2, 64), sign)
        found = of_part(matrix, 0, 16, product(library, matrix, rows))
        assert error(found, rows.double() @ codes.weight(torch.float64).T) < 1e-6


@pytest.mark.parametrize("group", [16, 32])
def test_a_row_gets_the_same_bits_beside_any_number_of_others(group: int, library: Any) -> None:
    matrix = ByteMatrix(library, [random_bytes(208, 160, group, True)], [None])
    rows = random_rows(13, 160, exact=False)
    alone = product(library, matrix, rows, most_rows=1)
    for most in range(2, 7):
        assert torch.equal(product(library, matrix, rows, most), alone)


@pytest.mark.parametrize("values", [INT4, FP4, NONLINEAR], ids=["INT4", "FP4", "NONLINEAR"])
def test_four_bits_beside_them_stand_for_what_they_did(values: Any, library: Any) -> None:
    parts = [random_codes(40, 128, 32, values, True, 0), random_bytes(24, 128, 16, False, 1)]
    matrix = packed(library, parts, [None, None], "int4")
    assert type(matrix) is ByteMatrix
    rows = random_rows(5, 128, exact=True)
    sums = product(library, matrix, rows)
    for number, (part, size) in enumerate(zip(parts, (40, 24), strict=True)):
        wanted = rows.double() @ part.weight(torch.float32).double().T
        assert error(of_part(matrix, number, size, sums), wanted) < 1e-6


@pytest.mark.parametrize("group", [16, 32])
def test_numbers_become_the_nearest_codes(group: int, library: Any) -> None:
    """Also beside a layer that has codes, in its groups; where one is none, so is what it enters."""
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight[3] = 0
    weight[4] *= 2.0**-60
    matrix = ByteMatrix(library, [random_bytes(24, 128, group, True), weight], [None, None])
    rows = random_rows(5, 128, exact=True)
    rounded = nearest_bytes(weight, group).weight(torch.float64)
    found = of_part(matrix, 1, 40, product(library, matrix, rows))
    wanted = rows.double() @ rounded.T
    assert error(found, wanted) < 5e-4 and error(found[:, 4], wanted[:, 4]) < 5e-4  # scales are rounded to float16
    weight[3, 5], weight[7, 40] = torch.nan, torch.inf
    matrix.write(1, weight)
    found = of_part(matrix, 1, 40, product(library, matrix, rows))
    assert found.isnan().any(0).nonzero().flatten().tolist() == [3, 7]


def test_new_numbers_replace_codes_and_can_be_taken_back(library: Any) -> None:
    first, second = random_bytes(40, 128, 32, True), random_bytes(40, 128, 32, False, 1)
    matrix, rows = ByteMatrix(library, [first, second], [None, None]), random_rows(5, 128, exact=True)
    before = product(library, matrix, rows)
    restore = matrix.restorer()
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    matrix.write(0, weight)
    after = product(library, matrix, rows)
    wanted = rows.double() @ nearest_bytes(weight).weight(torch.float64).T
    assert error(of_part(matrix, 0, 40, after), wanted) < 5e-4
    assert torch.equal(of_part(matrix, 1, 40, after), of_part(matrix, 1, 40, before))
    restore()
    assert torch.equal(product(library, matrix, rows), before)


def test_what_is_packed_later_is_the_same(library: Any) -> None:
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    codes = random_bytes(24, 128, 16, False)
    at_once, later = ByteMatrix(library, [codes, weight], [None, None]), Packing(library)
    matrix = ByteMatrix(library, [codes, weight], [None, None], later=later)
    later.run()
    rows = random_rows(3, 128, exact=False)
    assert torch.equal(product(library, matrix, rows), product(library, at_once, rows))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_either_library_multiplies_them(kind: Any) -> None:
    """Layers with odd sizes and a bias, of one row and of many, each with the bits that it has alone."""
    products = Products(CpuAttention(kind).library(kind), torch.bfloat16, kind)
    for group, zeros in ((32, False), (16, True)):
        codes = random_bytes(83, 288, group, zeros)
        layer = ByteLinear(codes, nn.Parameter(torch.randn(83).bfloat16(), requires_grad=False), torch.bfloat16)
        matrix = packed(products.library, [codes], [None], kind)
        assert type(matrix) is ByteMatrix
        compiled = CompiledLinear(products, layer, matrix, nn.Parameter(torch.empty(0)))
        for rows in (1, 2, 5, 40):
            x = torch.randn(rows, 288, generator=torch.Generator().manual_seed(rows)).bfloat16()
            found = compiled(x)
            wanted = x.double() @ codes.weight(torch.float64).T + layer.bias.double()
            assert error(found, wanted) < 3e-3  # results are rounded to bfloat16
            assert torch.equal(torch.cat([compiled(row[None]) for row in x]), found)


@pytest.mark.parametrize("kind", ["groups of 32", "of 64 with zeros", "of 16", "of 16 with zeros", "of all"])
def test_many_rows_have_the_bits_of_each_alone(kind: str) -> None:
    if kind == "of all":
        generator = torch.Generator().manual_seed(0)
        weight = (torch.randint(-127, 128, (565, 1216), generator=generator) / 128).bfloat16()
        weight[:, 0] = 127 / 128  # so that rounding to bytes loses nothing
        weight[0], weight[1] = 127 / 128, -127 / 128
        return check_many_rows(weight, weight.double(), 93)
    codes = random_bytes(565, 1216, 16 if "16" in kind else 64 if "64" in kind else 32, "zeros" in kind)
    codes.codes[0], codes.codes[1] = -128, 127
    check_many_rows(codes, codes.weight(torch.float64), 93)


def test_bytes_take_a_sixteenth_more_for_scales() -> None:
    compiled = CpuAttention("int8").library("int8")
    assert ByteMatrix(compiled, [random_bytes(64, 256, 32, False)], [None]).nbytes == 64 * (256 + 16 + 4)
    assert ByteMatrix(compiled, [random_bytes(64, 256, 16, True)], [None]).nbytes == 64 * (256 + 64 + 4)


def test_what_may_be_bytes_is_asked_for_by_name() -> None:
    compiled = CpuAttention("int8").library("int8")
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert type(packed(compiled, [weight], [None], "bytes")) is ByteMatrix
    assert type(packed(compiled, [weight[:, :48]], [None], "bytes")) is PackedMatrix
    assert type(packed(compiled, [weight], [None], "int8")) is PackedMatrix
    assert type(packed(compiled, [random_codes(16, 64, 32, INT4, False, 0)], [None], "bytes")) is FourBitMatrix
    assert ctypes.sizeof(type(ByteMatrix(compiled, [weight], [None])._format)) == 96
