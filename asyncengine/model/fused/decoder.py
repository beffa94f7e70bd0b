"""`FusedDecoder`: a decoder's step on CUDA, in few launches. Owned by the step thread.

Where the compiled step of the CPU is one call, this is a handful of launches a layer around the attention: norm, query,
key and value projection; norms of queries and keys, rotation; attention; output projection, residual; norm, gate and
up projection, activation; down projection, residual. For few tokens each of these is one; for more, products are
torch's, and what stands between two of them is one launch where transformers has some ten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model import attention_modules
from asyncengine.model.decoder.parts import Blueprint, LayerParts, NormPart, NotRecognised, Projection
from asyncengine.model.draft_heads.taps import Taps
from asyncengine.model.fused import tiles
from asyncengine.model.fused.launches import Formula, load_kernels
from asyncengine.model.fused.product import Product
from asyncengine.model.fused.tiles import MOST_TOKENS, SOME_TOKENS
from asyncengine.model.fused.wide_product import norm_rows
from asyncengine.model.launching import OPTIONS, power_of_two


class FusedDecoder:
    """A model's weights, where they are, and the kernels that read them.

    Attributes:
        sizes: Of the token counts up to `MOST_TOKENS`, those for which it runs in the model's place; the others run as
            transformers has them.
        some: Whether it runs steps of more tokens, up to `SOME_TOKENS`.
        many: Whether it runs steps of more than that; None is as `some`.
        taps: Where hidden states go, if somebody reads them.

    Args:
        blueprint: The model's parts, which keep their weights.

    Raises:
        NotRecognised: The kernels cannot run the model.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self.sizes: frozenset[int] = frozenset(range(1, MOST_TOKENS + 1))
        self.some = True
        self.many: bool | None = None
        self.taps: Taps | None = None
        self._embedding = blueprint.embedding
        self._positions = blueprint.positions
        self._first_position = blueprint.first_position
        self._embedding_scale = blueprint.embedding_scale
        # Layers that rotate alike share one list, so that each table is moved once.
        self._tables = {id(table[0]): list(table) for parts in blueprint.layers if (table := parts.rotation)}
        self._layers = [_Layer(blueprint, parts, self._tables) for parts in blueprint.layers]
        self._head = Product(
            Formula(
                [Projection(blueprint.head)],
                blueprint.norm,
                factor=blueprint.logit_scale,
                cap=blueprint.logit_cap,
                dtype=torch.float32,
            )
        )

    def serves(self, tokens: int) -> bool:
        """Whether it runs a step of so many tokens."""
        if tokens <= MOST_TOKENS:
            return tokens in self.sizes
        return self.some if tokens <= SOME_TOKENS or self.many is None else self.many

    def use(self, counts: Collection[int], whether: bool = True) -> None:
        """Runs steps of so many tokens from now on, above `MOST_TOKENS` also their like; or leaves them to modules."""
        few = {count for count in counts if count <= MOST_TOKENS}
        self.sizes = self.sizes | few if whether else self.sizes - few
        if any(MOST_TOKENS < count <= SOME_TOKENS for count in counts):
            self.some = whether
        if any(count > SOME_TOKENS for count in counts):
            self.many = whether

    def rest(self) -> None:
        """Runs no steps until it is told to."""
        self.sizes = frozenset()
        self.some, self.many = False, None

    def move(self, device: torch.device) -> None:
        """Takes what is not the model's own along when that moves."""
        for table in self._tables.values():
            table[:] = [tensor.to(device) for tensor in table]

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Runs the model: (1, tokens) int64 ids and positions, (M,) int64 rows; (M, vocabulary) logits.

        They are float32 of up to `MOST_TOKENS` rows; else in the weights' dtype.
        """
        with torch.cuda.device(ids.device) if ids.device.type == "cuda" else contextlib.nullcontext():
            return self._forward(ids[0], positions[0], index)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        hidden = functional.embedding(ids, self._embedding.weight)  # (tokens, hidden)
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        if self._positions is not None:
            hidden = hidden + functional.embedding(positions + self._first_position, self._positions.weight)
        for at, layer in enumerate(self._layers):
            if self.taps is not None:
                self.taps.take(at, hidden)
            hidden = layer.run(hidden, positions)
        if self.taps is not None:
            self.taps.take(len(self._layers), hidden)
        if not index.shape[0]:
            return hidden.new_empty(0, self._head.width, dtype=torch.float32)
        return self._head(hidden[index])


class _Layer:
    """One layer."""

    def __init__(
        self,
        blueprint: Blueprint,
        parts: LayerParts,
        tables: dict[int, list[torch.Tensor]],
    ) -> None:
        after = blueprint.residual_scale
        mlp_norm = parts.before_mlp or (parts.before_attention if parts.parallel else None)
        self._qkv = Product(Formula(parts.qkv, parts.before_attention))
        table = None if parts.rotation is None else tables[id(parts.rotation[0])]
        self._positioned = _Positioned(blueprint, parts, table)
        self._module, self._value_dim = parts.recorded.module, parts.recorded.spec.value_dim
        self._output = _Branch(parts.output, parts.after_attention, after)
        self._parallel = parts.parallel
        self._inner: Callable[[torch.Tensor], torch.Tensor]
        if parts.whole_mlp is not None:
            self._inner = _Whole(parts.whole_mlp, mlp_norm)
        else:
            gated = len(parts.gate_up) > 1
            self._inner = Product(Formula(parts.gate_up, mlp_norm, gated, blueprint.activation))
        self._down = _Branch(parts.down, parts.after_mlp, after)

    def run(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) of the same, which may be written over, at (tokens,) int64 positions."""
        if self._parallel:
            inner = self._inner(hidden)
            return self._down(inner, self._output(self._attended(hidden, positions), hidden))
        hidden = self._output(self._attended(hidden, positions), hidden)
        return self._down(self._inner(hidden), hidden)

    def _attended(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(tokens, heads * value_dim), with which nothing is kept of what it is made of."""
        query, key, value = self._qkv.apart(hidden)
        query, key = self._positioned(query, key, positions)
        value = value.view(len(value), -1, self._value_dim)
        return attention_modules.attend(self._module, query, key, value).view(len(value), -1)


class _Whole:
    """An MLP that runs as transformers has it, behind its norm."""

    def __init__(self, module: nn.Module, norm: NormPart | None) -> None:
        self._module = module
        self._norm = norm

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden if self._norm is None else norm_rows(hidden, self._norm)
        found = self._module(x[None])
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found  # some return what the router says
        return output.view(hidden.shape)


class _Branch:
    """What comes back to the residual: by a product, unless the branch has that in it, and through a norm or not."""

    def __init__(self, part: Projection | None, norm: NormPart | None, factor: float) -> None:
        self._norm = norm
        self._factor = factor
        self._product = None if part is None else Product(Formula([part], factor=1.0 if norm is not None else factor))

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self._norm is not None:
            x = x if self._product is None else self._product(x)
            return norm_rows(x, self._norm, residual, self._factor)
        if self._product is None:
            return residual.add_(x, alpha=self._factor)
        return self._product(x, residual)


class _Positioned:
    """Queries and keys of a layer, normed and rotated where the model does so."""

    def __init__(self, blueprint: Blueprint, parts: LayerParts, table: list[torch.Tensor] | None) -> None:
        self._table = table
        self._kernels = load_kernels()
        self._spec = parts.recorded.spec
        self._query_norm, self._key_norm = norms = parts.query_norm, parts.key_norm
        self._scale = parts.query_scale
        self._plain = norms == (None, None) and parts.rotation is None and parts.query_scale == 1.0
        self._constants = rotate_constants(self._spec, blueprint, parts)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, heads, dim) each, of (tokens, heads * dim)."""
        spec, tokens = self._spec, query.shape[0]
        if self._plain:
            return query.view(tokens, -1, spec.key_dim), key.view(tokens, -1, spec.key_dim)
        norm, key_norm = self._query_norm, self._key_norm
        heads = spec.num_heads + spec.num_kv_heads
        both = query.new_empty(tokens, heads, spec.key_dim)
        self._kernels.rotate[(tokens, -(-heads // self._constants["HEADS_EACH"]))](
            query, key, None if norm is None else norm.weight, None if key_norm is None else key_norm.weight,
            *(self._table or (None, None)), positions, both, query.stride(0), key.stride(0),
            0.0 if norm is None else norm.offset, 0.0 if norm is None else norm.epsilon, self._scale,
            **self._constants, **OPTIONS,
        )  # fmt: skip
        return both[:, : spec.num_heads], both[:, spec.num_heads :]


def rotate_constants(spec: Any, blueprint: Blueprint, parts: LayerParts) -> dict[str, Any]:
    """What the kernel `rotate` is compiled for.

    Raises:
        NotRecognised: Queries and keys are not normed alike, or not as the kernel does it.
    """
    query, key = parts.query_norm, parts.key_norm
    if (query is None) != (key is None):
        raise NotRecognised("either queries or keys are normed, not both")
    kinds = {(n.offset, n.epsilon, n.centred, n.of_heads, n.weight.ndim) for n in (query, key) if n is not None}
    norm = query
    if len(kinds) > 1 or any(n is not None and n.bias is not None for n in (query, key)):
        raise NotRecognised("norms of queries and keys differ, or have a bias")
    if norm is not None and norm.centred and not norm.of_heads:
        raise NotRecognised("queries are centred over all heads")
    return {
        "HEADS": spec.num_heads,
        "KV_HEADS": spec.num_kv_heads,
        "DIM": spec.key_dim,
        "DIM_PAD": power_of_two(spec.key_dim),
        "HAS_NORM": norm is not None,
        "OF_HEADS": norm is not None and norm.of_heads,
        "OWN_WEIGHTS": norm is not None and (norm.weight.ndim > 1 or not norm.of_heads),
        "CENTRED": norm is not None and norm.centred,
        "QUERY_PAD": power_of_two(spec.num_heads * spec.key_dim),
        "KEY_PAD": power_of_two(spec.num_kv_heads * spec.key_dim),
        "ROTARY": 0 if parts.rotation is None else blueprint.rotary,
        "PAIRS": blueprint.pairs,
        "HEADS_EACH": tiles.HEADS_EACH,
    }
