"""What multiplies in a model whose decoder attends to a source, where that is the CPU."""

from __future__ import annotations

from typing import Any

import torch

from asyncengine.model import packed_linear
from asyncengine.model.encoder_decoder.details import SourceDetails
from asyncengine.model.encoder_decoder.parts import parts_of


def with_products(model: Any, details: SourceDetails, backend: Any) -> None:
    """Has compiled code multiply in a model's linear layers, or keeps those of its decoder in oneDNN's order.

    In float32 torch's own products are as fast for as many rows as an audio has, so what hears stays as it is there.

    Args:
        model: With its weights, which are let go where they are packed.
        details: Of the load.
        backend: What attends: whether there is compiled code.
    """
    from asyncengine.model.attention.cpu import CpuAttention
    from asyncengine.model.attention.kernel import kind_of
    from asyncengine.model.decoder.compiled_layers import compile_layers
    from asyncengine.model.decoder.compiled_linear import Products

    if isinstance(backend, CpuAttention):
        products = Products(backend.library(kind_of(details.dtype)), details.dtype, "none")
        stays = details.fixed and details.dtype is torch.float32
        compile_layers(model, products, set(parts_of(model).encoder.modules()) if stays else ())
    elif packed_linear.supports(details.dtype, details.device):
        packed_linear.pack(parts_of(model).decoder, set())
