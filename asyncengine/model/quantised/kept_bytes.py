"""How many bytes weights take while a model serves, reckoned from a checkpoint's headers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from typing import Literal

import torch

from asyncengine.config import Quantization
from asyncengine.model.checkpoint import Checkpoint
from asyncengine.model.quantised.four_bits import GROUP
from asyncengine.model.stored.weight import CodedWeight

_SCALE, _SHORT_SCALE = 4, 2
"""Bytes of a scale; the latter in the compiled code of the CPU, for four bits."""
_ALIGNMENT = 16
"""Inputs of linear layers that the compiled code multiplies are multiples of it."""
_BEHIND_LATENTS = "kv_b_proj.weight"
Where = Literal["cuda", "compiled", "modules"]
"""What multiplies: a CUDA device, the compiled step of the CPU, or there the modules of transformers."""


def kept_bytes(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    quantization: Quantization,
    words: int,
    where: Where,
    of_head: tuple[int, int] | None = None,
) -> int:
    """Bytes of all weights in the form in which they are kept.

    What is a linear layer is told by shapes: matrices that have nothing to do with the vocabulary.

    Args:
        checkpoint: Where they come from.
        dtype: Of what is kept as it is.
        quantization: `EngineConfig.quantization`.
        words: Size of the vocabulary.
        where: What multiplies.
        of_head: Where latents are kept, how many outputs of the matrix behind them make a head's key, and its value.
    """
    tables = [shape for shape in checkpoint.shapes.values() if words in shape and len(shape) == 2]
    if quantization == "none" or not checkpoint.tensors:
        tied = len(tables) == 1 and where == "modules"  # embedding and head are kept apart there
        return checkpoint.weight_bytes(dtype) + (prod(tables[0]) * dtype.itemsize if tied else 0)
    forms = checkpoint.kept_forms(quantization, "cuda" if where == "cuda" else "cpu")
    as_stored = {
        name: weight for name, weight in checkpoint.coded.items() if weight.stays(forms) and words not in weight.shape
    }
    in_bytes = _beside_bytes(as_stored) if where == "compiled" else set()
    total, cuda = 0, where == "cuda"
    by_modules = where == "modules" and quantization != "fp8"
    for name, shape in checkpoint.shapes.items():
        count, outputs = prod(shape), prod(shape[:-1])
        linear = words not in shape and not as_stored
        if of_head is not None and name.endswith(_BEHIND_LATENTS) and quantization != "fp8":
            total += count * dtype.itemsize if cuda else _behind_latents(shape, of_head, bool(as_stored))
        elif name in in_bytes:
            total += _in_bytes(shape, True)
        elif name in as_stored and as_stored[name].form == "int8":
            total += as_stored[name].kept_nbytes + outputs * _SCALE
        elif name in as_stored:
            total += as_stored[name].nbytes if cuda or quantization == "fp8" else count // 2 + _scales(as_stored[name])
        elif len(shape) < 2 or (quantization == "fp8" and not (linear and len(shape) == 2)):
            total += count * dtype.itemsize
        elif by_modules and words in shape:
            pass
        elif linear:
            total += linear_bytes(shape, dtype, quantization, where)
        elif (by_modules and shape[-1] % _ALIGNMENT) or (quantization == "int4" and cuda):
            total += count * dtype.itemsize
        else:
            total += _in_bytes(shape, bool(as_stored))
    if by_modules and tables:  # the embedding stays a table, and the head is in bytes
        total += prod(tables[0]) * dtype.itemsize + _in_bytes((words, prod(tables[0]) // words), bool(as_stored))
    return total


def linear_bytes(shape: tuple[int, ...], dtype: torch.dtype, quantization: Quantization, where: Where) -> int:
    """Bytes of a weight that is rounded: of a linear layer that is no head, or of experts.

    Args:
        shape: Its inputs come last.
        dtype: As of `kept_bytes`, and so are the others.
        quantization: Not "none".
        where: What multiplies.
    """
    count, outputs, inputs = prod(shape), prod(shape[:-1]), shape[-1]
    if quantization == "int4" and inputs % GROUP == 0:
        scales = count // GROUP * _SCALE if where == "cuda" else count // GROUP * _SHORT_SCALE + outputs * _SCALE
        return count // 2 + scales
    in_bytes = where == "compiled" or inputs % _ALIGNMENT == 0
    if quantization == "fp8":
        in_bytes = not any(size % _ALIGNMENT for size in shape)
    elif quantization == "int4" and where == "cuda":
        in_bytes = False
    return _in_bytes(shape, False) if in_bytes else count * dtype.itemsize


def _beside_bytes(as_stored: Mapping[str, CodedWeight]) -> set[str]:
    """Weights of four bits that the compiled step multiplies with others of eight, and has in eight therefore."""
    beside: dict[str, list[CodedWeight]] = defaultdict(list)
    for name, weight in as_stored.items():
        together = re.sub(r"\.[qkv]_proj\.|\.(gate|up)_proj\.", lambda part: "." if part[1] else ".qkv.", name)
        beside[together].append(weight)
    mixed = (each for each in beside.values() if len({weight.form for weight in each}) > 1)
    return {weight.name for each in mixed for weight in each if weight.form == "int4"}


def _behind_latents(shape: tuple[int, ...], of_head: tuple[int, int], groups: bool) -> int:
    """Bytes of a matrix that is multiplied with queries from its other side, and is never in four bits."""
    (outputs, rank), (key, value) = shape, of_head
    heads = outputs // (key + value)
    return _in_bytes((heads * rank, key), groups) + _in_bytes((heads * value, rank), groups)


def _in_bytes(shape: tuple[int, ...], groups: bool) -> int:
    """Bytes of a matrix in eight bits; with a scale for some inputs each, or for each output."""
    count, outputs = prod(shape), prod(shape[:-1])
    return count + outputs * _SCALE + (count // GROUP * _SHORT_SCALE if groups and shape[-1] % GROUP == 0 else 0)


def _scales(weight: CodedWeight) -> int:
    """Bytes of scales and zeros of four bits in the compiled step."""
    if weight.scale_nbytes:
        return weight.size // GROUP * weight.scale_nbytes
    own = [part for what, part in weight.parts.items() if "scale" in what]
    zeros = any("zero" in what for what in weight.parts)
    return sum(prod(part.shape) for part in own[:1]) * _SHORT_SCALE * (2 if zeros else 1)
