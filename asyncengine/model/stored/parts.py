"""The tensors that a weight is stored in: which belong together, and whether they can."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from asyncengine.errors import CheckpointError
from asyncengine.model.quantised.four_bits import GROUP
from asyncengine.model.stored.tensor import StoredTensor
from asyncengine.model.stored.weight import Form

Tensors = Mapping[str, StoredTensor]
_BIAS = 127
"""Of exponents that are stored as scales."""


def named(tensors: Tensors, ending: str) -> list[tuple[str, StoredTensor]]:
    """Tensors whose names end so, by what is before that."""
    return [(name.removesuffix(ending), tensor) for name, tensor in tensors.items() if name.endswith(ending)]


def companions(tensors: Tensors, name: str, *wanted: str) -> dict[str, StoredTensor]:
    """Tensors without which a layer's codes mean nothing, by the ends of their names.

    Raises:
        CheckpointError: One is missing.
    """
    for each in wanted:
        if f"{name}.{each}" not in tensors:
            raise CheckpointError(f"{name}.{each} is missing, which the codes of {name} need")
    return {each: tensors[f"{name}.{each}"] for each in wanted}


def check(name: str, fits: bool, parts: Mapping[str, StoredTensor]) -> None:
    """Refuses tensors whose shapes do not belong together.

    Raises:
        CheckpointError: So it is.
    """
    if not fits:
        shapes = ", ".join(f"{what} {part.shape}" for what, part in parts.items())
        raise CheckpointError(f"what the codes of {name} are stored in does not fit together: {shapes}")


def form_of(bits: int, inputs: int, groups: int, out_of_order: bool = False) -> Form:
    """What integers can be kept as: groups of four bits must be whole multiples of `GROUP`, in order."""
    return "int4" if bits == 4 and not out_of_order and inputs % (groups * GROUP) == 0 else "none"


def scales_of(stored: torch.Tensor) -> torch.Tensor:
    """Scales as floats: bytes are exponents."""
    if stored.dtype is torch.uint8:
        return torch.exp2(stored.float() - _BIAS).bfloat16()  # which holds powers of two
    if not stored.is_floating_point():
        raise ValueError(f"scales in {stored.dtype}")
    return stored if stored.dtype in (torch.float16, torch.bfloat16, torch.float32) else stored.float()
