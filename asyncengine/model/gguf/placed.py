"""Where a model has what a GGUF file stores, and what llama.cpp has done to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from asyncengine.model.gguf.blocks import decode, decode_bytes
from asyncengine.model.gguf.header import BlockTensor
from asyncengine.model.quantised.eight_bits import EightBits
from asyncengine.model.quantised.four_bits import GROUP, FourBits
from asyncengine.model.stored.tensor import StoredTensor
from asyncengine.model.stored.weight import CodedWeight, Decoded, Form, Parts

Change = Callable[[Decoded], Decoded]


def numbers(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """A change of numbers, which codes do not survive."""

    def changed(found: Decoded) -> Decoded:
        assert isinstance(found, torch.Tensor)
        return change(found)

    return changed


def rows(order: Callable[[int], torch.Tensor]) -> Change:
    """Another order of outputs.

    Args:
        order: Given how many there are, where each of them is.
    """

    def changed(found: Decoded) -> Decoded:
        at = order(found.shape[0])
        if isinstance(found, torch.Tensor):
            return found[at]
        zeros = None if found.zeros is None else found.zeros[at]
        if isinstance(found, EightBits):
            return EightBits(found.codes[at], found.scales[at], zeros)
        return FourBits(found.codes[at], found.scales[at], zeros, found.values)

    return changed


def columns(order: torch.Tensor, width: int) -> Change:
    """Another order of inputs.

    Args:
        order: Where each run of them is.
        width: How many inputs a run has. Codes whose groups fit into one stay codes.
    """

    def moved(found: torch.Tensor, each: int) -> torch.Tensor:
        return found.view(found.shape[0], -1, each)[:, order].flatten(1)

    def changed(found: Decoded) -> Decoded:
        if isinstance(found, torch.Tensor):
            return moved(found, width)
        groups = width // found.group
        zeros = None if found.zeros is None else moved(found.zeros, groups)
        if isinstance(found, EightBits):
            return EightBits(moved(found.codes, width), moved(found.scales, groups), zeros)
        return FourBits(moved(found.codes, width // 2), moved(found.scales, groups), zeros, found.values)

    return changed


def halves_from_pairs(heads: int) -> Change:
    """Outputs of heads whose neighbours rotate together, for a model in which the two halves of a head do."""
    return rows(lambda count: torch.arange(count).view(heads, -1, 2).transpose(1, 2).flatten())


@dataclass(frozen=True, slots=True)
class Placed:
    """One parameter of a model.

    Attributes:
        name: As transformers calls it.
        tensors: What is stored of it.
        shape: The parameter's, if it is not that of the one tensor.
        change: What makes of one tensor's rows those of the parameter; None changes nothing.
        join: Makes one of several tensors.
        keeps_codes: Whether all that leaves codes what they are.
        experts: How many matrices there are in it; 0 if it is one.
        transposed: Whether they have inputs first in the model.
    """

    name: str
    tensors: tuple[BlockTensor, ...]
    shape: tuple[int, ...] | None = None
    change: Change | None = None
    join: Callable[[Sequence[Decoded]], Decoded] | None = None
    keeps_codes: bool = True
    experts: int = 0
    transposed: bool = False

    def weight(self) -> CodedWeight:
        """What a load reads."""
        kinds = {tensor.type_id for tensor in self.tensors}
        four_bits = self.keeps_codes and len(kinds) == 1
        four_bits = four_bits and all(tensor.blocks.four_bits and tensor.scale is None for tensor in self.tensors)
        parts = {str(index): _stored(tensor) for index, tensor in enumerate(self.tensors)}
        scales = {f"{index} scale": _stored(each.scale) for index, each in enumerate(self.tensors) if each.scale}
        shape = self.tensors[0].shape if self.shape is None else self.shape
        decoded = partial(self._decoded, four_bits=four_bits)
        form: Form = "int4" if four_bits and len(shape) > 1 else "int8" if self._may_be_bytes(shape) else "none"
        return CodedWeight(
            self.name,
            shape,
            parts | scales,
            decoded,
            form,
            experts=self.experts,
            transposed=self.transposed,
            decode_bytes=self._bytes if form == "int8" else None,
            scale_nbytes=self.tensors[0].blocks.scale_nbytes if form != "none" else 0,
        )

    def _may_be_bytes(self, shape: tuple[int, ...]) -> bool:
        if not self.keeps_codes or self.experts or self.join is not None or len(shape) != 2 or shape[1] % GROUP:
            return False
        return len(self.tensors) == 1 and self.tensors[0].blocks.eight_bits and self.tensors[0].scale is None

    def _bytes(self, parts: Parts) -> EightBits:
        [tensor], [data] = self.tensors, parts.values()
        found: Decoded = decode_bytes(tensor.type_id, data, (len(data), tensor.shape[-1]))
        found = found if self.change is None else self.change(found)
        assert isinstance(found, EightBits)
        return found

    def _decoded(self, parts: Parts, four_bits: bool) -> Decoded:
        found = []
        for index, tensor in enumerate(self.tensors):
            data = parts[str(index)]
            each: Decoded = decode(tensor.type_id, data, (len(data), tensor.shape[-1]))
            if isinstance(each, FourBits) and not four_bits:
                each = each.weight(torch.float32)
            if tensor.scale is not None and isinstance(each, torch.Tensor):
                scale = decode(tensor.scale.type_id, parts[f"{index} scale"], (1, tensor.scale.shape[-1]))
                assert isinstance(scale, torch.Tensor)
                each *= scale.flatten().repeat_interleave(len(each) // scale.numel())[:, None]
            if len(tensor.shape) == 1 and isinstance(each, torch.Tensor):
                each = each[0]
            found.append(each if self.change is None else self.change(each))
        whole = found[0] if self.join is None else self.join(found)
        if not isinstance(whole, torch.Tensor) or self.experts:
            return whole
        return whole.reshape(self.shape or self.tensors[0].shape)


@dataclass(frozen=True, slots=True)
class Given:
    """One parameter of a model that is no tensor of the file.

    Attributes:
        name: As transformers calls it.
        numbers: What it is.
    """

    name: str
    numbers: torch.Tensor

    def weight(self) -> CodedWeight:
        """As the same of `Placed`."""
        return CodedWeight(self.name, tuple(self.numbers.shape), {}, lambda _: self.numbers.clone())


def _stored(tensor: BlockTensor) -> StoredTensor:
    return StoredTensor(tensor.name, "U8", (tensor.rows, tensor.row_bytes), tensor.file, tensor.start)
