"""Other orders of rows and columns: of codes of four bits as of the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine.model.gguf.header import BlockTensor
from asyncengine.model.gguf.placed import Placed, columns, halves_from_pairs, rows
from asyncengine.model.gguf.places import merged
from asyncengine.model.quantised.four_bits import GROUP, INT4, NONLINEAR, FourBits
from asyncengine.model.stored.weight import Decoded, OpenFiles

pytestmark = pytest.mark.loops("either")


def codes(outputs: int, inputs: int, zeros: bool = False, values: tuple[float, ...] = INT4, seed: int = 0) -> FourBits:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (outputs, inputs // 2), generator=generator, dtype=torch.uint8)
    scales = torch.rand(outputs, inputs // GROUP, generator=generator) + 0.5
    return FourBits(data, scales, torch.randn(scales.shape, generator=generator) if zeros else None, values)


def numbers(found: Decoded) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found.weight(torch.float32)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp's converter reorders outputs, so that those that rotate together are neighbours."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(1, 8), (4, 2), (3, 16)])
def test_pairs_become_halves_again(heads: int, width: int, zeros: bool) -> None:
    weight = torch.randn(heads * width, 64)
    assert torch.equal(numbers(halves_from_pairs(heads)(permuted(weight, heads))), weight)
    stored = codes(heads * width, 64, zeros)
    found = halves_from_pairs(heads)(stored)
    assert isinstance(found, FourBits)
    assert torch.equal(permuted(numbers(found), heads), numbers(stored))


def test_pairs_of_a_bias_become_halves_again() -> None:
    bias = torch.randn(24)
    assert torch.equal(numbers(halves_from_pairs(3)(permuted(bias, 3))), bias)


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(6)), zeros=st.booleans(), values=st.sampled_from([INT4, NONLINEAR]))
def test_rows_of_codes_are_those_of_numbers(order: list[int], zeros: bool, values: tuple[float, ...]) -> None:
    stored = codes(6, 64, zeros, values)
    change = rows(lambda _: torch.tensor(order))
    found = change(stored)
    assert isinstance(found, FourBits)
    assert torch.equal(numbers(found), numbers(stored)[order])
    assert torch.equal(numbers(change(numbers(stored))), numbers(stored)[order])


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(4)), width=st.sampled_from([32, 64, 96]), zeros=st.booleans())
def test_columns_of_codes_are_those_of_numbers(order: list[int], width: int, zeros: bool) -> None:
    stored = codes(3, 4 * width, zeros)
    change = columns(torch.tensor(order), width)
    found = change(stored)
    assert isinstance(found, FourBits)
    expected = numbers(stored).view(3, 4, width)[:, order].flatten(1)
    assert torch.equal(numbers(found), expected)
    assert torch.equal(numbers(change(numbers(stored))), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("zeros", [(False, False), (True, False), (True, True)])
def test_gates_lie_before_or_between_what_they_gate(interleaved: bool, zeros: tuple[bool, bool]) -> None:
    pair = [codes(2 * 5, 64, each, seed=seed) for seed, each in enumerate(zeros)]
    join = merged(2, interleaved)
    found = join(pair)
    assert isinstance(found, FourBits)
    gates, ups = (numbers(each).view(2, 5, 64) for each in pair)
    expected = torch.stack([gates, ups], 2).flatten(1, 2) if interleaved else torch.cat([gates, ups], 1)
    assert torch.equal(numbers(found).view(2, 10, 64), expected)
    assert torch.equal(numbers(join([numbers(each) for each in pair])).view(2, 10, 64), expected)


def stored(path: Path, name: str, kind: int, shape: tuple[int, ...], data: bytes, **more: Any) -> BlockTensor:
    file = path / name
    file.write_bytes(data)
    return BlockTensor(name, kind, shape, file, 0, **more)


def test_kinds_that_differ_are_joined_as_numbers(tmp_path: Path) -> None:
    halves = torch.randn(4, 32).half()
    floats = torch.randn(4, 32)
    pair = (
        stored(tmp_path, "a", 1, (4, 32), halves.numpy().tobytes()),
        stored(tmp_path, "b", 0, (4, 32), floats.numpy().tobytes()),
    )
    weight = Placed("both", pair, (8, 32), join=merged(1)).weight()
    assert weight.form == "none"
    assert torch.equal(weight.numbers(OpenFiles(), torch.float32), torch.cat([halves.float(), floats]))


def test_scales_are_of_experts_or_of_all(tmp_path: Path) -> None:
    floats = torch.randn(2, 3, 32)
    one = stored(tmp_path, "one", 0, (1,), torch.tensor([3.0]).numpy().tobytes())
    each = stored(tmp_path, "each", 0, (2,), torch.tensor([3.0, 5.0]).numpy().tobytes())
    for scale, factor in ((one, torch.tensor([3.0, 3.0])), (each, torch.tensor([3.0, 5.0]))):
        tensor = stored(tmp_path, "w", 0, (2, 3, 32), floats.numpy().tobytes(), scale=scale)
        weight = Placed("w", (tensor,), experts=2).weight()
        assert torch.equal(weight.numbers(OpenFiles(), torch.float32), floats * factor[:, None, None])
        assert weight.nbytes == floats.nbytes + 4 * scale.shape[0]


def test_codes_with_a_scale_of_their_own_become_numbers(tmp_path: Path) -> None:
    blocks = torch.arange(2 * 18, dtype=torch.uint8).view(2, 18)
    blocks[:, :2] = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
    plain = stored(tmp_path, "w", 2, (2, 32), blocks.numpy().tobytes())
    scale = stored(tmp_path, "s", 0, (1,), torch.tensor([2.0]).numpy().tobytes())
    scaled = stored(tmp_path, "w", 2, (2, 32), blocks.numpy().tobytes(), scale=scale)
    kept, changed = Placed("w", (plain,)).weight(), Placed("w", (scaled,)).weight()
    assert (kept.form, changed.form) == ("int4", "none")
    files = OpenFiles()
    assert torch.equal(changed.numbers(files, torch.float32), 2 * kept.numbers(files, torch.float32))
