"""Weights in floats of four bits: MXFP4 and NVFP4, and the NF4 and FP4 of bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.quantised.four_bits import FP4, FourBits, unpacked
from asyncengine.model.stored.tensor import StoredTensor
from asyncengine.model.stored.weight import CodedWeight, OpenFiles, Parts

_BIAS = 127
"""Of the exponents that are MXFP4's scales."""
_STATE = ".quant_state.bitsandbytes__"
_INT8_LARGEST = 127


def mxfp4_experts(tensors: Mapping[str, StoredTensor]) -> list[CodedWeight]:
    """The experts of gpt-oss in MXFP4 (Open Compute Project, Microscaling Formats, 2023).

    ``NAME_blocks`` is (experts, outputs, inputs / 32, 16) bytes of two codes each, ``NAME_scales`` (experts, outputs,
    inputs / 32) exponents. The parameter is (experts, inputs, outputs).
    """
    found = []
    for name, blocks in tensors.items():
        if not name.endswith("_blocks"):
            continue
        name = name.removesuffix("_blocks")
        scales = tensors.get(f"{name}_scales")
        if scales is None or len(blocks.shape) != 4:
            raise CheckpointError(f"{name}_scales are missing, or its blocks are not of four dimensions")
        experts, outputs, groups, size = blocks.shape
        parts = {"codes": blocks, "scales": scales}
        shape = (experts, groups * size * 2, outputs)
        found.append(CodedWeight(name, shape, parts, _mxfp4, "int4", experts, True))
    return found


def mxfp4(tensors: Mapping[str, StoredTensor]) -> list[CodedWeight]:
    """compressed-tensors' ``mxfp4-pack-quantized``: (outputs, inputs / 2) bytes, (outputs, inputs / 32) exponents."""
    return [_linear(name, codes, tensors, _mxfp4, "weight_scale") for name, codes in _packed(tensors)]


def _mxfp4(parts: Parts) -> FourBits:
    scales = torch.exp2(parts["scales"].float() - _BIAS).bfloat16()  # which holds powers of two
    groups = scales.shape[-1]
    outputs = scales.numel() // groups
    return FourBits(parts["codes"].reshape(outputs, -1), scales.view(outputs, groups), values=FP4)


def nvfp4(tensors: Mapping[str, StoredTensor], divided: bool) -> list[CodedWeight]:
    """NVFP4: (outputs, inputs / 2) bytes, a scale in fp8 for 16 inputs each, and one in float32 for all.

    Args:
        tensors: All that is stored, by name.
        divided: Whether the last is what the others are divided by (compressed-tensors' ``weight_global_scale``), or
            multiplied (ModelOpt's ``weight_scale_2``).
    """
    if divided:
        wanted = ("weight_scale", "weight_global_scale")
        return [
            _linear(name, codes, tensors, partial(_nvfp4, divided=True), *wanted) for name, codes in _packed(tensors)
        ]
    stored = [(name.removesuffix(".weight"), tensor) for name, tensor in tensors.items() if tensor.dtype == "U8"]
    wanted = ("weight_scale", "weight_scale_2")
    return [_linear(name, codes, tensors, partial(_nvfp4, divided=False), *wanted) for name, codes in stored]


def _nvfp4(parts: Parts, divided: bool) -> FourBits:
    whole = parts["all"].float().view(1, 1)
    scales = parts["scales"].float()
    return FourBits(parts["codes"], scales / whole if divided else scales * whole, values=FP4)


def _packed(tensors: Mapping[str, StoredTensor]) -> list[tuple[str, StoredTensor]]:
    ending = ".weight_packed"
    return [(name.removesuffix(ending), tensor) for name, tensor in tensors.items() if name.endswith(ending)]


def _linear(
    name: str, codes: StoredTensor, tensors: Mapping[str, StoredTensor], decode: Any, *scales: str
) -> CodedWeight:
    parts = {"codes": codes}
    for what, each in zip(("scales", "all"), scales, strict=False):
        if f"{name}.{each}" not in tensors:
            raise CheckpointError(f"{name}.{each} is missing, which the codes of {name} need")
        parts[what] = tensors[f"{name}.{each}"]
    return CodedWeight(f"{name}.weight", (codes.shape[0], 2 * codes.shape[1]), parts, decode, "int4")


def bitsandbytes(tensors: Mapping[str, StoredTensor]) -> list[CodedWeight]:
    """bitsandbytes: NF4 and FP4 of QLoRA (Dettmers et al., 2023), and LLM.int8() (Dettmers et al., 2022).

    In four bits a weight is bytes of two codes each, the first in the upper half, of which ``blocksize`` share an
    ``absmax``, which may be codes of eight bits itself; the numbers that codes stand for are stored, too. In eight bits
    ``SCB`` is the largest absolute value of each output.
    """
    found = []
    files = OpenFiles()
    for name, codes in tensors.items():
        state = next((each for each in tensors if each.startswith(f"{name}{_STATE}")), None)
        if state is not None:
            about = json.loads(bytes(files.tensor(tensors[state]).tolist()))
            names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            parts = {"codes": codes} | {
                each: tensors[f"{name}.{each}"] for each in names if f"{name}.{each}" in tensors
            }
            if not {"absmax", "quant_map"} <= parts.keys():
                raise CheckpointError(f"{name}.absmax or {name}.quant_map is missing, which its codes need")
            found.append(CodedWeight(name, tuple(about["shape"]), parts, partial(_blockwise, about=about)))
        elif codes.dtype == "I8" and name.endswith(".weight"):
            scales = tensors.get(f"{name.removesuffix('weight')}SCB")
            if scales is None:
                raise CheckpointError(f"{name} is stored in I8, and its SCB is missing")
            found.append(CodedWeight(name, codes.shape, {"codes": codes, "scales": scales}, _by_output))
    if not found and tensors:
        raise UnsupportedModelError("no weight of it is stored as bitsandbytes stores them")
    return found


def _blockwise(parts: Parts, about: Mapping[str, Any]) -> torch.Tensor:
    scales = parts["absmax"]
    if "nested_absmax" in parts:
        codes = parts["nested_quant_map"][scales.int()]
        nested = parts["nested_absmax"].repeat_interleave(about["nested_blocksize"])[: codes.numel()]
        scales = codes * nested + about["nested_offset"]
    codes = unpacked(parts["codes"].flatten()).view(-1, 2).flip(1).flatten()
    numbers = parts["quant_map"].float()[codes.int()]
    shape = torch.Size(about["shape"])
    numbers = numbers[: shape.numel()]
    return (numbers * scales.float().repeat_interleave(about["blocksize"])[: numbers.numel()]).view(shape)


def _by_output(parts: Parts) -> torch.Tensor:
    return parts["codes"].float() * (parts["scales"].float().view(-1, 1) / _INT8_LARGEST)
