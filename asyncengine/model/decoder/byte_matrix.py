"""Weights of eight bits with a scale for some inputs each, in the order in which the compiled step reads them.

Owned by the step thread once the model serves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from asyncengine.model.decoder.coded_matrix import CodedMatrix, Codes
from asyncengine.model.decoder.weights import Packing, Weights
from asyncengine.model.quantised.eight_bits import as_bytes
from asyncengine.model.quantised.four_bits import GROUP, FourBits


class ByteMatrix(CodedMatrix):
    """One or several linear layers that have the same input, as one matrix of bytes.

    Args:
        library: The compiled code for "int8" or "int4".
        weights: (outputs, inputs) each. What is not in eight bits is rounded to them; four bits without zeros lose
            nothing. Inputs are a multiple of 32. All get the groups, of 16 inputs or 32, that the finest codes have.
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
        given = [weight for weight in weights if not isinstance(weight, torch.Tensor)]
        group = math.gcd(GROUP, *(weight.group for weight in given))
        codes = Codes(8, group, any(weight.zeros is not None for weight in given))
        super().__init__(library, weights, biases, codes, turns=turns, later=later)

    def _pack(self, part: int, weight: Weights, later: Packing | None) -> None:
        if isinstance(weight, torch.Tensor):
            return super()._pack(part, weight, later)
        if later is not None:
            return later.add_other(functools.partial(self._pack, part, weight, None))
        codes = as_bytes(weight) if isinstance(weight, FourBits) else weight
        self._pack_codes(part, codes.codes, codes.scales, codes.zeros, codes.shape[1])

    def _add(self, packing: Packing, part: int, weight: torch.Tensor) -> None:
        outputs, inputs = weight.shape
        self._add_codes(packing, part, (outputs, inputs), self._codes.group, [], weight)
