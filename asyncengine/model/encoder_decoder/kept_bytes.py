"""How many bytes the weights of a model whose decoder attends to a source take, reckoned without them."""

from __future__ import annotations

import torch
from torch import nn

from asyncengine.model.encoder_decoder.details import SourceDetails
from asyncengine.model.quantised.kept_bytes import linear_bytes


def kept_bytes(details: SourceDetails) -> int:
    """Bytes in the form in which they are kept while it serves.

    Args:
        details: Of a load that need not be made.
    """
    if details.quantization == "none":
        return details.weight_bytes
    with torch.device("meta"):
        model = details.kind._from_config(details.hf_config, dtype=details.dtype)
    head, cuda = model.get_output_embeddings(), details.device.type == "cuda"
    linears = {id(each.weight): each for each in model.modules() if isinstance(each, nn.Linear)}
    others = (module for module in model.modules() if not isinstance(module, nn.Linear))
    tables = {id(each) for module in others for each in module.parameters(recurse=False)}
    total: int = sum(each.nbytes for each in model.buffers())
    total += sum(each.nbytes for each in model.parameters() if id(each) in tables or id(each) not in linears)
    for identity, layer in linears.items():
        shape = tuple(layer.weight.shape)
        if layer is not head:
            total += linear_bytes(shape, details.dtype, details.quantization, "cuda" if cuda else "modules")
        elif not cuda and details.quantization != "fp8":
            total += linear_bytes(shape, details.dtype, "int8", "modules")
        elif identity not in tables or "lm_head.weight" in details.checkpoint.shapes:  # else it is that table
            total += int(layer.weight.nbytes)
    return total
