"""Weights in the order in which the compiled step reads them. Owned by the step thread once the model serves.

The modules they come from keep their names, shapes and dtypes and let their own copies go.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from asyncengine.config import Quantization
from asyncengine.model.decoder.parts import NormPart
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.eight_bits import EightBits
from asyncengine.model.quantised.four_bit_experts import FourBitExperts
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.quantised.four_bits import FourBits
from asyncengine.model.weight_writer import restorer

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NARROW: dict[Quantization, int] = {"none": 0, "int8": 1, "int4": 2}
"""As in `Decoder` in decoder.cpp."""
Weights = torch.Tensor | FourBits | EightBits
"""(outputs, inputs) of a linear layer."""
Rounding = Quantization | Literal["bytes"]
"""What numbers are rounded to: as `EngineConfig.quantization` says it, or to bytes with a scale for each 32 inputs."""
_HUGE = 1 << 21  # bytes


class MatrixStruct(ctypes.Structure):
    """As `Matrix` in decoder.cpp."""

    _fields_ = (
        ("weights", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64), ("format", ctypes.c_void_p),
    )  # fmt: skip


class PackingStruct(ctypes.Structure):
    """As `Packing`."""

    _fields_ = (
        ("dtype", ctypes.c_int64), ("source", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "row_stride")),
        ("target", ctypes.c_void_p), ("first_group", ctypes.c_int64), ("group_step", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
    )  # fmt: skip


class Packing:
    """What is to be packed into the order of the compiled code. It is kept alive until that is done.

    Before that nobody looks at it: its file may not have been read yet.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._waiting: dict[str, list[tuple[ctypes.Structure, Sequence[torch.Tensor]]]] = {}
        self._others: list[Callable[[], None]] = []

    def add(self, function: str, job: ctypes.Structure, *sources: torch.Tensor) -> None:
        """Notes one matrix, and which of the library's functions packs it."""
        self._waiting.setdefault(function, []).append((job, sources))

    def add_other(self, write: Callable[[], None]) -> None:
        """Notes what is not a matrix in the order of `nn.Linear`; calling this writes it."""
        self._others.append(write)

    def run(self) -> None:
        """Packs all matrices of a kind in one call without the GIL, in the order in which they lie in memory, or in a
        file; then what else there is.
        """
        waiting, self._waiting = self._waiting, {}
        for function, some in waiting.items():
            some.sort(key=lambda one: one[1][0].data_ptr())
            jobs = (type(some[0][0]) * len(some))(*(job for job, _ in some))
            getattr(self._library, function)(jobs, len(jobs), torch.get_num_threads())
        others, self._others = self._others, []
        for write in others:
            write()


class NormStruct(ctypes.Structure):
    """As `Norm` in decoder.cpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("size", "stride", "centred")),
        ("epsilon", ctypes.c_double),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where one of several linear layers is in a matrix: `groups` groups of outputs, `step` apart, from `start` on."""

    start: int
    step: int
    groups: int


class PackedMatrix:
    """One or several linear layers that have the same input, as one matrix.

    Args:
        library: The compiled code.
        weights: (outputs, inputs) each, of one dtype.
        biases: Theirs; None where there is none.
        turns: So many neighbours' groups of outputs take turns, as gate and up do; what has its turn alone follows what
            was before it.
        int8: Whether to store bytes, with one scale for each output.
        later: Takes what is to be packed; None packs at once.
    """

    def __init__(
        self,
        library: Any,
        weights: Sequence[Weights],
        biases: Sequence[torch.Tensor | None],
        *,
        turns: int = 1,
        int8: bool = False,
        later: Packing | None = None,
    ) -> None:
        self._library = library
        self._int8 = int8
        lanes = int(library.decoder_lanes())
        groups = [-(-weight.shape[0] // lanes) for weight in weights]
        inputs = weights[0].shape[1]
        before = [0, *itertools.accumulate(groups)]
        self.places = [
            Place(before[part - part % turns] + part % turns, turns, count) for part, count in enumerate(groups)
        ]
        self._lanes = lanes
        outputs = sum(groups) * lanes if len(weights) > 1 else weights[0].shape[0]
        self.dtype = next((weight.dtype for weight in weights if isinstance(weight, torch.Tensor)), torch.bfloat16)
        self.weights, self.scales = self._allocate(sum(groups), inputs)
        self.bias: torch.Tensor | None = None
        if any(bias is not None for bias in biases):
            self.bias = torch.zeros(sum(groups) * lanes, dtype=torch.float32)
        for part, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            self._pack(part, weight, later)
            if bias is not None:
                _write(functools.partial(self.write_bias, part, bias), later)
        self.struct = MatrixStruct(
            self.weights.data_ptr(),
            None if self.scales is None else self.scales.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            outputs,
            inputs,
        )

    def write(self, part: int, weight: torch.Tensor) -> None:
        """Packs one layer's weights into their place; without the GIL."""
        self._pack(part, weight, None)

    def _allocate(self, groups: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Memory for so many groups of outputs, and for what their sums are multiplied by."""
        # Every dtype is given: transformers changes the whole process's default while it makes a model.
        numbers, dtype = groups * self._lanes * inputs, torch.int8 if self._int8 else self.dtype
        scales = torch.zeros(groups * self._lanes, dtype=torch.float32) if self._int8 else None
        return huge(numbers, dtype, self._library), scales

    def _pack(self, part: int, weight: Weights, later: Packing | None) -> None:
        assert isinstance(weight, torch.Tensor)
        weight = weight.detach()
        if weight.stride(1) != 1 or weight.dtype is not self.dtype:  # it is copied first
            if later is not None:
                return later.add_other(functools.partial(self._pack, part, weight, None))
            weight = weight.to(self.dtype).contiguous()
        packing = Packing(self._library) if later is None else later
        self._add(packing, part, weight)
        if later is None:
            packing.run()

    def _add(self, packing: Packing, part: int, weight: torch.Tensor) -> None:
        """Notes a layer's weights, whose rows lie in memory one after the other."""
        place = self.places[part]
        job = PackingStruct(
            DTYPES[self.dtype],
            weight.data_ptr(),
            weight.shape[0],
            weight.shape[1],
            weight.stride(0),
            self.weights.data_ptr(),
            place.start,
            place.step,
            None if self.scales is None else self.scales.data_ptr(),
        )
        packing.add("decoder_pack", job, weight)

    def write_bias(self, part: int, bias: torch.Tensor) -> None:
        """Writes one layer's bias."""
        assert self.bias is not None
        place = self.places[part]
        values = bias.detach().float()
        for group in range(-(-len(values) // self._lanes)):
            own = values[group * self._lanes : (group + 1) * self._lanes]
            at = (place.start + group * place.step) * self._lanes
            self.bias[at : at + len(own)] = own

    def restorer(self) -> Callable[[], None]:
        """What puts the present contents back."""
        return restorer(self.weights, self.scales, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(tensor.nbytes for tensor in (self.weights, self.scales, self.bias) if tensor is not None)


class PackedVector:
    """A parameter as float32, or a table of several rows.

    Args:
        parameter: What it is made of.
        offset: Added to it.
        later: Takes what is to be written; None writes at once.
    """

    def __init__(self, parameter: torch.Tensor, offset: float = 0.0, later: Packing | None = None) -> None:
        self._offset = offset
        self.values = torch.empty(parameter.shape, dtype=torch.float32)
        _write(functools.partial(self.write, parameter), later)

    def write(self, parameter: torch.Tensor) -> None:
        """Replaces the contents."""
        self.values.copy_(parameter.detach().float() + self._offset)

    def restorer(self) -> Callable[[], None]:
        """What puts the present contents back."""
        return restorer(self.values)


class PackedNorm:
    """The weight and the bias of a norm.

    Args:
        part: Where they are.
        head: The size of a head, if that is what is normed; 0 is the whole row.
        later: As that of `PackedVector`.
    """

    def __init__(self, part: NormPart, head: int = 0, later: Packing | None = None) -> None:
        self.weight = PackedVector(part.weight, part.offset, later)
        self.bias = None if part.bias is None else PackedVector(part.bias, later=later)
        weights = part.weight.numel()
        self.struct = NormStruct(
            self.weight.values.data_ptr(),
            None if self.bias is None else self.bias.values.data_ptr(),
            head,
            head if head and weights > head else 0,
            int(part.centred),
            part.epsilon,
        )


def release(module: nn.Module, name: str) -> None:
    """Lets a parameter's memory go; its name, shape and dtype stay."""
    if isinstance(module, FourBitExperts) and name in module.four_bit_shapes:
        return module.release(name)
    if isinstance(module, (FourBitLinear, ByteLinear)) and name == "weight":
        module.release()
    parameter = getattr(module, name, None)
    if parameter is not None:
        setattr(module, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))


def _write(write: Callable[[], None], later: Packing | None) -> None:
    if later is None:
        write()
    else:
        later.add_other(write)


def huge(count: int, dtype: torch.dtype, library: Any) -> torch.Tensor:
    """An uninitialised tensor, on huge pages where the system has them and it would fill one."""
    if count * dtype.itemsize < _HUGE:
        return torch.empty(count, dtype=dtype)
    memory = torch.empty(count + _HUGE // dtype.itemsize, dtype=dtype)
    skip = -memory.data_ptr() % _HUGE // dtype.itemsize
    tensor = memory[skip : skip + count]
    library.paged_attention_advise(tensor.data_ptr(), tensor.nbytes)
    return tensor
