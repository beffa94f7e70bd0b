"""The compiled code beside plain torch: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from asyncengine.builds import BuildError
from asyncengine.model.gguf.blocks import TYPES, decode, decode_bytes
from asyncengine.model.quantised import compiled_codes
from asyncengine.model.quantised.eight_bits import EightBits
from asyncengine.model.quantised.four_bits import FP4, INT4, NONLINEAR, FourBits
from tests.model.gguf.test_blocks import BLOCKS, CODES, EXACT, random_data

pytestmark = pytest.mark.loops("either")

KNOWN = sorted({*CODES, *EXACT} - {"NVFP4"})
"""Types that the code takes apart."""
Parts = list[torch.Tensor]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if compiled_codes.library() is None:
        pytest.skip("there is no compiler")


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Parts]], Parts]:
    """Calls something as where there is no compiler."""

    def call(what: Callable[[], Parts]) -> Parts:
        with monkeypatch.context() as patch:
            patch.setattr(compiled_codes, "library", lambda: None)
            return what()

    return call


def parts_of(found: torch.Tensor | FourBits | EightBits) -> Parts:
    if isinstance(found, torch.Tensor):
        return [found]
    return [found.codes, found.scales, *([] if found.zeros is None else [found.zeros])]


def same(found: Parts, wanted: Parts) -> bool:
    """Bit for bit, signs of zeros among them, but for which of the patterns that are no numbers."""

    def bits(part: torch.Tensor) -> torch.Tensor:
        if not part.is_floating_point():
            return part
        return torch.where(part.isnan(), torch.nan, part).view(torch.int16 if part.itemsize == 2 else torch.int32)

    return len(found) == len(wanted) and all(
        a.shape == b.shape and a.dtype is b.dtype and torch.equal(bits(a), bits(b))
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("inputs", [512, 1024])
@pytest.mark.parametrize("name", KNOWN)
def test_blocks_are_taken_apart(name: str, inputs: int, plainly: Callable[[Callable[[], Parts]], Parts]) -> None:
    kind, rows = TYPES[BLOCKS[name]], 257
    usual = random_data(name, rows, inputs)
    wild = torch.randint(0, 256, usual.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for data in (usual, wild):  # the latter has infinite scales, and some that are no numbers
        read = [lambda data=data: decode(BLOCKS[name], data, (rows, inputs))]
        if kind.eight_bits:
            read.append(lambda data=data: decode_bytes(BLOCKS[name], data, (rows, inputs)))
            read.append(lambda data=data: decode(BLOCKS[name], data, (rows, inputs), torch.bfloat16))
        for one in read:
            assert same(parts_of(one()), plainly(lambda one=one: parts_of(one())))


def test_it_knows_all_types_whose_codes_stay_but_one() -> None:
    blocks = {name: torch.zeros(1, TYPES[number].nbytes, dtype=torch.uint8) for name, number in BLOCKS.items()}
    room = [torch.empty(256, dtype=torch.float32) for _ in range(3)]
    assert (
        sorted(name for name, each in blocks.items() if compiled_codes.take_apart(BLOCKS[name], each, *room)) == KNOWN
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("group", [16, 32, 128, 384])
@pytest.mark.parametrize("values", [None, INT4, FP4, NONLINEAR])
def test_codes_become_numbers(
    values: tuple[float, ...] | None,
    group: int,
    with_zeros: bool,
    dtype: torch.dtype,
    plainly: Callable[[Callable[[], Parts]], Parts],
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, inputs = 515, 384
    scales = torch.randn(rows, inputs // group, generator=generator)
    scales[0], scales[1], scales[2] = torch.nan, torch.inf, 0.0
    zeros = torch.randn(rows, inputs // group, generator=generator).mul_(3) if with_zeros else None
    if values is None:
        codes = torch.randint(-128, 128, (rows, inputs), generator=generator).to(torch.int8)
        weight: EightBits | FourBits = EightBits(codes, scales, zeros)
        every_other = EightBits(codes[::2], scales[::2].half(), None if zeros is None else zeros[::2].half())
    else:
        codes = torch.randint(0, 256, (rows, inputs // 2), generator=generator).to(torch.uint8)
        weight = FourBits(codes, scales, zeros, values)
        every_other = weight.rows(0, rows, 2)  # type: ignore[assignment]
    for one in (weight, every_other):
        assert same([one.weight(dtype)], plainly(lambda one=one: [one.weight(dtype)]))


def test_what_it_does_not_know_is_done_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    library = compiled_codes.library
    monkeypatch.setattr(compiled_codes, "library", lambda: (asked.append(torch.half), library())[1])
    in_fp8 = EightBits(torch.ones(2, 32).to(torch.float8_e4m3fn), torch.full((2, 1), 2.0))
    assert torch.equal(in_fp8.weight(torch.float32), torch.full((2, 32), 2.0))
    in_bytes = EightBits(torch.ones(2, 32, dtype=torch.int8), torch.full((2, 1), 2.0))
    assert torch.equal(in_bytes.weight(torch.float16), torch.full((2, 32), 2.0, dtype=torch.float16))
    assert in_bytes.weight(torch.float32).device.type == "cpu" and len(asked) == 1


def test_shapes_that_do_not_fit_are_as_they_are_without_it(plainly: Callable[[Callable[[], Parts]], Parts]) -> None:
    """Nothing beside the tensors is read."""
    for_all = EightBits(torch.ones(4, 32, dtype=torch.int8), torch.full((1, 1), 3.0))
    assert torch.equal(for_all.weight(torch.float32), torch.full((4, 32), 3.0))
    odd = FourBits(torch.randint(0, 256, (3, 5), dtype=torch.uint8), torch.ones(3, 2))
    assert same([odd.weight(torch.float32)], plainly(lambda: [odd.weight(torch.float32)]))
    for scales, zeros in ((torch.ones(2, 2), None), (torch.ones(2, 1), torch.ones(1, 3))):
        with pytest.raises(RuntimeError):
            EightBits(torch.ones(2, 33, dtype=torch.int8), scales, zeros).weight(torch.float32)


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Path:
        raise BuildError("there is none")

    monkeypatch.setattr(compiled_codes, "build", fails)
    monkeypatch.setattr(compiled_codes, "library", cache(compiled_codes.library.__wrapped__))
    assert compiled_codes.library() is None
    assert torch.equal(
        EightBits(torch.ones(1, 16, dtype=torch.int8), torch.ones(1, 1)).weight(torch.float32), torch.ones(1, 16)
    )
