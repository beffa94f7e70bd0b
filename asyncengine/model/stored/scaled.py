"""Weights as they are in eight bits, with scales: of the whole, of each output, or of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch

from asyncengine.errors import CheckpointError
from asyncengine.model.quantised.eight_bits import EightBits
from asyncengine.model.stored.parts import Tensors, check, scales_of
from asyncengine.model.stored.weight import CodedWeight, Decoded, Form, Parts

CODES = ("F8_E4M3", "F8_E5M2", "I8")
"""What weights are stored in."""
ENDINGS = ("_scale_inv", "_scale")
"""Of the tensor that has a weight's scales. By both names most tools store what codes are multiplied by."""
_COMPANIONS = (*ENDINGS, "_scale_2", "_zero_point", "_g_idx")
"""Tensors that are no weights, although they may be stored in eight bits and have two dimensions."""


def scaled(tensors: Tensors, blocks: Sequence[Sequence[int]] = (), inverse: bool = False) -> list[CodedWeight]:
    """Weights in eight bits, in two dimensions or, for experts, in three.

    Args:
        tensors: All that is stored, by name.
        blocks: Outputs and inputs that share a scale, where scales are of blocks; several if layers differ.
        inverse: Whether codes are divided by their scales.
    """
    found = []
    for name, codes in tensors.items():
        if codes.dtype not in CODES or len(codes.shape) < 2 or name.endswith(_COMPANIONS):
            continue
        scales = next((tensors[name + ending] for ending in ENDINGS if name + ending in tensors), None)
        if scales is None:
            raise CheckpointError(f"{name}_scale_inv or {name}_scale is missing, which the codes of {name} need")
        parts = {"codes": codes, "scales": scales}
        for what, ending in (("zeros", "_zero_point"), ("groups", "_g_idx")):
            if (part := tensors.get(f"{name}{ending}")) is not None:
                parts[what] = part
        form: Form = "fp8" if codes.dtype == "F8_E4M3" and len(codes.shape) == 2 else "none"
        rounded = not _are_of_outputs(scales.shape, codes.shape[0])
        cut = None
        if not (prod(scales.shape) == 1 or len(scales.shape) == 1 or "groups" in parts):
            cut = _cut(codes.shape, scales.shape, blocks)
            check(name, cut is not None, parts)
        decode = partial(_multiplied, cut=cut, inverse=inverse)
        found.append(CodedWeight(name, codes.shape, parts, decode, form, rounded))
    return found


def _are_of_outputs(scales: tuple[int, ...], outputs: int) -> bool:
    """Whether there is a scale for each output of a matrix, or one for all."""
    return prod(scales) == 1 or tuple(scales) in ((outputs,), (outputs, 1))


def _cut(shape: tuple[int, ...], scales: tuple[int, ...], blocks: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """Outputs and inputs that share a scale; None where scales of that shape fit nothing."""
    rows, columns = shape[-2:]
    known = [(block[0], block[1]) for block in blocks]
    known += [(1, columns), (rows, columns)]  # one for each output, or for all of an expert
    if not blocks and columns % scales[-1] == 0:
        known.append((1, columns // scales[-1]))  # groups of inputs
    counts = (scales[-2], scales[-1])
    return next(((a, b) for a, b in known if (-(-rows // a), -(-columns // b)) == counts), None)


def _multiplied(parts: Parts, cut: tuple[int, int] | None, inverse: bool) -> Decoded:
    codes, scales = parts["codes"], scales_of(parts["scales"]).float()
    scales = 1 / scales if inverse else scales
    if codes.dtype is torch.float8_e4m3fn and codes.ndim == 2 and _are_of_outputs(scales.shape, len(codes)):
        return EightBits(codes, scales.view(-1, 1).expand(len(codes), 1).contiguous())
    numbers, groups = codes.float(), parts.get("groups")
    if (zeros := parts.get("zeros")) is not None:
        numbers -= _spread(zeros.float(), numbers.shape, cut, groups)
    return numbers.mul_(_spread(scales, numbers.shape, cut, groups))


def _spread(
    scales: torch.Tensor, shape: torch.Size, cut: tuple[int, int] | None, groups: torch.Tensor | None
) -> torch.Tensor:
    """Scales for each number of a weight, or something that broadcasts to them."""
    if scales.numel() == 1:
        return scales.view(())
    if groups is not None:
        return scales[:, groups.long()]
    if scales.ndim == 1:  # of each output, or of each expert
        ones = (1,) * (len(shape) - 1)
        return scales.view(-1, *ones) if scales.shape[0] == shape[0] else scales.view(-1, 1)
    assert cut is not None
    for dimension, size in zip((-2, -1), cut, strict=True):
        if scales.shape[dimension] > 1 and size > 1:
            scales = scales.repeat_interleave(size, dimension).narrow(dimension, 0, shape[dimension])
    return scales
