"""Decoders of known shapes, and the products of their layers. Shared by the benchmarks of the fused kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from asyncengine.model.fused.narrow_product import Shape


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a model."""

    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    vocabulary: int
    bias: bool = False


DECODERS = {
    "llama 8b": Decoder(4096, 32, 8, 128, 14336, 128256),
    "qwen2 7b": Decoder(3584, 28, 4, 128, 18944, 152064, bias=True),
    "qwen3 0.6b": Decoder(1024, 16, 8, 128, 3072, 151936),
    "smollm 135m": Decoder(576, 9, 3, 64, 1536, 49152),
    "tiny": Decoder(64, 4, 2, 16, 96, 128),
}


def products(decoder: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, Shape]]:
    """Every product of a layer, and the head."""
    hidden, inner = decoder.hidden, decoder.intermediate
    query, key = decoder.heads * decoder.head, decoder.kv_heads * decoder.head
    yield "gate and up", Shape(hidden, (inner, inner), dtype, gated=True, normed=True, activation=0)
    yield "qkv", Shape(hidden, (query, key, key), dtype, normed=True, bias=decoder.bias)
    yield "output", Shape(query, (hidden,), dtype, residual=True)
    yield "down", Shape(inner, (hidden,), dtype, residual=True)
    yield "head", Shape(hidden, (decoder.vocabulary,), dtype, normed=True)
    yield "layer norm", Shape(hidden, (inner,), dtype, normed=True, centred=True, norm_bias=True, bias=True)
