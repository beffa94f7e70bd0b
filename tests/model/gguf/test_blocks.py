"""Blocks of ggml beside what llama.cpp's own package makes of them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import nn

from asyncengine.errors import UnsupportedModelError
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.decoder.byte_matrix import ByteMatrix
from asyncengine.model.decoder.compiled_linear import CompiledLinear, Products
from asyncengine.model.decoder.four_bit_matrix import FourBitMatrix, packed
from asyncengine.model.gguf import blocks as blocks_module
from asyncengine.model.gguf.blocks import TYPES, decode, decode_bytes
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.eight_bits import EightBits
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.quantised.four_bits import FP4, INT4, NONLINEAR, FourBits, unpacked

pytestmark = pytest.mark.loops("either")

ROWS, INPUTS = 6, 512
BLOCKS = {kind.name: number for number, kind in TYPES.items() if kind.numbers > 1}
CODES = {name: number for name, number in BLOCKS.items() if TYPES[number].four_bits}
FLOATS = {name: number for name, number in BLOCKS.items() if name not in CODES}
PLAIN = {kind.name: number for number, kind in TYPES.items() if kind.numbers == 1}
HALVES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,),
    "TQ1_0": (52,), "TQ2_0": (64,), "IQ1_M": (), "MXFP4": (), "NVFP4": (),
}  # fmt: skip
"""Where a block's float16 are, if not at its beginning."""
MINIMA = ("Q4_1", "Q4_K")
EXACT = [name for name, number in FLOATS.items() if TYPES[number].write_bytes is not None]


def random_data(name: str, rows: int = ROWS, inputs: int = INPUTS, seed: int = 0) -> torch.Tensor:
    """(rows, bytes) in blocks of which all bytes are random but what would be no number.

    The first has codes and scales of only ones, the second of only zeros; the third is multiplied by 0.
    """
    kind = TYPES[BLOCKS[name]]
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows * inputs // kind.numbers, kind.nbytes), dtype=np.uint8)
    data[0], data[1] = 255, 0
    for at in HALVES.get(name, (0,)):
        scales = (generator.standard_normal((len(data), 1)) * 0.02).astype(np.float16)
        scales[2] = 0
        data[:, at : at + 2] = scales.view(np.uint8)
    if name == "IQ1_M":  # whose scale is in four pieces
        data[:, 55] &= 0x3F
    elif name == "MXFP4":
        data[:, 0] = generator.integers(100, 140, len(data))
        data[:2, 0] = 0, 253
    elif name == "NVFP4":
        data[:, :4] &= 127
    return torch.from_numpy(data.reshape(rows, -1))


def of_ggml(name: str, data: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(dequantize(data.numpy(), GGMLQuantizationType[name]))


def codes_of(name: str, data: torch.Tensor, inputs: int = INPUTS) -> FourBits:
    found = decode(CODES[name], data, (len(data), inputs))
    assert isinstance(found, FourBits)
    return found


def floats_of(name: str, data: torch.Tensor, inputs: int = INPUTS, **options: Any) -> torch.Tensor:
    found = decode(FLOATS[name], data, (len(data), inputs), **options)
    assert isinstance(found, torch.Tensor)
    return found


def bytes_of(name: str, data: torch.Tensor, inputs: int = INPUTS) -> EightBits:
    found = decode_bytes(FLOATS[name], data, (len(data), inputs))
    assert found.codes.dtype is torch.int8
    return found


def test_blocks_have_ggmls_sizes() -> None:
    for number, kind in TYPES.items():
        theirs = GGMLQuantizationType(number)
        assert (kind.name, (kind.numbers, kind.nbytes)) == (theirs.name, GGML_QUANT_SIZES[theirs])
        assert kind.row_nbytes(1024) == 1024 // kind.numbers * kind.nbytes


@pytest.mark.parametrize("name", FLOATS)
def test_floats_have_the_bits_of_ggml(name: str) -> None:
    data = random_data(name)
    found = floats_of(name, data)
    assert found.shape == (ROWS, INPUTS) and found.isfinite().all()
    assert torch.equal(found.view(torch.int32), of_ggml(name, data).view(torch.int32))


@pytest.mark.parametrize("name", [name for name in CODES if name not in MINIMA])
def test_codes_without_minima_stand_for_the_same_numbers(name: str) -> None:
    data = random_data(name)
    found = codes_of(name, data)
    assert (found.shape, found.group, found.zeros) == ((ROWS, INPUTS), 32, None)
    assert found.values == {"Q4_0": INT4, "MXFP4": FP4}.get(name, NONLINEAR)
    assert torch.equal(found.weight(torch.float32), of_ggml(name, data))
    assert set(unpacked(found.codes).unique().tolist()) == set(range(16))


@pytest.mark.parametrize("name", MINIMA)
def test_codes_with_minima_are_off_by_the_last_bits(name: str) -> None:
    data = random_data(name, rows=32)
    found, wanted = codes_of(name, data), of_ggml(name, data)
    assert found.zeros is not None and found.zeros.shape == found.scales.shape == (32, INPUTS // 32)
    assert found.zeros.half().isfinite().all()
    largest = wanted.view(32, -1, 32).abs().amax(-1, keepdim=True) + 15 * found.scales.abs().unsqueeze(-1)
    off = (found.weight(torch.float32) - wanted).view(32, -1, 32).abs()
    assert (off <= 4 * torch.finfo(torch.float32).eps * largest).all()


def q4_1(scale: float, minimum: float) -> torch.Tensor:
    """One group whose codes are 0 to 15, and again."""
    numbers = np.array([scale, minimum], np.float16).view(np.uint8)
    codes = np.arange(16, dtype=np.uint8) * 17
    return torch.from_numpy(np.concatenate((numbers, codes))).view(1, -1)


@pytest.mark.parametrize("minimum", [-3.0, 0.25, 60000.0, 0.0])
def test_a_group_without_steps_is_its_minimum(minimum: float) -> None:
    found = codes_of("Q4_1", q4_1(0.0, minimum), 32)
    assert torch.equal(found.weight(torch.float32), torch.full((1, 32), minimum))
    assert found.zeros is not None and found.zeros.tolist() == [[0.0]]


@pytest.mark.parametrize(("scale", "minimum"), [(2.0**-24, 1.0), (-(2.0**-20), -500.0), (0.001, 65504.0)])
def test_steps_that_are_nothing_beside_a_minimum_are_left_out(scale: float, minimum: float) -> None:
    data = q4_1(scale, minimum)
    found = codes_of("Q4_1", data, 32)
    assert found.zeros is not None and found.zeros.tolist() == [[0.0]]
    torch.testing.assert_close(found.weight(torch.float32), of_ggml("Q4_1", data), rtol=1.2e-4, atol=0)


def test_groups_of_a_k_block_without_steps_are_constant() -> None:
    data = random_data("Q4_K", 4, 256)[3:]
    data[0, 4:8] &= 0xC0  # the scales of the first four groups, but for what belongs to the others
    found, wanted = codes_of("Q4_K", data, 256).weight(torch.float32), of_ggml("Q4_K", data)
    assert torch.equal(found[:, :128], wanted[:, :128])
    assert found[:, :128].unique().numel() == 4
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_numbers_become_float32(name: str) -> None:
    numbers = torch.arange(-64.0, 64.0).view(4, 32)
    data = numbers.to(TYPES[PLAIN[name]].write.args[0]).view(torch.uint8)  # type: ignore[attr-defined]
    found = decode(PLAIN[name], data, (4, 32))
    assert isinstance(found, torch.Tensor) and found.dtype is torch.float32
    assert torch.equal(found, numbers)
    assert found.data_ptr() != data.data_ptr()


@pytest.mark.parametrize("name", BLOCKS)
def test_how_many_blocks_are_decoded_at_once_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_data(name, 3)
    whole = decode(BLOCKS[name], data, (3, INPUTS))
    for some in (1, 5 * TYPES[BLOCKS[name]].nbytes):
        monkeypatch.setattr(blocks_module, "_AT_ONCE", some)
        parts = decode(BLOCKS[name], data, (3, INPUTS))
        assert torch.equal(numbers_of(parts), numbers_of(whole))


def numbers_of(found: torch.Tensor | FourBits) -> torch.Tensor:
    return found.weight(torch.float32) if isinstance(found, FourBits) else found


@pytest.mark.parametrize("name", ["Q6_K", "Q4_K", "MXFP4", "Q8_0"])
def test_data_may_begin_anywhere(name: str) -> None:
    data = random_data(name)
    odd = torch.cat([torch.zeros(1, dtype=torch.uint8), data.view(-1)])[1:].view(data.shape)
    wide = torch.cat([torch.zeros(len(data), 3, dtype=torch.uint8), data], 1)[:, 3:]
    wanted = decode(BLOCKS[name], data, (ROWS, INPUTS))
    for given in (odd, wide):
        assert torch.equal(numbers_of(decode(BLOCKS[name], given, (ROWS, INPUTS))), numbers_of(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_floats_are_rounded_once(dtype: torch.dtype) -> None:
    data = random_data("Q6_K")
    assert torch.equal(floats_of("Q6_K", data, dtype=dtype), of_ggml("Q6_K", data).to(dtype))


def test_no_rows_are_no_numbers() -> None:
    assert floats_of("Q6_K", torch.empty(0, 420, dtype=torch.uint8)).shape == (0, INPUTS)
    assert codes_of("Q4_K", torch.empty(0, 288, dtype=torch.uint8)).shape == (0, INPUTS)


def test_data_of_another_shape_are_refused() -> None:
    data = random_data("Q4_K")
    for rows, inputs in ((ROWS, 256), (ROWS + 1, INPUTS), (ROWS, INPUTS + 32)):
        with pytest.raises(ValueError, match="in Q4_K"):
            decode(BLOCKS["Q4_K"], data, (rows, inputs))


def test_types_that_an_old_transformers_does_not_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf.dequant", None)
    with pytest.raises(UnsupportedModelError, match=r"IQ3_S need transformers 5\.24 or later"):
        floats_of("IQ3_S", random_data("IQ3_S"))


@pytest.mark.parametrize("name", EXACT)
def test_codes_of_eight_bits_stand_for_the_same_numbers(name: str) -> None:
    data = random_data(name, rows=32)
    found, wanted = bytes_of(name, data), of_ggml(name, data)
    assert found.shape == wanted.shape
    if found.zeros is None:
        assert torch.equal(found.weight(torch.float32), wanted)
        return
    assert found.zeros.half().isfinite().all() and found.zeros.shape == found.scales.shape
    largest = wanted.view(32, -1, found.group).abs().amax(-1, keepdim=True) + 31 * found.scales.abs().unsqueeze(-1)
    off = (found.weight(torch.float32) - wanted).view(32, -1, found.group).abs()
    steps = 16 * found.scales.abs().unsqueeze(-1)
    beside = torch.where((found.zeros == 0).unsqueeze(-1), steps, 0)  # nothing beside the minimum
    assert (off <= 4e-7 * largest + beside).all()


def test_q8_0_has_the_codes_of_the_file() -> None:
    data = random_data("Q8_0")
    found = bytes_of("Q8_0", data)
    blocks = data.view(ROWS, -1, 34)
    assert torch.equal(found.codes, blocks[:, :, 2:].flatten(1).view(torch.int8))
    assert torch.equal(found.scales, blocks[:, :, :2].contiguous().view(torch.float16).squeeze(-1).float())


@pytest.mark.parametrize("name", [name for name in FLOATS if name not in EXACT])
def test_other_types_are_rounded_to_eight_bits(name: str) -> None:
    data = random_data(name)
    found, wanted = bytes_of(name, data), of_ggml(name, data)
    step = wanted.view(ROWS, -1, 32).abs().amax(-1, keepdim=True) / 127
    assert found.group == 32
    assert ((found.weight(torch.float32) - wanted).view(ROWS, -1, 32).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("minimum", [-0.5, 3.0])
def test_eight_bits_without_steps_are_their_minimum(minimum: float) -> None:
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 24), dtype=np.uint8))
    data[0, :4] = torch.tensor([0.0, minimum], dtype=torch.float16).view(torch.uint8)
    assert (bytes_of("Q5_1", data, 32).weight(torch.float32) == minimum).all()


@pytest.mark.parametrize("name", FLOATS)
def test_the_compiled_product_multiplies_eight_bits(name: str) -> None:
    data = random_data(name, 48)
    weights, dtype = bytes_of(name, data), torch.bfloat16
    products = Products(CpuAttention("int8").library("int8"), dtype, "int8")
    matrix = packed(products.library, [weights], [None], "int8")
    assert isinstance(matrix, ByteMatrix)
    layer = CompiledLinear(products, ByteLinear(weights, None, dtype), matrix, nn.Parameter(torch.empty(0)))
    rows = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = rows.double() @ of_ggml(name, data).double().T
    assert (layer(rows).double() - wanted).norm() < (3e-3 if name in EXACT else 6e-3) * wanted.norm()


@pytest.mark.parametrize("name", CODES)
def test_the_compiled_product_multiplies_these_codes(name: str) -> None:
    data = random_data(name, 48)
    if name == "MXFP4":
        data.view(-1, 17)[:2, 0] = 127  # no row has both ends of a float's range
    weights, dtype = codes_of(name, data), torch.bfloat16
    products = Products(CpuAttention("int4").library("int4"), dtype, "int4")
    matrix = packed(products.library, [weights], [None], "int4")
    assert isinstance(matrix, FourBitMatrix)
    layer = CompiledLinear(products, FourBitLinear(weights, None, dtype), matrix, nn.Parameter(torch.empty(0)))
    rows = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = rows.double() @ of_ggml(name, data).double().T
    assert (layer(rows).double() - wanted).norm() < 3e-3 * wanted.norm()  # results are rounded to bfloat16
