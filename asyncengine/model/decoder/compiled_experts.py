"""Experts whose products are the compiled step's, in models that do not run as a compiled step.

Owned by the step thread once the model serves.
"""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from asyncengine.model.decoder.compiled_linear import Products
from asyncengine.model.decoder.packed_experts import ExpertsStruct, PackedExperts
from asyncengine.model.decoder.weights import DTYPES, NARROW

_STRANGE = 2
"""What the compiled code returns where there is no such expert."""


class AskingStruct(ctypes.Structure):
    """As `Asking` in decoder.cpp."""

    _fields_ = (("experts", ExpertsStruct), ("dtype", ctypes.c_int64), ("narrow", ctypes.c_int64))


class CompiledExperts(nn.Module):
    """Takes the place of a module of experts, whose parameters keep their names, shapes and dtypes, without numbers.

    Attributes:
        experts: The weights as they are multiplied.

    Args:
        products: What multiplies.
        experts: The weights, packed, without a router.
        shapes: Of the parameters, by their names.
    """

    def __init__(self, products: Products, experts: PackedExperts, shapes: dict[str, torch.Size]) -> None:
        super().__init__()
        self.experts = experts
        for name, shape in shapes.items():
            nothing = torch.empty(shape, dtype=products.dtype, device="meta")
            self.register_parameter(name, nn.Parameter(nothing, requires_grad=False))
        self._dtype = products.dtype
        self._ask = products.library.decoder_experts
        self._struct = AskingStruct(experts.struct, DTYPES[products.dtype], NARROW[products.quantization])
        self._address = ctypes.addressof(self._struct)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(..., hidden) to the same: what the experts of each token answer, weighed and added up.

        Args:
            hidden_states: What tokens are.
            top_k_index: (tokens, top) experts.
            top_k_weights: (tokens, top) what their answers are multiplied by.
        """
        if hidden_states.dtype is not self._dtype:
            answers = self.forward(hidden_states.to(self._dtype), top_k_index, top_k_weights)
            return answers.to(hidden_states.dtype)
        inputs, chosen = hidden_states.contiguous(), top_k_index.long().contiguous()
        shares = top_k_weights.float().contiguous()
        tokens, top = chosen.shape
        if shares.shape != chosen.shape or inputs.numel() != tokens * self._struct.experts.gate_up.inputs:
            raise ValueError(f"{tuple(inputs.shape)} are sent to {tuple(chosen.shape)} experts")
        output = torch.empty_like(inputs)
        if not tokens:
            return output
        failed = self._ask(
            self._address,
            top,
            inputs.data_ptr(),
            tokens,
            chosen.data_ptr(),
            shares.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
        )
        if failed == _STRANGE:
            raise IndexError("a token was sent to an expert that is not there")
        if failed:
            raise MemoryError("no memory for what experts answer")
        return output

    def extra_repr(self) -> str:
        """How many there are, and their sizes."""
        own = self._struct.experts
        return f"experts={own.count}, hidden={own.gate_up.inputs}, inner={own.down.inputs}"
