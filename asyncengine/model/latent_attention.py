"""Multi-head latent attention whose latents are what is kept of a token, not the keys and values made of them.

In models of DeepSeek's kind, keys and values of all heads are products of one latent vector per token with a matrix,
and a rotated part that all heads share. That matrix is multiplied with queries and with what comes out of attention
instead: heads then attend to latents as if these were the key, and the beginning of the key the value, of one head that
all of them share. It is a matter of brackets, and the KV cache has a few hundred numbers per token and layer where it
had thousands. The method is that of DeepSeek-V2 (2024), section 2.1, there called absorption.

All classes of transformers for such models make keys and values in a method `expand_kv`, which is what is replaced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from asyncengine.model.attention_modules import ATTENTION


class Adapting(Protocol):
    """What adapters add to products with the matrix behind latents."""

    def add_to(self, made: torch.Tensor, given: torch.Tensor, part: slice, into: bool) -> torch.Tensor:
        """Returns (tokens, heads, m) `made` with it.

        Args:
            made: What the matrix has made of `given`.
            given: (tokens, heads, n).
            part: Which of each head's outputs of that matrix were multiplied.
            into: Whether latents were made; else they were given.
        """
        ...


class LatentAttention(nn.Module):
    """Comes before the class of an attention module, whose `expand_kv` then hands on the latents.

    Attributes:
        kv_b_proj: The matrix that makes keys and values of latents, in a linear layer, or in what takes its place on
            the CPU, `asyncengine.model.decoder.head_products.LatentMatrix`.
        config: The model's.
        adapting: What adds to products with that matrix what adapters add, if it is adapted.
    """

    kv_b_proj: Any
    config: Any
    adapting: Adapting | None = None

    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as attention is to have them.

        Args:
            kv_nope: (batch, 1, tokens, rank) latents.
            k_rot: (batch, 1, tokens, rotated) the part of the keys that all heads share.

        Returns:
            (batch, 1, tokens, rank + rotated) and (batch, 1, tokens, rank), the same numbers; those of all heads where
            transformers attends itself.
        """
        if self.config._attn_implementation != ATTENTION:
            keys, values = super().expand_kv(kv_nope, k_rot)  # type: ignore[misc]
            return keys, values
        return torch.cat((kv_nope, k_rot), dim=-1), kv_nope

    def absorb(self, query: torch.Tensor, rotated: int) -> torch.Tensor:
        """Queries of latents.

        Args:
            query: (tokens, heads, key_dim), of which the last `rotated` are rotated.
            rotated: How many.

        Returns:
            (tokens, heads, rank + rotated).
        """
        keys = slice(query.shape[2] - rotated)
        given = query[..., keys]
        if type(self.kv_b_proj) is not nn.Linear:
            latent = self.kv_b_proj.into_latents(given)
        else:
            latent = torch.bmm(given.transpose(0, 1), self._matrices(query.shape[1], keys)).transpose(0, 1)
        if self.adapting is not None:
            latent = self.adapting.add_to(latent, given, keys, into=True)
        return torch.cat((latent, query[..., keys.stop :]), dim=-1)

    def expand(self, attended: torch.Tensor, key_dim: int, rotated: int) -> torch.Tensor:
        """Values of what heads have attended to.

        Args:
            attended: (tokens, heads, rank), of latents.
            key_dim: Of the queries, as the model has them.
            rotated: As `absorb` has it.

        Returns:
            (tokens, heads, value_dim).
        """
        values = slice(key_dim - rotated, None)
        if type(self.kv_b_proj) is not nn.Linear:
            value = self.kv_b_proj.out_of_latents(attended)
        else:
            matrices = self._matrices(attended.shape[1], values).transpose(1, 2)
            value = torch.bmm(attended.transpose(0, 1), matrices).transpose(0, 1)
        return value if self.adapting is None else self.adapting.add_to(value, attended, values, into=False)

    def _matrices(self, heads: int, part: slice) -> torch.Tensor:
        """(heads, part, rank), of each head's key without what is rotated, and its value behind that."""
        weight: torch.Tensor = self.kv_b_proj.weight
        return weight.view(heads, -1, weight.shape[1])[:, part]


def by_head(weight: torch.Tensor, heads: int, plain: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix behind latents, as what makes latents of queries, (heads, rank, plain), and what makes values of
    latents, (heads, value_dim, rank).

    Args:
        weight: (heads * (plain + value_dim), rank).
        heads: How many there are.
        plain: Numbers of a head's query that do not rotate.
    """
    whole = weight.view(heads, -1, weight.shape[1])
    return whole[:, :plain].transpose(1, 2), whole[:, plain:]


def keep_latents(model: nn.Module) -> None:
    """Lets all modules of a model whose keys and values come of latents keep these.

    What their matrix is stored as does not matter before; afterwards it is numbers.
    """
    for module in latent_modules(model):
        if type(module.kv_b_proj) is not nn.Linear:
            module.kv_b_proj = _as_numbers(module.kv_b_proj, module.kv_a_layernorm.weight)
        kind: Any = type(module)
        module.__class__ = _keeping(kind)


@functools.cache
def _keeping(kind: Any) -> Any:
    """A class of attention modules, with latents that are kept."""
    return type(kind.__name__, (LatentAttention, kind), {"__module__": kind.__module__})


def latent_modules(model: nn.Module) -> Iterator[Any]:
    """Modules whose keys and values are made of latents, and which do not keep these so far."""
    for module in model.modules():
        make = getattr(type(module), "expand_kv", None)
        if make is None or isinstance(module, LatentAttention):
            continue
        takes = list(inspect.signature(make).parameters) == ["self", "kv_nope", "k_rot"]
        if takes and getattr(module.kv_b_proj, "bias", None) is None:
            yield module


def _as_numbers(layer: Any, like: torch.Tensor) -> nn.Linear:
    """A linear layer of numbers that computes what one of codes does."""
    with torch.inference_mode(False), torch.no_grad():
        unit = torch.eye(layer.in_features, dtype=like.dtype, device=like.device)
        numbers = layer(unit).T.contiguous()
        with torch.device("meta"):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=like.dtype)
        linear.weight = nn.Parameter(numbers, requires_grad=False)
    return linear
