"""Experts in the order in which the compiled step reads them. Owned by the step thread once the model serves."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from asyncengine.model.decoder.four_bit_matrix import packed as packed_matrix
from asyncengine.model.decoder.parts import Beside, ExpertParts, Projection, Routing
from asyncengine.model.decoder.weights import (
    DTYPES,
    MatrixStruct,
    PackedMatrix,
    PackedVector,
    Rounding,
    Weights,
    release,
)
from asyncengine.model.weight_writer import Writer, in_place

_Split = Callable[[torch.Tensor], list[torch.Tensor]]


class ExpertsStruct(ctypes.Structure):
    """As `Experts` in decoder.cpp."""

    _fields_ = (
        ("router", MatrixStruct), ("gate_up", MatrixStruct), ("down", MatrixStruct),
        ("correction", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in (
            "count", "top", "groups", "groups_asked", "sigmoid", "chosen_first", "normalised", "beside_gated",
            "activation",
        )),
        *((name, ctypes.c_double) for name in ("alpha", "limit", "scale", "beside_scale")),
    )  # fmt: skip


class PackedExperts:
    """The weights of one layer's experts, one after the other in one matrix, and of their router.

    Attributes:
        gate_up: Gates and up projections.
        down: Down projections.
        router: What chooses experts, and what tells how much the MLP beside them counts; None if nothing here does.
        router_parts: Its parts.
        matrices: All of these.
        struct: What the compiled code is told.

    Args:
        library: The compiled code.
        parts: The experts. They give their weights up.
        rounding: What weights are rounded to that are no codes.
        dtype: The model's own, if the experts have a router.
    """

    def __init__(
        self, library: Any, parts: ExpertParts, rounding: Rounding, dtype: torch.dtype = torch.float32
    ) -> None:
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
        self.router: PackedMatrix | None = None
        self.router_parts: list[Projection] = []
        self._correction: PackedVector | None = None
        routing, beside = parts.routing, parts.beside or Beside()
        if routing is not None:
            # Whom a token is sent to must not hang on a byte's precision; its matrix is small.
            small = small_dtype(library, dtype, rounding)
            self.router_parts = [Projection(routing.router), *([] if beside.gate is None else [beside.gate])]
            numbers = [part.numbers.to(small) for part in self.router_parts]
            self.router = PackedMatrix(library, numbers, [part.bias for part in self.router_parts])
            for each in self.router_parts:
                release(each.linear, "weight")
                release(each.linear, "bias")
            if routing.correction is not None:
                self._correction = PackedVector(correction_of(routing).flatten())
        self.matrices = [each for each in (self.router, self.gate_up, self.down) if each is not None]
        self.struct = ExpertsStruct(gate_up=self.gate_up.struct, down=self.down.struct, count=count)
        self.struct.activation, self.struct.alpha, self.struct.limit = parts.activation, parts.alpha, parts.limit
        self.struct.scale, self.struct.beside_scale = 1.0, beside.scale
        self.struct.beside_gated = beside.gate is not None
        if routing is not None and self.router is not None:
            self.struct.router = self.router.struct
            for name in ("top", "groups", "groups_asked", "sigmoid", "chosen_first", "normalised", "scale"):
                setattr(self.struct, name, getattr(routing, name))
        if self._correction is not None:
            self.struct.correction = self._correction.values.data_ptr()

    def writers(self) -> dict[int, list[Writer]]:
        """As `CompiledDecoder.writers`."""
        module, routing = self._parts.module, self._parts.routing
        found = {id(module._parameters[name]): [writer] for name, writer in self.named_writers().items()}
        if self.router is None or routing is None:
            return found
        for number, part in enumerate(self.router_parts):
            linear = part.linear
            found[id(linear.weight)] = [Writer(functools.partial(self.router.write, number), self.router.restorer)]
            if (bias := getattr(linear, "bias", None)) is not None:
                found[id(bias)] = [Writer(functools.partial(self.router.write_bias, number), self.router.restorer)]
        if self._correction is not None:
            own, packed = correction_of(routing), self._correction
            write = Writer(lambda value: packed.write(value.flatten()), packed.restorer)
            found[id(own)] = [in_place(own), write]
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


def correction_of(routing: Routing) -> torch.Tensor:
    """What is added to the scores that choose, as the model has it."""
    assert routing.correction is not None
    module, name = routing.correction
    found = getattr(module, name)
    assert isinstance(found, torch.Tensor)
    return found


def small_dtype(library: Any, dtype: torch.dtype, rounding: Rounding) -> torch.dtype:
    """How matrices are stored that quantisation leaves out, in a model of `dtype`."""
    return torch.float32 if rounding != "none" and library.decoder_int8_router() == DTYPES[torch.float32] else dtype
