"""Weights of four bits in the order in which the compiled step reads them, which bundles.h describes. Owned by the
step thread once the model serves.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from asyncengine.config import Quantization
from asyncengine.model.decoder.weights import PackedMatrix, Packing, Weights, huge
from asyncengine.model.quantised.four_bits import GROUP, INT4, FourBits, nearest

_ALIGNMENT = 64  # bytes


class FormatStruct(ctypes.Structure):
    """As `FourBits` in bundles.h."""

    _fields_ = (
        ("values", ctypes.c_int16 * 32), ("run", ctypes.c_int64), ("zeros", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )  # fmt: skip


class CodesStruct(ctypes.Structure):
    """As `CodesPacking`."""

    _fields_ = (
        ("numbers", ctypes.c_void_p), ("row_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "run")),
        ("step", ctypes.c_double), ("format", ctypes.c_void_p), ("target", ctypes.c_void_p),
        ("first_group", ctypes.c_int64), ("group_step", ctypes.c_int64), ("factors", ctypes.c_void_p),
    )  # fmt: skip


class FourBitMatrix(PackedMatrix):
    """One or several linear layers that have the same input, as one matrix whose weights have four bits.

    Args:
        library: The compiled code for "int4".
        weights: (outputs, inputs) each. What is not in four bits is rounded to those that the others have. Of these,
            all stand for the same values; inputs and groups are multiples of 32.
        biases: As for `PackedMatrix`.
        turns: As for `PackedMatrix`.
        later: As for `PackedMatrix`.
    """

    def __init__(
        self,
        library: Any,
        weights: Sequence[Weights],
        biases: Sequence[torch.Tensor | None],
        *,
        turns: int = 1,
        later: Packing | None = None,
    ) -> None:
        given = [weight for weight in weights if isinstance(weight, FourBits)]
        self._values = given[0].values if given else INT4
        # Of FP4 there are halves; what is multiplied are integers.
        self._step = 1.0 if all(value.is_integer() for value in self._values) else 0.5
        self._group = math.gcd(*(weight.group for weight in given)) if given else GROUP
        zeros = any(weight.zeros is not None for weight in given)
        inputs, lanes = weights[0].shape[1], int(library.decoder_lanes())
        shares = inputs // self._group * (2 if zeros else 1)
        stride = -(-lanes * (inputs // 2 + 2 * shares) // _ALIGNMENT) * _ALIGNMENT
        integers = [int(value / self._step) for value in self._values]
        self._format = FormatStruct((ctypes.c_int16 * 32)(*integers, *integers), self._group // GROUP, zeros, stride)
        super().__init__(library, weights, biases, turns=turns, later=later)
        self.struct.four_bits = ctypes.addressof(self._format)

    def _allocate(self, groups: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        stride = int(self._format.stride)
        weights = huge(groups * stride, torch.uint8, self._library)
        return weights, torch.zeros(groups * self._lanes, dtype=torch.float32)

    def _pack(self, part: int, weight: Weights, later: Packing | None) -> None:
        if isinstance(weight, torch.Tensor) and self._values == INT4:
            return super()._pack(part, weight, later)
        if later is not None:
            return later.add_other(functools.partial(self._pack, part, weight, None))
        codes = nearest(weight, self._group, self._values) if isinstance(weight, torch.Tensor) else weight
        packing = Packing(self._library)
        scales = codes.scales.float().contiguous()
        zeros = None if codes.zeros is None else (codes.zeros.float() / self._step).contiguous()
        self._add_codes(packing, part, codes.shape, codes.group, [codes.codes.contiguous(), scales, zeros])
        packing.run()

    def _add(self, packing: Packing, part: int, weight: torch.Tensor) -> None:
        outputs, inputs = weight.shape
        self._add_codes(packing, part, (outputs, inputs), self._group, [], weight)

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
            group // GROUP,
            self._step,
            ctypes.addressof(self._format),
            self.weights.data_ptr(),
            place.start,
            place.step,
            self.scales.data_ptr(),
        )
        sources = [tensor for tensor in (numbers, *codes) if tensor is not None]
        packing.add("decoder_pack_codes", job, *sources)


def packed(
    library: Any,
    weights: Sequence[Weights],
    biases: Sequence[torch.Tensor | None],
    quantization: Quantization,
    *,
    turns: int = 1,
    later: Packing | None = None,
) -> PackedMatrix:
    """Linear layers that have the same input as one matrix, in four bits if they are so or shall be and fit.

    What does not fit is stored in int8: inputs that are no multiple of 32, or groups of such inputs, and codes beside
    weights that are none.

    Args:
        library: The compiled code; that for "int4" if some of the weights are in four bits.
        weights: (outputs, inputs) each.
        biases: As for `PackedMatrix`.
        quantization: What becomes of weights that are not in four bits.
        turns: As for `PackedMatrix`.
        later: As for `PackedMatrix`.
    """
    given = [weight for weight in weights if isinstance(weight, FourBits)]
    fits = weights[0].shape[1] % GROUP == 0
    if given:  # what is beside codes and is none is not to be rounded so far
        fits = fits and len(given) == len(weights)
        fits = fits and not any(weight.group % GROUP for weight in given) and len({each.values for each in given}) == 1
    if fits and (given or quantization == "int4"):
        return FourBitMatrix(library, weights, biases, turns=turns, later=later)
    numbers = [each.weight(torch.bfloat16) if isinstance(each, FourBits) else each for each in weights]
    int8 = bool(given) or quantization != "none"
    return PackedMatrix(library, numbers, biases, turns=turns, int8=int8, later=later)
