"""Products of heads with matrices of their own, by the compiled code. Owned by the step thread once it serves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.decoder.compiled_linear import Products, ProductStruct
from asyncengine.model.decoder.four_bit_matrix import packed
from asyncengine.model.decoder.weights import DTYPES, NARROW, PackedMatrix, Rounding
from asyncengine.model.latent_attention import by_head


class HeadProducts:
    """One matrix for each head.

    Attributes:
        heads: How many there are.
        packed: The matrices as they are multiplied.

    Args:
        products: What multiplies.
        matrices: (heads, outputs, inputs).
        rounding: What becomes of them.
    """

    def __init__(self, products: Products, matrices: torch.Tensor, rounding: Rounding) -> None:
        self.heads, self._outputs, self._inputs = matrices.shape
        self._dtype = products.dtype
        self._multiply = products.library.decoder_products
        self.packed: list[PackedMatrix] = [packed(products.library, [matrix], [None], rounding) for matrix in matrices]
        kind = DTYPES[products.dtype], NARROW[products.quantization]
        structs = [ProductStruct(each.struct, *kind) for each in self.packed]
        self._structs = (ProductStruct * len(structs))(*structs)

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, inputs) to (tokens, heads, outputs)."""
        heads, inputs, tokens = self.heads, self._inputs, len(given)
        given = given.transpose(0, 1).contiguous()
        if given.shape != (heads, tokens, inputs) or given.dtype is not self._dtype:
            raise ValueError(f"{heads} matrices of {inputs} inputs were given {tuple(given.shape)} of {given.dtype}")
        made = torch.empty(heads, tokens, self._outputs, dtype=self._dtype)
        threads = torch.get_num_threads()
        if tokens and self._multiply(self._structs, heads, given.data_ptr(), tokens, made.data_ptr(), threads):
            raise MemoryError("no memory for the inputs of products")
        return made.transpose(0, 1)

    def write(self, matrices: torch.Tensor) -> None:
        """Replaces them."""
        for each, matrix in zip(self.packed, matrices, strict=True):
            each.write(0, matrix)


class LatentMatrix(nn.Module):
    """Takes the place of the linear layer behind latents; its weight keeps name, shape and dtype, without numbers.

    Attributes:
        weight: (heads * (key_dim without what is rotated + value_dim), rank).
        into_latents: (heads, rank, key_dim without what is rotated), with which queries are multiplied.
        out_of_latents: (heads, value_dim, rank), with which what comes out of attention is.

    Args:
        products: What multiplies.
        layer: The linear layer, which is let go.
        parts: Of each head's outputs: of keys, and of values.
        rounding: What becomes of the weight.
    """

    def __init__(self, products: Products, layer: nn.Linear, parts: tuple[int, int], rounding: Rounding) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._parts = parts
        keys, values = self._by_head(layer.weight.detach())
        self.into_latents = HeadProducts(products, keys, rounding)
        self.out_of_latents = HeadProducts(products, values, rounding)
        nothing = torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device="meta")
        self.weight = nn.Parameter(nothing, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., rank) to (..., outputs), as transformers' own attention has it: by numbers that are made for it."""
        units = (torch.eye(count, dtype=self.weight.dtype) for count in (self._parts[0], self.in_features))
        keys, values = (
            product(unit[:, None].expand(-1, product.heads, -1))
            for product, unit in zip((self.into_latents, self.out_of_latents), units, strict=True)
        )
        numbers = torch.cat((keys.transpose(0, 1), values.permute(1, 2, 0)), dim=1)
        return functional.linear(input, numbers.reshape(self.out_features, self.in_features))

    def write(self, weight: torch.Tensor) -> None:
        """Replaces the weight."""
        for product, matrices in zip((self.into_latents, self.out_of_latents), self._by_head(weight), strict=True):
            product.write(matrices)

    def keep(self) -> Callable[[], None]:
        """What puts the present weight back."""
        restores = [matrix.restorer() for matrix in self.matrices]

        def restore() -> None:
            for each in restores:
                each()

        return restore

    @property
    def matrices(self) -> list[PackedMatrix]:
        """All that were packed."""
        return [*self.into_latents.packed, *self.out_of_latents.packed]

    def _by_head(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return by_head(weight, self.out_features // sum(self._parts), self._parts[0])
