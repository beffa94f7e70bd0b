"""Linear layers in integers of a few bits: GPTQ, AWQ, and compressed-tensors' packed integers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch

from asyncengine.errors import UnsupportedModelError
from asyncengine.model.quantised.four_bits import FourBits, packed
from asyncengine.model.stored.bits import unpacked
from asyncengine.model.stored.parts import Tensors, check, companions, form_of, named
from asyncengine.model.stored.weight import CodedWeight, OpenFiles, Parts

_ROWS = 256
"""Outputs whose numbers are made at once."""
_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word AWQ puts the outputs."""


def gptq(tensors: Tensors, about: Mapping[str, Any]) -> list[CodedWeight]:
    """GPTQ (Frantar et al., 2022) as AutoGPTQ and GPTQModel store it.

    ``qweight`` (inputs * bits / 32, outputs) has inputs one after the other in a word, ``qzeros`` (groups, outputs *
    bits / 32) zeros, less one in the first version of the format, ``scales`` (groups, outputs), ``g_idx`` (inputs,) the
    group of each input.
    """
    bits, kind = about.get("bits"), about.get("checkpoint_format", "gptq")
    if bits not in _GPTQ_BITS or kind not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(f"GPTQ with bits {bits!r} and checkpoint_format {kind!r} is not supported")
    if rotation := about.get("rotation"):
        raise UnsupportedModelError(f"GPTQ with rotation {rotation!r} is not supported: inputs would have to be, too")
    # GPTQModel takes one from all zeros of a word at once, so that a zero of 0 borrows from its neighbour.
    of_words = "gptqmodel" in str(about.get("meta") or {}).lower() and bits != 3
    found = []
    for name, codes in named(tensors, ".qweight"):
        parts, own = {"qweight": codes} | companions(tensors, name, "qzeros", "scales"), int(bits)
        if (groups := tensors.get(f"{name}.g_idx")) is not None and groups.shape[0]:
            parts["g_idx"] = groups
            own = codes.shape[0] * 32 // groups.shape[0]  # some layers may have more than others
            if own not in _GPTQ_BITS:
                raise UnsupportedModelError(f"{name}: GPTQ with {own} bits is not supported")
        shape = codes.shape[1], codes.shape[0] * 32 // own
        decode = partial(_gptq, bits=own, less=int(kind == "gptq"), of_words=of_words)
        scales = parts["scales"].shape
        check(name, parts["qzeros"].shape == (scales[0], shape[0] * own // 32) and scales[1:] == shape[:1], parts)
        form = form_of(own, shape[1], scales[0], about.get("desc_act", False))
        found.append(CodedWeight(f"{name}.weight", shape, parts, decode, form))
    return found


def _gptq(parts: Parts, bits: int, less: int, of_words: bool) -> torch.Tensor | FourBits:
    outputs = parts["qweight"].shape[1]
    inputs = parts["qweight"].shape[0] * 32 // bits
    codes, zeros = unpacked(parts["qweight"].t(), bits, inputs), parts["qzeros"]
    if of_words:
        zeros, less = (zeros.long() + less * sum(1 << at for at in range(0, 32, bits))).to(torch.int32), 0
    zeros = unpacked(zeros, bits, outputs) + less & (1 << bits) - 1
    return _grouped(codes, parts["scales"].t(), zeros.t(), bits, parts.get("g_idx"))


def awq(tensors: Tensors, about: Mapping[str, Any]) -> list[CodedWeight]:
    """AWQ (Lin et al., 2023) as AutoAWQ stores it for its GEMM kernel.

    ``qweight`` (inputs, outputs / 8) and ``qzeros`` (groups, outputs / 8) have outputs in a word, in AWQ's order,
    ``scales`` is (groups, outputs).
    """
    bits, kind = about.get("bits", 4), str(about.get("version", "gemm")).lower()
    if bits != 4 or kind != "gemm":
        raise UnsupportedModelError(f"AWQ with bits {bits!r} and version {kind!r} is not supported; 4 and 'gemm' are")
    found = []
    for name, codes in named(tensors, ".qweight"):
        parts = {"qweight": codes} | companions(tensors, name, "qzeros", "scales")
        shape, scales = (codes.shape[1] * 8, codes.shape[0]), parts["scales"].shape
        check(name, parts["qzeros"].shape == (scales[0], codes.shape[1]) and scales[1:] == shape[:1], parts)
        found.append(CodedWeight(f"{name}.weight", shape, parts, _awq, form_of(4, shape[1], scales[0])))
    return found


def _awq(parts: Parts) -> torch.Tensor | FourBits:
    codes, zeros = (_awq_outputs(parts[name]) for name in ("qweight", "qzeros"))
    return _grouped(codes.t(), parts["scales"].t(), zeros.t(), 4, None)


def _awq_outputs(words: torch.Tensor) -> torch.Tensor:
    numbers = unpacked(words, 4, words.shape[-1] * 8)
    return numbers.view(len(words), -1, 8)[..., list(_AWQ_ORDER)].flatten(1)


def packed_integers(tensors: Tensors, widths: Collection[int], zeros: bool) -> list[CodedWeight]:
    """compressed-tensors' ``pack-quantized``.

    ``weight_packed`` (outputs, words) has inputs in a word, each more by half the range than it is, ``weight_scale`` is
    (outputs, groups), ``weight_zero_point`` (outputs in words, groups) or as it is, ``weight_shape`` (2,),
    ``weight_g_idx`` (inputs,) the group of each input. Older versions leave bits of a word over, instead of a number
    across two of them.

    Args:
        tensors: All that is stored, by name.
        widths: Bits that numbers have, of one layer or the other.
        zeros: Whether each weight has zeros.
    """
    found, files = [], OpenFiles()
    for name, codes in named(tensors, ".weight_packed"):
        wanted = ("weight_scale", "weight_shape", *(["weight_zero_point"] if zeros else []))
        parts = {"weight_packed": codes} | companions(tensors, name, *wanted)
        for optional in ("weight_zero_point", "weight_g_idx"):
            if (part := tensors.get(f"{name}.{optional}")) is not None:
                parts[optional] = part
        outputs, inputs = files.tensor(parts.pop("weight_shape")).tolist()
        scales, words = parts["weight_scale"].shape, codes.shape[-1]
        fit = [(bits, False) for bits in widths if words == -(-inputs * bits // 32)]
        fit += [(bits, True) for bits in widths if words == -(-inputs // (32 // bits))]
        check(name, bool(fit) and codes.shape[0] == outputs and scales[0] in (1, outputs), parts)
        bits, padded = fit[0]
        decode = partial(_packed_integers, bits=bits, inputs=inputs, padded=padded)
        form = form_of(bits, inputs, scales[-1], "weight_g_idx" in parts)
        found.append(CodedWeight(f"{name}.weight", (outputs, inputs), parts, decode, form))
    return found


def _packed_integers(parts: Parts, bits: int, inputs: int, padded: bool) -> torch.Tensor | FourBits:
    scales, half = parts["weight_scale"], 1 << bits - 1
    codes = unpacked(parts["weight_packed"], bits, inputs, padded)
    zeros = parts.get("weight_zero_point")
    if zeros is None:
        zeros = torch.full_like(scales, half, dtype=torch.uint8)
    elif zeros.dtype is torch.int32:
        zeros = unpacked(zeros.t(), bits, codes.shape[0], padded).t()
    else:
        zeros = (zeros.int() + half).to(torch.uint8)
    return _grouped(codes, scales.view(len(scales), -1), zeros, bits, parts.get("weight_g_idx"))


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
    assert in_order or group_of is not None
    own = torch.arange(inputs) // (inputs // groups) if in_order or group_of is None else group_of.long()
    found = torch.empty(outputs, inputs)
    for start in range(0, outputs, _ROWS):
        part = slice(start, start + _ROWS)
        found[part] = (codes[part].float() - zeros[part].float()[:, own]) * scales[part].float()[:, own]
    return found
