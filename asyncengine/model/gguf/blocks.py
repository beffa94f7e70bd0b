"""How ggml stores numbers: blocks of some, with scales of their own (llama.cpp)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from asyncengine.errors import UnsupportedModelError
from asyncengine.model.gguf import eight_bit_blocks, float_blocks, four_bit_blocks
from asyncengine.model.quantised import compiled_codes
from asyncengine.model.quantised.eight_bits import EightBits, nearest_bytes
from asyncengine.model.quantised.four_bits import FP4, GROUP, INT4, NONLINEAR, FourBits

_AT_ONCE = 1 << 19
"""Bytes that are decoded at once: what is made of them stays in a cache."""
_NUMBERS_AT_ONCE = 1 << 24
"""Numbers that are codes in between."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of ggml's types.

    Attributes:
        name: ggml's.
        numbers: In a block.
        nbytes: Of a block.
        write: Writes blocks as float32, or as codes, scales and perhaps zeros.
        values: What codes of four bits stand for, if the numbers stay such.
        zeros: Whether codes have zeros.
        write_bytes: Writes blocks as codes of eight bits, scales and perhaps zeros; None if they are rounded to such.
        group: Inputs that share a scale as codes.
        middle: Of codes of eight bits with zeros, what has been taken from them.
    """

    name: str
    numbers: int
    nbytes: int
    write: Callable[..., None]
    values: tuple[float, ...] | None = None
    zeros: bool = False
    write_bytes: Callable[..., None] | None = None
    group: int = GROUP
    middle: int = 0

    @property
    def eight_bits(self) -> bool:
        """Whether `decode_bytes` can be asked for."""
        return self.numbers > 1 and not self.four_bits

    @property
    def scale_nbytes(self) -> int:
        """Bytes of scales and zeros of 32 codes, where products have them in float16."""
        return 2 * (GROUP // self.group) * (2 if self.zeros else 1)

    @property
    def four_bits(self) -> bool:
        """Whether `decode` gives `FourBits`."""
        return self.values is not None

    def row_nbytes(self, inputs: int) -> int:
        """Bytes of so many numbers, a multiple of `numbers`."""
        return inputs // self.numbers * self.nbytes


def decode(
    type_id: int, data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> torch.Tensor | FourBits:
    """Numbers of one of `TYPES`.

    Floats have the bits that ggml gives them, and so have those that codes stand for, but where there are minima (Q4_1,
    Q4_K): these are off by a few units in the last place of a group's largest number. There a group whose minimum is
    more than 65000 steps is constant, and off by up to a ten thousandth of that. In MXFP4 the exponent 255 stands for
    no numbers, as the Open Compute Project has it.

    Args:
        type_id: ggml's ``enum ggml_type``.
        data: (rows, bytes of a row) uint8 on the CPU.
        shape: Rows and inputs; these are whole blocks.
        dtype: Of numbers that are no codes.

    Returns:
        (rows, inputs) in `dtype`, rounded once from float32, or codes in groups of 32 with scales and zeros in float32.
        Nothing of it is in the memory of `data`.

    Raises:
        UnsupportedModelError: transformers is too old for this type.
        ValueError: The data are not of this shape.
    """
    kind = TYPES[type_id]
    rows, inputs = shape
    blocks, parts = _blocks_of(kind, data, shape)
    count = len(blocks)
    if kind.write_bytes is not None and not kind.zeros and compiled_codes.library() is not None:
        numbers = torch.empty(shape, dtype=dtype)
        some = max(_NUMBERS_AT_ONCE // max(inputs, 1), 1)
        for start in range(0, rows, some):  # the same numbers
            piece = data[start : start + some]
            numbers[start : start + some] = decode_bytes(type_id, piece, (len(piece), inputs)).weight(dtype)
        return numbers
    if kind.values is None:
        numbers = torch.empty(count, kind.numbers, dtype=dtype)
        scratch = torch.empty(_longest(parts, count), kind.numbers, dtype=torch.float32)
        for part in parts:
            if dtype is torch.float32:
                kind.write(blocks[part], numbers[part])
            else:  # fresh memory costs more than a copy
                to = numbers[part]
                kind.write(blocks[part], wide := scratch[: len(to)])
                to.copy_(wide)
        return numbers.view(rows, inputs)
    codes = torch.empty(count, kind.numbers // 2, dtype=torch.uint8)
    found = [torch.empty(count, kind.numbers // GROUP, dtype=torch.float32) for _ in range(2 if kind.zeros else 1)]
    if compiled_codes.take_apart(type_id, blocks, codes, *found, *(() if kind.zeros else (None,))):
        if kind.zeros:
            four_bit_blocks.from_minima(found[0], found[1].clone(), codes, *found)
    else:
        for part in parts:
            kind.write(blocks[part], codes[part], *(each[part] for each in found))
    scales, *zeros = (each.view(rows, inputs // GROUP) for each in found)
    return FourBits(codes.view(rows, inputs // 2), scales, zeros[0] if zeros else None, kind.values)


def decode_bytes(type_id: int, data: torch.Tensor, shape: tuple[int, int]) -> EightBits:
    """Numbers of one of `TYPES` that says `eight_bits`, as codes of eight bits.

    They stand for the same numbers, to the last bit in types without minima. Those with tables and ternary ones are
    rounded to the nearest codes. Where steps are nothing beside a minimum it is as with `decode`.

    Args:
        type_id: As for `decode`.
        data: As for `decode`.
        shape: As for `decode`.

    Returns:
        (rows, inputs) codes in int8, with scales and zeros in float32. Nothing of it is in the memory of `data`.

    Raises:
        UnsupportedModelError: As `decode`.
        ValueError: As `decode`.
    """
    kind = TYPES[type_id]
    blocks, parts = _blocks_of(kind, data, shape)
    count, groups = len(blocks), kind.numbers // kind.group
    codes = torch.empty(count, kind.numbers, dtype=torch.int8)
    found = [torch.empty(count, groups, dtype=torch.float32) for _ in range(2 if kind.zeros else 1)]
    scratch = torch.empty(0 if kind.write_bytes else _longest(parts, count), kind.numbers, dtype=torch.float32)
    if kind.write_bytes and compiled_codes.take_apart(type_id, blocks, codes, *found, *(() if kind.zeros else (None,))):
        if kind.zeros:
            eight_bit_blocks.from_minima(found[0], found[1].clone(), kind.middle, codes, *found)
        parts = []
    for part in parts:
        if kind.write_bytes:
            kind.write_bytes(blocks[part], codes[part], *(each[part] for each in found))
            continue
        kind.write(blocks[part], wide := scratch[: len(codes[part])])
        rounded = nearest_bytes(wide, kind.group)
        codes[part], found[0][part] = rounded.codes, rounded.scales
    scales, *zeros = (each.view(shape[0], shape[1] // kind.group) for each in found)
    return EightBits(codes.view(shape), scales, zeros[0] if zeros else None)


def _blocks_of(kind: BlockType, data: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, list[slice]]:
    """(blocks, bytes of a block), and which of them are decoded at once.

    Raises:
        ValueError: The data are not of this shape.
    """
    rows, inputs = shape
    if inputs % kind.numbers or tuple(data.shape) != (rows, kind.row_nbytes(inputs)):
        raise ValueError(f"{tuple(data.shape)} bytes are not {rows} rows of {inputs} numbers in {kind.name}")
    count = rows * inputs // kind.numbers
    blocks = data.reshape(count, kind.nbytes)
    if blocks.storage_offset() % 8:  # it could not be looked at as numbers
        blocks = blocks.clone()
    some = max(_AT_ONCE // kind.nbytes, 1)
    return blocks, [slice(start, start + some) for start in range(0, count, some)]


def _longest(parts: list[slice], count: int) -> int:
    """The most blocks that are decoded at once."""
    return min(parts[0].stop, count) if parts else 0


def _plain(dtype: torch.dtype, blocks: torch.Tensor, to: torch.Tensor) -> None:
    to.copy_(blocks.view(dtype))


def _by_transformers(type_id: int, blocks: torch.Tensor, to: torch.Tensor) -> None:
    """Types with large tables of which numbers may stand beside each other."""
    import transformers

    try:
        from transformers.integrations.gguf.dequant import dequantize

        numbers = dequantize(blocks.reshape(-1), type_id)
    except (ImportError, ValueError) as error:  # the latter from one that knows some types
        raise UnsupportedModelError(
            f"numbers in {TYPES[type_id].name} need transformers 5.24 or later; there is {transformers.__version__}"
        ) from error
    to.copy_(numbers.view_as(to))


def _number(name: str, dtype: torch.dtype) -> BlockType:
    return BlockType(name, 1, dtype.itemsize, partial(_plain, dtype))


def _gridded(name: str, nbytes: int, type_id: int) -> BlockType:
    return BlockType(name, 256, nbytes, partial(_by_transformers, type_id))


TYPES: Mapping[int, BlockType] = {
    0: _number("F32", torch.float32),
    1: _number("F16", torch.float16),
    2: BlockType("Q4_0", 32, 18, four_bit_blocks.q4_0, INT4),
    3: BlockType("Q4_1", 32, 20, four_bit_blocks.q4_1, INT4, zeros=True),
    6: BlockType("Q5_0", 32, 22, float_blocks.q5_0, write_bytes=eight_bit_blocks.q5_0),
    7: BlockType("Q5_1", 32, 24, float_blocks.q5_1, zeros=True, write_bytes=eight_bit_blocks.q5_1, middle=16),
    8: BlockType("Q8_0", 32, 34, float_blocks.q8_0, write_bytes=eight_bit_blocks.q8_0),
    10: BlockType(
        "Q2_K", 256, 84, float_blocks.q2_k, zeros=True, write_bytes=eight_bit_blocks.q2_k, group=16, middle=2
    ),
    11: BlockType("Q3_K", 256, 110, float_blocks.q3_k, write_bytes=eight_bit_blocks.q3_k, group=16),
    12: BlockType("Q4_K", 256, 144, four_bit_blocks.q4_k, INT4, zeros=True),
    13: BlockType("Q5_K", 256, 176, float_blocks.q5_k, zeros=True, write_bytes=eight_bit_blocks.q5_k, middle=16),
    14: BlockType("Q6_K", 256, 210, float_blocks.q6_k, write_bytes=eight_bit_blocks.q6_k, group=16),
    16: _gridded("IQ2_XXS", 66, 16),
    17: _gridded("IQ2_XS", 74, 17),
    18: _gridded("IQ3_XXS", 98, 18),
    19: _gridded("IQ1_S", 50, 19),
    20: BlockType("IQ4_NL", 32, 18, four_bit_blocks.q4_0, NONLINEAR),
    21: _gridded("IQ3_S", 110, 21),
    22: _gridded("IQ2_S", 82, 22),
    23: BlockType("IQ4_XS", 256, 136, four_bit_blocks.iq4_xs, NONLINEAR),
    24: _number("I8", torch.int8),
    25: _number("I16", torch.int16),
    26: _number("I32", torch.int32),
    27: _number("I64", torch.int64),
    28: _number("F64", torch.float64),
    29: _gridded("IQ1_M", 56, 29),
    30: _number("BF16", torch.bfloat16),
    34: BlockType("TQ1_0", 256, 54, float_blocks.tq1_0),
    35: BlockType("TQ2_0", 256, 66, float_blocks.tq2_0),
    39: BlockType("MXFP4", 32, 17, four_bit_blocks.mxfp4, FP4),
    40: BlockType("NVFP4", 64, 36, float_blocks.nvfp4, write_bytes=eight_bit_blocks.nvfp4, group=16),
}
"""By ggml's type id."""
