"""Linear layers multiplied by the compiled step's own products, in models that do not run as a compiled step.

On the CPU, around the compiled attention. Weights are what the compiled step's would be: in the model's dtype, as bytes
or in four bits; a row has the same bits whatever else is in the batch. Owned by the step thread once the model serves.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncengine.config import Quantization
from asyncengine.model.decoder.four_bit_matrix import packed
from asyncengine.model.decoder.weights import DTYPES, NARROW, MatrixStruct, PackedMatrix, Weights
from asyncengine.model.quantised.four_bit_experts import FourBitExperts
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.weight_writer import Writer, in_place, restorer

_ALIGNMENT = 16
"""Inputs must be multiples of it: so many floats are in the widest vector."""


KINDS = (nn.Linear, FourBitLinear)
"""What is replaced, subclasses left out."""


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
        layer: A linear layer, or one of four bits.
        matrix: Its weight, packed without the bias.
        weight: As the attribute.
    """

    def __init__(
        self, products: Products, layer: nn.Linear | FourBitLinear, matrix: PackedMatrix, weight: nn.Parameter
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

    @property
    def is_narrow(self) -> bool:
        """Whether its weight has fewer bits than a number of the model's."""
        return self.matrix.scales is not None

    def extra_repr(self) -> str:
        """As that of `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def compile_layers(model: Any, products: Products) -> None:
    """Puts a `CompiledLinear` in the place of every linear layer whose inputs fill vectors.

    Codes of four bits stay what they are, and then nothing else is rounded to so few: it is stored as bytes, as the
    head always is. A layer that has several names stays one, and layers that share a weight share it still.

    Args:
        model: A causal language model of transformers. Each of its weights is let go before the next one is packed.
        products: What multiplies.
    """
    quantization = rounded_to(model, products.quantization)
    head = id(model.get_output_embeddings())
    elsewhere, shared = _in_use_elsewhere(model), _shared(model)
    made: dict[int, CompiledLinear] = {}  # of what is shared, which lives until all of it is replaced
    # No list of layers: each weight is let go before the next one is packed.
    for module in [module for module in model.modules() if module._modules]:
        for name in list(module._modules):
            child: Any = module._modules[name]
            if type(child) not in KINDS or not _fits(child, products.dtype):
                del child
                continue
            layer = made.get(id(child))
            if layer is None:
                tied = made.get(id(child.weight))
                how: Quantization = "int8" if id(child) == head and quantization == "int4" else quantization
                layer = _compiled(products, child, tied, how, id(child.weight) in elsewhere)
                made |= {id(each): layer for each in (child, child.weight) if id(each) in shared}
            module._modules[name] = layer
            del child


def rounded_to(model: nn.Module, quantization: Quantization) -> Quantization:
    """What weights are rounded to, of a model that may have codes of four bits."""
    codes = any(isinstance(module, (FourBitLinear, FourBitExperts)) for module in model.modules())
    return "int8" if codes and quantization == "int4" else quantization


def layers(model: nn.Module) -> Iterator[CompiledLinear]:
    """Those that have taken the place of another."""
    return (module for module in model.modules() if isinstance(module, CompiledLinear))


def matrices(model: nn.Module) -> list[PackedMatrix]:
    """The weights of those layers, each once."""
    return list({id(layer.matrix): layer.matrix for layer in layers(model)}.values())


def narrow_share(model: nn.Module) -> float:
    """The share of a model's weights that have fewer bits than its other numbers; a tied head counts by itself."""
    own = {id(layer.matrix): layer for layer in layers(model) if layer.is_narrow}.values()
    codes = 2 * sum(each.numel() for each in model.parameters() if each.dtype is torch.uint8)  # two in a byte
    narrow = codes + sum(layer.in_features * layer.out_features for layer in own)
    tied = sum(layer.weight.numel() for layer in own if not layer.weight.is_meta)
    return narrow / (sum(each.numel() for each in model.parameters()) + codes // 2 + tied)


def writers(model: nn.Module) -> dict[int, list[Writer]]:
    """For each weight that was packed, by its identity, what writes a new value into its places."""
    found: dict[int, list[Writer]] = {}
    for layer in layers(model):
        weight, matrix, bias = layer.weight, layer.matrix, layer.bias
        if id(weight) not in found:
            found[id(weight)] = [] if weight.is_meta else [in_place(weight)]
            found[id(weight)].append(Writer(_writes(matrix), matrix.restorer))
        if bias is not None:
            found.setdefault(id(bias), [in_place(bias)]).append(Writer(layer.write_bias, layer.keep_bias))
    return found


def _writes(matrix: PackedMatrix) -> Callable[[torch.Tensor], None]:
    return lambda value: matrix.write(0, value)


def _compiled(
    products: Products, layer: Any, tied: CompiledLinear | None, how: Quantization, elsewhere: bool
) -> CompiledLinear:
    """What takes a layer's place, whose weight is let go, unless it is in use elsewhere."""
    if tied is not None:
        return CompiledLinear(products, layer, tied.matrix, tied.weight)
    weights: Weights = layer.four_bits if isinstance(layer, FourBitLinear) else layer.weight.detach()
    matrix = packed(products.library, [weights], [None], how)
    if elsewhere:
        return CompiledLinear(products, layer, matrix, layer.weight)
    nothing = torch.empty(layer.out_features, layer.in_features, dtype=products.dtype, device="meta")
    return CompiledLinear(products, layer, matrix, nn.Parameter(nothing, requires_grad=False))


def _fits(layer: Any, dtype: torch.dtype) -> bool:
    own = layer.dtype if isinstance(layer, FourBitLinear) else layer.weight.dtype
    return own is dtype and layer.in_features % _ALIGNMENT == 0


def _in_use_elsewhere(model: nn.Module) -> set[int]:
    """Identities of the parameters that something other than a linear layer uses."""
    others = (module for module in model.modules() if type(module) not in KINDS)
    return {id(parameter) for module in others for parameter in module._parameters.values()}


def _shared(model: nn.Module) -> set[int]:
    """Identities of linear layers that have several names, and of weights of several of them."""
    children: Iterator[Any] = (child for module in model.modules() for child in module._modules.values())
    linears = [child for child in children if type(child) in KINDS]
    names = Counter(map(id, linears))
    owners = Counter(id(layer.weight) for layer in {id(layer): layer for layer in linears}.values())
    return {identity for identity, count in (names | owners).items() if count > 1}
