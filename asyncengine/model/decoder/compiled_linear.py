"""Linear layers multiplied by the compiled step's own products, in models that do not run as a compiled step.

On the CPU, around the compiled attention. Weights are what the compiled step's would be: in the model's dtype, as bytes
or in four bits; a row has the same bits whatever else is in the batch. Owned by the step thread once the model serves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncengine.config import Quantization
from asyncengine.model.decoder.weights import DTYPES, NARROW, MatrixStruct, PackedMatrix
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.weight_writer import restorer


class ProductStruct(ctypes.Structure):
    """As `Product` in decoder.cpp."""

    _fields_ = (("matrix", MatrixStruct), ("dtype", ctypes.c_int64), ("narrow", ctypes.c_int64))


@dataclass(frozen=True, slots=True)
class Products:
    """What multiplies.

    Attributes:
        library: The compiled code.
        dtype: Of inputs and outputs.
        quantization: That of the library.
    """

    library: Any
    dtype: torch.dtype
    quantization: Quantization


class CompiledLinear(nn.Module):
    """Takes the place of a linear layer, whose weight and bias keep their names, shapes and dtypes.

    Attributes:
        weight: (outputs, inputs) without numbers; or as it was, if something that is no linear layer has it too, as
            embeddings have that of a tied head.
        bias: (outputs,), or None, as it was.
        matrix: The weight as it is multiplied.

    Args:
        products: What multiplies.
        layer: A linear layer, or one of codes.
        matrix: Its weight, packed without the bias.
        weight: As the attribute.
    """

    def __init__(
        self,
        products: Products,
        layer: nn.Linear | FourBitLinear | ByteLinear,
        matrix: PackedMatrix,
        weight: nn.Parameter,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = weight, layer.bias
        self.matrix: PackedMatrix = matrix
        self._dtype = products.dtype
        self._multiply = products.library.decoder_product
        self._struct = ProductStruct(matrix.struct, DTYPES[products.dtype], NARROW[products.quantization])
        self._shift: torch.Tensor | None = None
        if self.bias is not None:
            lanes = int(products.library.decoder_lanes())
            self._shift = torch.zeros(-(-self.out_features // lanes) * lanes, dtype=torch.float32)
            self._struct.matrix.bias = self._shift.data_ptr()
            self.write_bias(self.bias)
        self._address = ctypes.addressof(self._struct)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs), in the dtype of the input, if that is not the model's."""
        if input.dtype is not self._dtype:
            return self.forward(input.to(self._dtype)).to(input.dtype)
        *shape, inputs = input.shape
        if inputs != self.in_features:
            raise ValueError(f"a linear layer of {self.in_features} inputs was given {inputs}")
        input = input.contiguous()
        output = torch.empty(*shape, self.out_features, dtype=self._dtype)
        if (rows := input.numel() // inputs) and self._multiply(
            self._address, input.data_ptr(), rows, output.data_ptr(), torch.get_num_threads()
        ):
            raise MemoryError("no memory for the inputs of a product")
        return output

    def write_bias(self, value: torch.Tensor) -> None:
        """Replaces what is added to the outputs."""
        assert self._shift is not None
        self._shift[: self.out_features] = value.detach().float()

    def keep_bias(self) -> Callable[[], None]:
        """What puts the present bias back."""
        return restorer(self._shift)

    def extra_repr(self) -> str:
        """As that of `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
