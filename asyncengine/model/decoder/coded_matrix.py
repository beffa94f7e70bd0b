"""Codes that share scales with some inputs, in the order in which the compiled step reads them, which bundles.h
describes. Owned by the step thread once the model serves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncengine.model.decoder.weights import PackedMatrix, Packing, Weights, huge
from asyncengine.model.quantised.four_bits import GROUP

_ALIGNMENT = 64  # bytes


class FormatStruct(ctypes.Structure):
    """As `Format` in bundles.h."""

    _fields_ = (
        ("values", ctypes.c_int16 * 32),
        *((name, ctypes.c_int64) for name in ("bits", "group", "zeros", "stride")),
    )  # fmt: skip


class CodesStruct(ctypes.Structure):
    """As `CodesPacking`."""

    _fields_ = (
        ("numbers", ctypes.c_void_p), ("row_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "group")),
        ("step", ctypes.c_double), ("format", ctypes.c_void_p), ("target", ctypes.c_void_p),
        ("first_group", ctypes.c_int64), ("group_step", ctypes.c_int64), ("factors", ctypes.c_void_p),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Codes:
    """How the codes of a matrix are stored.

    Attributes:
        bits: Of each: 4 or 8.
        group: Inputs that share a scale: a multiple of 32, or of eight bits also 16.
        zeros: Whether there are zeros.
        values: What the sixteen codes of four bits stand for, in steps; none of bytes.
        step: What a value of 1 stands for.
    """

    bits: int
    group: int = GROUP
    zeros: bool = False
    values: tuple[int, ...] = (0,) * 16
    step: float = 1.0

    def struct(self, lanes: int, inputs: int) -> FormatStruct:
        """As the compiled code is told."""
        scales = inputs // self.group * (2 if self.zeros else 1)
        stride = -(-lanes * (inputs * self.bits // 8 + 2 * scales) // _ALIGNMENT) * _ALIGNMENT
        values = (ctypes.c_int16 * 32)(*self.values, *self.values)
        return FormatStruct(values, self.bits, self.group, self.zeros, stride)


class CodedMatrix(PackedMatrix):
    """One or several linear layers that have the same input, as one matrix of codes.

    Args:
        library: The compiled code for "int4", or for "int8" if codes have eight bits.
        weights: (outputs, inputs) each; the inputs are a multiple of 32.
        biases: As for `PackedMatrix`.
        codes: How they are stored.
        turns: As for `PackedMatrix`.
        later: As for `PackedMatrix`.
    """

    def __init__(
        self,
        library: Any,
        weights: Sequence[Weights],
        biases: Sequence[torch.Tensor | None],
        codes: Codes,
        *,
        turns: int = 1,
        later: Packing | None = None,
    ) -> None:
        self._codes = codes
        self._format = codes.struct(int(library.decoder_lanes()), weights[0].shape[1])
        super().__init__(library, weights, biases, turns=turns, later=later)
        self.struct.format = ctypes.addressof(self._format)

    def _allocate(self, groups: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        stride = int(self._format.stride)
        weights = huge(groups * stride, torch.uint8, self._library)
        return weights, torch.zeros(groups * self._lanes, dtype=torch.float32)

    def _pack_codes(
        self, part: int, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, inputs: int
    ) -> None:
        """Packs one layer's codes; scales and zeros are (outputs, groups)."""
        packing = Packing(self._library)
        scales = scales.float().contiguous()
        zeros = None if zeros is None else (zeros.float() / self._codes.step).contiguous()
        shape, group = (codes.shape[0], inputs), inputs // scales.shape[1]
        self._add_codes(packing, part, shape, group, [codes.contiguous(), scales, zeros])
        packing.run()

    def _add_codes(
        self,
        packing: Packing,
        part: int,
        shape: tuple[int, int],
        group: int,
        codes: Sequence[torch.Tensor | None],
        numbers: torch.Tensor | None = None,
    ) -> None:
        """Notes a layer's codes, scales and zeros, or numbers that are to be rounded."""
        assert self.scales is not None
        place = self.places[part]
        job = CodesStruct(
            None if numbers is None else numbers.data_ptr(),
            0 if numbers is None else numbers.stride(0),
            *([None if each is None else each.data_ptr() for each in codes] or (None, None, None)),
            *shape,
            group,
            self._codes.step,
            ctypes.addressof(self._format),
            self.weights.data_ptr(),
            place.start,
            place.step,
            self.scales.data_ptr(),
        )
        sources = [tensor for tensor in (numbers, *codes) if tensor is not None]
        packing.add("decoder_pack_codes", job, *sources)
