"""Weights of four bits in the order in which the compiled step reads them. Owned by the step thread once the model
serves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncengine.model.decoder.byte_matrix import ByteMatrix
from asyncengine.model.decoder.coded_matrix import CodedMatrix, Codes
from asyncengine.model.decoder.weights import PackedMatrix, Packing, Rounding, Weights
from asyncengine.model.quantised.four_bits import GROUP, INT4, FourBits, nearest


class FourBitMatrix(CodedMatrix):
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
        step = 1.0 if all(value.is_integer() for value in self._values) else 0.5
        self._group = math.gcd(*(weight.group for weight in given)) if given else GROUP
        zeros = any(weight.zeros is not None for weight in given)
        codes = Codes(4, self._group, zeros, tuple(int(value / step) for value in self._values), step)
        super().__init__(library, weights, biases, codes, turns=turns, later=later)

    def _pack(self, part: int, weight: Weights, later: Packing | None) -> None:
        if isinstance(weight, torch.Tensor) and self._values == INT4:
            return super()._pack(part, weight, later)
        if later is not None:
            return later.add_other(functools.partial(self._pack, part, weight, None))
        codes = nearest(weight, self._group, self._values) if isinstance(weight, torch.Tensor) else weight
        assert isinstance(codes, FourBits)
        self._pack_codes(part, codes.codes, codes.scales, codes.zeros, codes.shape[1])

    def _add(self, packing: Packing, part: int, weight: torch.Tensor) -> None:
        outputs, inputs = weight.shape
        self._add_codes(packing, part, (outputs, inputs), self._group, [], weight)


def packed(
    library: Any,
    weights: Sequence[Weights],
    biases: Sequence[torch.Tensor | None],
    rounding: Rounding,
    *,
    turns: int = 1,
    later: Packing | None = None,
) -> PackedMatrix:
    """Linear layers that have the same input as one matrix, in four bits if they are so or shall be and fit.

    Where some are codes and they cannot be four bits together, they are bytes with a scale for each 32 inputs: codes of
    eight bits, and codes of four beside others or in groups that are no multiple of 32. What has inputs that are no
    multiple of 32 is stored in int8 with a scale for each output.

    Args:
        library: The compiled code; that for "int4" if some of the weights are in four bits.
        weights: (outputs, inputs) each.
        biases: As for `PackedMatrix`.
        rounding: What becomes of weights that are no codes. Beside such it is at least bytes.
        turns: As for `PackedMatrix`.
        later: As for `PackedMatrix`.
    """
    form = form_of(weights, rounding)
    if form.rounding == "int4":
        return FourBitMatrix(library, weights, biases, turns=turns, later=later)
    if form.rounding == "bytes":
        return ByteMatrix(library, weights, biases, turns=turns, later=later)
    numbers = [each if isinstance(each, torch.Tensor) else each.weight(torch.bfloat16) for each in weights]
    return PackedMatrix(library, numbers, biases, turns=turns, int8=form.rounding == "int8", later=later)


@dataclass(frozen=True, slots=True)
class Form:
    """What the weights of a matrix become.

    Attributes:
        rounding: As `packed` is told; "int4" and "bytes" also where all are codes.
        group: Inputs that share a scale in these two.
    """

    rounding: Rounding
    group: int = GROUP


def form_of(weights: Sequence[Weights], rounding: Rounding) -> Form:
    """What `packed` makes of weights."""
    codes = [weight for weight in weights if not isinstance(weight, torch.Tensor)]
    given = [weight for weight in codes if isinstance(weight, FourBits)]
    fits = weights[0].shape[1] % GROUP == 0
    # What is beside codes and is none is not to be rounded so far.
    four_bits = len(given) == len(weights) if codes else rounding == "int4"
    if given:
        four_bits = four_bits and len({each.values for each in given}) == 1
        four_bits = four_bits and not any(weight.group % GROUP for weight in given)
    if fits and four_bits:
        return Form("int4", math.gcd(*(weight.group for weight in given)) if given else GROUP)
    if fits and (codes or rounding == "bytes"):
        return Form("bytes", math.gcd(GROUP, *(weight.group for weight in codes)))
    return Form("int8" if codes or rounding != "none" else "none")
