"""Weights of eight bits with a scale for each 32 inputs, in the order in which the compiled step reads them.

Owned by the step thread once the model serves.
"""

from __future__ import annotations

import functools
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
            nothing. Inputs, and groups of eight bits, are multiples of 32.
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
        super().__init__(library, weights, biases, Codes(8), turns=turns, later=later)

    def _pack(self, part: int, weight: Weights, later: Packing | None) -> None:
        if isinstance(weight, torch.Tensor):
            return super()._pack(part, weight, later)
        if later is not None:
            return later.add_other(functools.partial(self._pack, part, weight, None))
        codes = as_bytes(weight) if isinstance(weight, FourBits) else weight
        self._pack_codes(part, codes.codes, codes.scales, None, codes.shape[1])

    def _add(self, packing: Packing, part: int, weight: torch.Tensor) -> None:
        outputs, inputs = weight.shape
        self._add_codes(packing, part, (outputs, inputs), GROUP, [], weight)
