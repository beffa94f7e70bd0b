"""Linear layers in integers of a few bits: GPTQ, AWQ, and compressed-tensors' packed integers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.quantised.four_bits import FourBits, packed
from asyncengine.model.stored.bits import unpacked
from asyncengine.model.stored.tensor import StoredTensor
from asyncengine.model.stored.weight import CodedWeight, OpenFiles, Parts

_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word AWQ puts the outputs."""


def gptq(tensors: Mapping[str, StoredTensor], about: Mapping[str, Any]) -> list[CodedWeight]:
    """GPTQ (Frantar et al., 2022) as AutoGPTQ and GPTQModel store it.

    ``qweight`` (inputs * bits / 32, outputs) has inputs one after the other in a word, ``qzeros`` (groups, outputs *
    bits / 32) zeros, less one in the first version of the format, ``scales`` (groups, outputs), ``g_idx`` (inputs,) the
    group of each input.
    """
    bits, kind = about.get("bits"), about.get("checkpoint_format", "gptq")
    if bits not in _GPTQ_BITS or kind not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(f"GPTQ with bits {bits!r} and checkpoint_format {kind!r} is not supported")
    found = []
    for name, codes in _named(tensors, ".qweight"):
        parts, own = {"qweight": codes} | _companions(tensors, name, "qzeros", "scales"), bits
        if (groups := tensors.get(f"{name}.g_idx")) is not None:
            parts["g_idx"] = groups
            own = codes.shape[0] * 32 // groups.shape[0]  # some layers may have more than others
            if own not in _GPTQ_BITS:
                raise UnsupportedModelError(f"{name}: GPTQ with {own} bits is not supported")
        shape = codes.shape[1], codes.shape[0] * 32 // own
        decode = partial(_gptq, bits=own, less=int(kind == "gptq"))
        found.append(CodedWeight(f"{name}.weight", shape, parts, decode, "int4" if own == 4 else "none"))
    return found


def _gptq(parts: Parts, bits: int, less: int) -> torch.Tensor | FourBits:
    outputs = parts["qweight"].shape[1]
    inputs = parts["qweight"].shape[0] * 32 // bits
    codes = unpacked(parts["qweight"].t(), bits, inputs)
    zeros = unpacked(parts["qzeros"], bits, outputs) + less & (1 << bits) - 1
    return _grouped(codes, parts["scales"].t(), zeros.t(), bits, parts.get("g_idx"))


def awq(tensors: Mapping[str, StoredTensor], about: Mapping[str, Any]) -> list[CodedWeight]:
    """AWQ (Lin et al., 2023) as AutoAWQ stores it for its GEMM kernel.

    ``qweight`` (inputs, outputs / 8) and ``qzeros`` (groups, outputs / 8) have outputs in a word, in AWQ's order,
    ``scales`` is (groups, outputs).
    """
    bits, kind = about.get("bits", 4), str(about.get("version", "gemm")).lower()
    if bits != 4 or kind != "gemm":
        raise UnsupportedModelError(f"AWQ with bits {bits!r} and version {kind!r} is not supported; 4 and 'gemm' are")
    found = []
    for name, codes in _named(tensors, ".qweight"):
        parts = {"qweight": codes} | _companions(tensors, name, "qzeros", "scales")
        shape = codes.shape[1] * 8, codes.shape[0]
        found.append(CodedWeight(f"{name}.weight", shape, parts, _awq, "int4"))
    return found


def _awq(parts: Parts) -> torch.Tensor | FourBits:
    codes, zeros = (_awq_outputs(parts[name]) for name in ("qweight", "qzeros"))
    return _grouped(codes.t(), parts["scales"].t(), zeros.t(), 4, None)


def _awq_outputs(words: torch.Tensor) -> torch.Tensor:
    numbers = unpacked(words, 4, words.shape[-1] * 8)
    return numbers.view(len(words), -1, 8)[..., list(_AWQ_ORDER)].flatten(1)


def packed_integers(tensors: Mapping[str, StoredTensor], zeros: bool) -> list[CodedWeight]:
    """compressed-tensors' ``pack-quantized``.

    ``weight_packed`` (outputs, words) has inputs in a word, each more by half the range than it is, ``weight_scale`` is
    (outputs, groups), ``weight_zero_point`` (outputs in words, groups) or as it is, ``weight_shape`` (2,),
    ``weight_g_idx`` (inputs,) the group of each input.

    Args:
        tensors: All that is stored, by name.
        zeros: Whether each weight has zeros.
    """
    found, files = [], OpenFiles()
    for name, codes in _named(tensors, ".weight_packed"):
        parts = {"weight_packed": codes} | _companions(
            tensors, name, "weight_scale", *(["weight_zero_point"] if zeros else [])
        )
        shape = _companions(tensors, name, "weight_shape")["weight_shape"]
        for optional in ("weight_zero_point", "weight_g_idx"):
            if (part := tensors.get(f"{name}.{optional}")) is not None:
                parts[optional] = part
        outputs, inputs = files.tensor(shape).tolist()
        bits = codes.shape[1] * 32 // inputs  # which may differ from layer to layer
        decode = partial(_packed_integers, bits=bits, inputs=inputs)
        found.append(CodedWeight(f"{name}.weight", (outputs, inputs), parts, decode, "int4" if bits == 4 else "none"))
    return found


def _packed_integers(parts: Parts, bits: int, inputs: int) -> torch.Tensor | FourBits:
    scales, half = parts["weight_scale"], 1 << bits - 1
    codes = unpacked(parts["weight_packed"], bits, inputs)
    zeros = parts.get("weight_zero_point")
    if zeros is None:
        zeros = torch.full_like(scales, half, dtype=torch.uint8)
    elif zeros.dtype is torch.int32:
        zeros = unpacked(zeros.t(), bits, codes.shape[0]).t()
    else:
        zeros = (zeros.int() + half).to(torch.uint8)
    return _grouped(codes, scales, zeros, bits, parts.get("weight_g_idx"))


def _grouped(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group_of: torch.Tensor | None
) -> torch.Tensor | FourBits:
    """Weights of which each group of inputs has a scale and a zero.

    Args:
        codes: (outputs, inputs) of 0 to 2**bits - 1.
        scales: (outputs, groups); one row where all outputs have the same.
        zeros: As `scales`: the code that stands for 0.
        bits: Of a code.
        group_of: (inputs,) the group of each input; None where they lie one after the other.
    """
    outputs, inputs = codes.shape
    scales, zeros = (each.expand(outputs, -1) for each in (scales, zeros.to(scales.dtype)))
    groups = scales.shape[1]
    if inputs % groups and group_of is None:
        raise ValueError(f"{inputs} inputs are not {groups} groups")
    in_order = inputs % groups == 0
    if in_order and group_of is not None:
        in_order = torch.equal(group_of.long(), torch.arange(inputs) // (inputs // groups))
    if bits == 4 and in_order and inputs % 2 == 0:
        half = zeros.sub(8)
        return FourBits(packed(codes), scales.contiguous(), half.contiguous() if half.any() else None)
    scales, zeros = scales.float(), zeros.float()
    if in_order:
        grouped = codes.float().view(outputs, groups, -1)
        return ((grouped - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).view(outputs, inputs)
    assert group_of is not None
    own = group_of.long()
    return (codes.float() - zeros[:, own]) * scales[:, own]


def _named(tensors: Mapping[str, StoredTensor], ending: str) -> list[tuple[str, StoredTensor]]:
    """Tensors whose names end so, by what is before that."""
    return [(name.removesuffix(ending), tensor) for name, tensor in tensors.items() if name.endswith(ending)]


def _companions(tensors: Mapping[str, StoredTensor], name: str, *wanted: str) -> dict[str, StoredTensor]:
    """Tensors without which a weight's codes mean nothing.

    Raises:
        CheckpointError: One is missing.
    """
    for each in wanted:
        if f"{name}.{each}" not in tensors:
            raise CheckpointError(f"{name}.{each} is missing, which the codes of {name} need")
    return {each: tensors[f"{name}.{each}"] for each in wanted}
