"""Weights as they are in eight bits, with scales: of the whole, of each output, or of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from asyncengine.errors import CheckpointError
from asyncengine.model.quantised.eight_bits import EightBits
from asyncengine.model.stored.tensor import StoredTensor
from asyncengine.model.stored.weight import CodedWeight, Decoded, Form, Parts

CODES = ("F8_E4M3", "F8_E5M2", "I8")
"""What weights are stored in."""
ENDINGS = ("_scale_inv", "_scale")
"""Of the tensor that has a weight's scales. By both names they are what codes are multiplied by."""
_COMPANIONS = (*ENDINGS, "_scale_2", "_zero_point")
"""Tensors that are no weights, although they may be stored in eight bits and have two dimensions."""


def scaled(tensors: Mapping[str, StoredTensor], block: Sequence[int] | None) -> list[CodedWeight]:
    """Weights in eight bits, in two dimensions or, for experts, in three.

    Args:
        tensors: All that is stored, by name.
        block: Outputs and inputs that share a scale, where scales are of blocks.
    """
    found = []
    for name, codes in tensors.items():
        if codes.dtype not in CODES or len(codes.shape) < 2 or name.endswith(_COMPANIONS):
            continue
        scales = next((tensors[name + ending] for ending in ENDINGS if name + ending in tensors), None)
        if scales is None:
            raise CheckpointError(f"{name}_scale_inv or {name}_scale is missing, which the codes of {name} need")
        parts = {"codes": codes, "scales": scales}
        if (zeros := tensors.get(f"{name}_zero_point")) is not None:
            parts["zeros"] = zeros
        form: Form = "fp8" if codes.dtype == "F8_E4M3" and len(codes.shape) == 2 else "none"
        found.append(CodedWeight(name, codes.shape, parts, partial(_multiplied, block=block), form))
    return found


def _multiplied(parts: Parts, block: Sequence[int] | None) -> Decoded:
    codes, scales = parts["codes"], parts["scales"]
    if codes.dtype is torch.float8_e4m3fn and codes.ndim == 2 and scales.numel() in (1, len(codes)):
        return EightBits(codes, scales.float().view(-1, 1).expand(len(codes), 1).contiguous())
    numbers = codes.float()
    if (zeros := parts.get("zeros")) is not None:
        numbers -= _spread(zeros.float(), numbers.shape, block)
    return numbers * _spread(parts["scales"].float(), numbers.shape, block)


def _spread(scales: torch.Tensor, shape: torch.Size, block: Sequence[int] | None) -> torch.Tensor:
    """Scales for each number of a weight, or something that broadcasts to them."""
    if scales.numel() == 1:
        return scales.view(())
    if scales.ndim == 1:  # of each output, or of each expert
        ones = (1,) * (len(shape) - 1)
        return scales.view(-1, *ones) if scales.shape[0] == shape[0] else scales.view(-1, 1)
    for dimension in range(-2, 0):
        own, whole = scales.shape[dimension], shape[dimension]
        if own in (1, whole):
            continue
        size = block[dimension] if block is not None else -(-whole // own)
        if -(-whole // size) != own:
            raise ValueError(f"{own} scales for {whole} numbers in blocks of {size}")
        scales = scales.repeat_interleave(size, dimension).narrow(dimension, 0, whole)
    return scales
