"""Weights in the order of the compiled step, beside that order written down plainly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asyncengine.model.attention import kernel
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.decoder.weights import PackedMatrix
from tests.model.attention.targets import optimise_less, require_target


def packed_plainly(weights: list[torch.Tensor], turns: int, lanes: int, pair: int) -> torch.Tensor:
    """(groups, steps, lanes, pair): groups of outputs, neighbours by turns; zeros where there is none."""
    of_each = []
    for weight in weights:
        outputs, inputs = weight.shape
        whole = torch.zeros(-(-outputs // lanes) * lanes, inputs, dtype=weight.dtype)
        whole[:outputs] = weight
        of_each.append(whole.reshape(-1, lanes, inputs // pair, pair).transpose(1, 2))
    groups = []
    for start in range(0, len(weights), turns):
        together = of_each[start : start + turns]
        groups += [group for same in zip(*together, strict=True) for group in same]
    return torch.stack(groups)


@pytest.mark.parametrize(
    ("target", "dtypes"),
    [
        (None, [torch.float32, torch.bfloat16, torch.float16]),
        # Those that test_program.py has compiled as well. Words of 32 bits go in squares, which differ; others do not.
        ("-march=x86-64-v3", [torch.float32]),
        ("-march=x86-64", [torch.bfloat16]),
    ],
    ids=["this processor", "AVX2", "any"],
)
@pytest.mark.parametrize(
    ("sizes", "turns", "inputs"),
    [([16], 1, 32), ([37], 1, 130), ([48, 16, 5], 1, 64), ([70, 70], 2, 38), ([1], 1, 2)],
    ids=["a square", "ends", "siblings", "by turns", "least"],
)
@pytest.mark.in_short("this processor", "AVX2")
def test_the_order_is_that_of_the_compiled_step(
    sizes: list[int],
    turns: int,
    inputs: int,
    dtypes: list[torch.dtype],
    target: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if target is not None:
        require_target(target)
        if dtypes != [torch.float32]:
            optimise_less(monkeypatch)
    backend = CpuAttention(kernel.kind_of(dtypes[0]), target=None if target is None else [target])
    for dtype in dtypes:
        assert_packed(backend.library(kernel.DTYPES[dtype]), sizes, turns, inputs, dtype)


def assert_packed(library: Any, sizes: list[int], turns: int, inputs: int, dtype: torch.dtype) -> None:
    # Rows of a wider matrix, each number another one of its bits.
    whole = torch.arange(sum(sizes) * (inputs + 3), dtype=torch.int32).reshape(sum(sizes), -1)
    numbers = whole if dtype is torch.float32 else whole.to(torch.int16)
    weights = list(numbers.view(dtype)[:, :inputs].split(sizes))
    packed = PackedMatrix(library, weights, [None] * len(sizes), turns=turns)
    pair = 2 if dtype is torch.bfloat16 else 1
    expected = packed_plainly(weights, turns, int(library.decoder_lanes()), pair)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(packed.weights.view(bits).reshape(expected.shape), expected.contiguous().view(bits))


def test_a_small_matrix_takes_no_pages_beside_its_own() -> None:
    library = CpuAttention().library(kernel.DTYPES[torch.float32])
    packed = PackedMatrix(library, [torch.ones(37, 130)], [None])
    assert packed.weights.untyped_storage().nbytes() == packed.weights.nbytes
