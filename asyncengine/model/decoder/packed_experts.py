"""Experts in the order in which the compiled step reads them. Owned by the step thread once the model serves."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from asyncengine.model.decoder.four_bit_matrix import packed as packed_matrix
from asyncengine.model.decoder.parts import ExpertParts
from asyncengine.model.decoder.weights import DTYPES, MatrixStruct, PackedMatrix, Rounding, Weights, release
from asyncengine.model.weight_writer import Writer

_Split = Callable[[torch.Tensor], list[torch.Tensor]]


class ExpertsStruct(ctypes.Structure):
    """As `Experts` in decoder.cpp."""

    _fields_ = (
        ("router", MatrixStruct), ("gate_up", MatrixStruct), ("down", MatrixStruct),
        *((name, ctypes.c_int64) for name in ("count", "top", "chosen_first", "normalised", "activation")),
        ("alpha", ctypes.c_double), ("limit", ctypes.c_double),
    )  # fmt: skip


class PackedExperts:
    """The weights of one layer's experts, one after the other in one matrix, and of their router.

    Args:
        library: The compiled code.
        parts: The experts. They give their weights up.
        rounding: What weights are rounded to that are no codes.
    """

    def __init__(self, library: Any, parts: ExpertParts, rounding: Rounding) -> None:
        self._parts = parts
        module = parts.module
        count = parts.count

        def packed(name: str, split: _Split, split_bias: _Split, turns: int) -> PackedMatrix:
            weights: Sequence[Weights] | None = parts.four_bits_of(name)
            if weights is None:
                weights = split(getattr(module, name))
            bias = getattr(module, f"{name}_bias", None)
            biases = [None] * len(weights) if bias is None else split_bias(bias)
            matrix = packed_matrix(library, weights, biases, rounding, turns=turns)
            del weights
            release(module, name)
            release(module, f"{name}_bias")
            return matrix

        self.gate_up = packed("gate_up_proj", parts.gate_up_of, parts.gate_up_bias_of, 2)
        self.down = packed("down_proj", parts.down_of, list, 1)
        self.router, routing = None, parts.routing
        if routing is not None:
            # Whom a token is sent to must not hang on a byte's precision; its matrix is small.
            weight = routing.router.weight
            assert isinstance(weight, torch.Tensor)
            weight = weight.to(small_dtype(library, weight.dtype, rounding))
            self.router = PackedMatrix(library, [weight], [getattr(routing.router, "bias", None)])
            release(routing.router, "weight")
            release(routing.router, "bias")
        self.matrices = [each for each in (self.router, self.gate_up, self.down) if each is not None]
        self.struct = ExpertsStruct(
            MatrixStruct() if self.router is None else self.router.struct,
            self.gate_up.struct,
            self.down.struct,
            count,
            0 if routing is None else routing.top,
            0 if routing is None else int(routing.chosen_first),
            0 if routing is None else int(routing.normalised),
            parts.activation,
            parts.alpha,
            parts.limit,
        )

    def writers(self) -> dict[int, list[Writer]]:
        """As `CompiledDecoder.writers`."""
        module, routing = self._parts.module, self._parts.routing
        found = {id(module._parameters[name]): [writer] for name, writer in self.named_writers().items()}
        if routing is not None and self.router is not None:
            router, matrix = routing.router, self.router
            found[id(router.weight)] = [Writer(_each(matrix.write, _alone), matrix.restorer)]
            if (bias := getattr(router, "bias", None)) is not None:
                found[id(bias)] = [Writer(_each(matrix.write_bias, _alone), matrix.restorer)]
        return found

    def named_writers(self) -> dict[str, Writer]:
        """What writes new values of the experts' parameters, by their names."""
        parts, found = self._parts, {}
        for name, matrix, split, split_bias in (
            ("gate_up_proj", self.gate_up, parts.gate_up_of, parts.gate_up_bias_of),
            ("down_proj", self.down, parts.down_of, list),
        ):
            found[name] = Writer(_each(matrix.write, split), matrix.restorer)
            if getattr(parts.module, f"{name}_bias", None) is not None:
                found[f"{name}_bias"] = Writer(_each(matrix.write_bias, split_bias), matrix.restorer)
        return found


def _each(write: Callable[[int, torch.Tensor], None], split: _Split) -> Callable[[torch.Tensor], None]:
    def whole(value: torch.Tensor) -> None:
        for number, part in enumerate(split(value)):
            write(number, part)

    return whole


def small_dtype(library: Any, dtype: torch.dtype, rounding: Rounding) -> torch.dtype:
    """How matrices are stored that quantisation leaves out, in a model of `dtype`."""
    return torch.float32 if rounding != "none" and library.decoder_int8_router() == DTYPES[torch.float32] else dtype


def _alone(whole: torch.Tensor) -> list[torch.Tensor]:
    return [whole]
