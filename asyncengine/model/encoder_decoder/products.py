"""What multiplies in a model whose decoder attends to a source, and with how many bits."""

from __future__ import annotations

from typing import Any

import torch

from asyncengine.errors import UnsupportedModelError
from asyncengine.model import memory, packed_linear
from asyncengine.model.encoder_decoder.details import SourceDetails
from asyncengine.model.encoder_decoder.parts import parts_of


def check_products(details: SourceDetails, backend: Any) -> None:
    """Refuses weights of few bits where the code that multiplies them could not be compiled.

    Raises:
        UnsupportedModelError: As it says.
    """
    if details.device.type == "cpu" and details.quantization in ("int8", "int4") and not compiles(details, backend):
        raise UnsupportedModelError(
            f"{details.checkpoint.name} cannot be in {details.quantization}: that needs the compiled code of the CPU, "
            f"not {backend.name!r}"
        )


def compiles(details: SourceDetails, backend: Any) -> bool:
    """Whether compiled code multiplies."""
    from asyncengine.model.attention.cpu import CpuAttention

    return isinstance(backend, CpuAttention) and details.quantization != "fp8"


def with_products(model: Any, details: SourceDetails, backend: Any) -> float:
    """Has compiled code multiply in the linear layers of a model, or keeps those of its decoder in oneDNN's order; in
    as few bits as is wanted. Tables and convolutions stay as they are.

    In float32 torch's own products are as fast for as many rows as an audio has, so what hears stays as it is there.

    Args:
        model: With its weights, which are let go where they are packed or rounded.
        details: Of the load.
        backend: What attends: whether there is compiled code.

    Returns:
        The share of its weights that are in fewer bits than its dtype.

    Raises:
        UnsupportedModelError: None can be in so few bits.
    """
    share = _replaced(model, details, backend)
    if details.quantization != "none":
        if not share:
            raise UnsupportedModelError(
                f"{details.checkpoint.name} has no linear layers that could be in {details.quantization}"
            )
        memory.give_back()  # what was rounded, before it is reckoned what memory there is
    return share


def _replaced(model: Any, details: SourceDetails, backend: Any) -> float:
    from asyncengine.model.attention.kernel import kind_of
    from asyncengine.model.decoder.compiled_layers import compile_layers, narrow_share
    from asyncengine.model.decoder.compiled_linear import Products
    from asyncengine.model.quantised import four_bit_linear, fp8_linear
    from asyncengine.model.quantised.four_bit_experts import share_of

    dtype, quantization = details.dtype, details.quantization
    if quantization == "fp8":
        done, of = fp8_linear.quantise(model)
        return done / of
    if compiles(details, backend):
        products = Products(backend.library(kind_of(dtype, quantization)), dtype, quantization)
        stays = details.fixed and dtype is torch.float32
        compile_layers(model, products, set(parts_of(model).encoder.modules()) if stays else ())
        return narrow_share(model)
    if quantization == "int4":
        four_bit_linear.round_layers(model)
        return share_of(model)
    if packed_linear.supports(dtype, details.device):
        packed_linear.pack(parts_of(model).decoder, set())
    return 0.0
