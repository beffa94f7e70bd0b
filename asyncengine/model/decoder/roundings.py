"""What the weights of a compiled step are rounded to, as numbers, before they are packed."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncengine.model.decoder.four_bit_matrix import Form, form_of
from asyncengine.model.decoder.parts import Blueprint, ExpertParts, LatentParts, LayerParts, Projection
from asyncengine.model.decoder.weights import Rounding
from asyncengine.model.in_float32 import Rounded
from asyncengine.model.latent_attention import by_head


class RoundingStruct(ctypes.Structure):
    """As `Rounding` in decoder.cpp."""

    _fields_ = (
        ("numbers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "row_stride", "bits", "group")),
        ("to", ctypes.c_void_p),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class InForm:
    """A weight's numbers as what they become in one of the forms that are packed."""

    library: Any
    form: Form
    together: int = 1

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """As `Rounded`."""
        weight = weight.detach().to(torch.bfloat16)
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        outputs, inputs = weight.shape
        found = torch.empty(outputs, inputs, dtype=torch.float32)
        bits = 4 if self.form.rounding == "int4" else 8
        group = inputs if self.form.rounding == "int8" else self.form.group
        job = RoundingStruct(weight.data_ptr(), outputs, inputs, weight.stride(0), bits, group, found.data_ptr())
        self.library.decoder_round(ctypes.addressof(job), torch.get_num_threads())
        return found


class _BehindLatents:
    """The matrix behind latents, of which the part that makes keys is turned around before it is packed."""

    def __init__(self, library: Any, parts: LatentParts, rounding: Rounding) -> None:
        weight = parts.matrix.weight
        assert isinstance(weight, torch.Tensor)
        self.together = weight.shape[0] // parts.heads
        self._plain = parts.plain
        self._into, self._out_of = (
            InForm(library, form_of(each[:1], rounding)) for each in parts.split(weight.detach())
        )

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """As `Rounded`."""
        heads, rank = len(weight) // self.together, weight.shape[1]
        into, out_of = by_head(weight.detach(), heads, self._plain)
        keys = self._into(into.reshape(heads * rank, -1)).view(heads, rank, -1).transpose(1, 2)
        values = self._out_of(out_of.reshape(-1, rank)).view(heads, -1, rank)
        return torch.cat((keys, values), dim=1).view(-1, rank)


class Roundings:
    """What a compiled step's weights are rounded to; codes stay as they are.

    Attributes:
        told: Whether that can be told of all of them. It cannot of codes that become others.
        sparse: Whether there are experts.

    Args:
        library: The compiled code.
        blueprint: The model's parts, with their weights.
        rounding: What becomes of weights that are no codes.
    """

    def __init__(self, library: Any, blueprint: Blueprint, rounding: Rounding) -> None:
        self._library = library
        self._rounding: Rounding = rounding
        self.told = True
        self.sparse = any(layer.experts is not None for layer in blueprint.layers)
        found: dict[int, tuple[int, Rounded]] = {}
        if rounding != "none":
            for weight, rounded in self._weights(blueprint):
                found[weight.data_ptr()] = weight.data_ptr() + weight.nbytes, rounded
        self._starts = sorted(found)
        self._found = [found[start] for start in self._starts]

    @property
    def some(self) -> bool:
        """Whether there is a weight that is rounded."""
        return bool(self._found)

    def of(self, weight: torch.Tensor) -> Rounded | None:
        """As `InFloat32` asks for it."""
        at = bisect_right(self._starts, weight.data_ptr()) - 1
        if at < 0:
            return None
        end, rounded = self._found[at]
        return rounded if weight.data_ptr() < end else None

    def _weights(self, blueprint: Blueprint) -> Iterator[tuple[torch.Tensor, Rounded]]:
        few: Rounding = "int8" if self._rounding == "int4" else self._rounding  # of what is never in four bits
        for layer in blueprint.layers:
            for parts in _matrices(layer):
                yield from self._of_parts(parts, self._rounding)
            if layer.latents is not None:
                yield _tensor(layer.latents.matrix, "weight"), _BehindLatents(self._library, layer.latents, few)
            if layer.experts is not None:
                yield from self._of_experts(layer.experts)
        embedding, head = blueprint.embedding, blueprint.head
        tied = head.weight is embedding.weight
        if not tied:
            yield from self._of_parts([Projection(head)], few)
        if "stored_codes" not in embedding.__dict__:
            yield embedding.weight, InForm(self._library, form_of([embedding.weight], few))

    def _of_parts(self, parts: Sequence[Projection], rounding: Rounding) -> Iterator[tuple[torch.Tensor, Rounded]]:
        """Of linear layers that become one matrix."""
        weights = [part.weight if (codes := part.codes) is None else codes for part in parts]
        form = form_of(weights, rounding)
        for part, weight in zip(parts, weights, strict=True):
            if isinstance(weight, torch.Tensor):
                yield _tensor(part.linear, "weight"), InForm(self._library, form)
            elif form.rounding == "int8":
                self.told = False

    def _of_experts(self, parts: ExpertParts) -> Iterator[tuple[torch.Tensor, Rounded]]:
        for name, split in (("gate_up_proj", parts.gate_up_of), ("down_proj", parts.down_of)):
            if parts.four_bits_of(name) is None:
                whole = _tensor(parts.module, name)
                yield whole, InForm(self._library, form_of(split(whole.detach())[:1], self._rounding))


def _matrices(layer: LayerParts) -> Iterator[Sequence[Projection]]:
    yield layer.qkv
    if layer.latents is not None and layer.latents.query is not None:
        yield [layer.latents.query]
    yield [layer.output]
    if layer.down is not None:
        yield layer.gate_up
        yield [layer.down]


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    value = getattr(module, name)
    assert isinstance(value, torch.Tensor)
    return value
