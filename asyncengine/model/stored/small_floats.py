"""Weights in floats of four bits: MXFP4 and NVFP4, and the NF4 and FP4 of bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import embedding

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.quantised.four_bits import FP4, GROUP, FourBits
from asyncengine.model.stored.parts import Tensors, check, companions, form_of, named, scales_of
from asyncengine.model.stored.tensor import StoredTensor
from asyncengine.model.stored.weight import CodedWeight, OpenFiles, Parts

_STATE = ".quant_state.bitsandbytes__"
_INT8_LARGEST = 127
_AT_ONCE = 1 << 20
"""Bytes of codes that become numbers at once: a multiple of what shares a scale."""


def mxfp4_experts(tensors: Tensors) -> list[CodedWeight]:
    """The experts of gpt-oss in MXFP4 (Open Compute Project, Microscaling Formats, 2023).

    ``NAME_blocks`` is (experts, outputs, inputs / 32, 16) bytes of two codes each, ``NAME_scales`` (experts, outputs,
    inputs / 32) exponents. The parameter is (experts, inputs, outputs).
    """
    found = []
    for name, blocks in named(tensors, "_blocks"):
        scales = tensors.get(f"{name}_scales")
        if scales is None or len(blocks.shape) != 4:
            raise CheckpointError(f"{name}_scales are missing, or its blocks are not of four dimensions")
        experts, outputs, groups, size = blocks.shape
        check(name, scales.shape == blocks.shape[:3] and size == GROUP // 2, {"blocks": blocks, "scales": scales})
        parts = {"codes": blocks, "scales": scales}
        shape = (experts, groups * size * 2, outputs)
        found.append(CodedWeight(name, shape, parts, _mxfp4, "int4", experts=experts, transposed=True))
    return found


def mxfp4(tensors: Tensors) -> list[CodedWeight]:
    """compressed-tensors' ``mxfp4-pack-quantized``: (outputs, inputs / 2) bytes, (outputs, inputs / 32) exponents."""
    packed = named(tensors, ".weight_packed")
    return [_linear(name, codes, tensors, _mxfp4, "weight_scale") for name, codes in packed]


def _mxfp4(parts: Parts) -> FourBits:
    scales = scales_of(parts["scales"])
    groups = scales.shape[-1]
    outputs = scales.numel() // groups
    return FourBits(parts["codes"].reshape(outputs, -1), scales.view(outputs, groups), values=FP4)


def nvfp4(tensors: Tensors, divided: bool) -> list[CodedWeight]:
    """NVFP4: (outputs, inputs / 2) bytes, a scale in fp8 for 16 inputs each, and one in float32 for all.

    Args:
        tensors: All that is stored, by name.
        divided: Whether the last is what the others are divided by (compressed-tensors' ``weight_global_scale``), or
            multiplied (ModelOpt's ``weight_scale_2``).
    """
    if divided:
        stored, wanted = named(tensors, ".weight_packed"), ("weight_scale", "weight_global_scale")
    else:
        stored = [(name, tensor) for name, tensor in named(tensors, ".weight") if tensor.dtype == "U8"]
        wanted = ("weight_scale", "weight_scale_2")
    decode = partial(_nvfp4, divided=divided)
    return [_linear(name, codes, tensors, decode, *wanted) for name, codes in stored]


def _nvfp4(parts: Parts, divided: bool) -> FourBits:
    whole = parts["all"].float().view(1, 1)
    scales = parts["scales"].float()
    return FourBits(parts["codes"], scales / whole if divided else scales * whole, values=FP4)


def _linear(name: str, codes: StoredTensor, tensors: Tensors, decode: Any, *scales: str) -> CodedWeight:
    found = companions(tensors, name, *scales)
    parts = {"codes": codes} | dict(zip(("scales", "all"), found.values(), strict=False))
    if f"{name}.weight_zero_point" in tensors:
        raise UnsupportedModelError(f"{name}: floats of four bits with zeros are not supported")
    outputs, inputs = codes.shape[0], 2 * codes.shape[-1]
    of = parts["scales"].shape
    check(name, len(of) == len(codes.shape) == 2 and of[0] == outputs and inputs % of[1] == 0, parts)
    return CodedWeight(f"{name}.weight", (outputs, inputs), parts, decode, form_of(4, inputs, of[1]))


def bitsandbytes(tensors: Tensors) -> list[CodedWeight]:
    """bitsandbytes: NF4 and FP4 of QLoRA (Dettmers et al., 2023), and LLM.int8() (Dettmers et al., 2022).

    In four bits a weight is bytes of two codes each, the first in the upper half, of which ``blocksize`` share an
    ``absmax``, which may be codes of eight bits itself; the numbers that codes stand for are stored, too. In eight bits
    ``SCB`` is the largest absolute value of each output.
    """
    found, files = [], OpenFiles()
    states = {name.partition(_STATE)[0]: tensor for name, tensor in tensors.items() if _STATE in name}
    for name, codes in tensors.items():
        state = states.get(name)
        if state is not None:
            about = json.loads(bytes(files.tensor(state).tolist()))
            names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            parts = {"codes": codes, "state": state} | {
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
    shape = torch.Size(about["shape"])
    numbers, size = torch.empty(shape.numel()), int(about["blocksize"])
    table = parts["quant_map"].float()
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), -1)  # (256, 2): of each byte
    codes = parts["codes"].flatten()
    for start in range(0, len(codes), _AT_ONCE):
        some = embedding(codes[start : start + _AT_ONCE].int(), pairs).flatten()
        first, last = 2 * start, min(2 * start + len(some), len(numbers))
        own = scales[first // size : -(-last // size)].float().repeat_interleave(size)[: last - first]
        numbers[first:last] = some[: last - first] * own
    return numbers.view(shape)


def _by_output(parts: Parts) -> torch.Tensor:
    return parts["codes"].float() * (parts["scales"].float().view(-1, 1) / _INT8_LARGEST)
