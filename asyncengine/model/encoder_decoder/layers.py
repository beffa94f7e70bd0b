"""The layers of a decoder that attends twice: to the tokens before, and to all of what an encoder gives out.

Both kinds of keys and values are of one shape and lie in one cache, in the places that
`asyncengine.model.encoder_decoder.parting` describes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from asyncengine.model.attention.protocol import AttentionBackend, LayerSpec
from asyncengine.model.attention_modules import ATTENTION, RecordedLayer, attach
from asyncengine.model.device_copy import to_device
from asyncengine.model.encoder_decoder.parting import of_sources, of_writing
from asyncengine.model.encoder_decoder.parts import Biases, parts_of
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.step.batch import Float32, Int64, StepBatch


class Output:
    """What a forward gives out: ``logits``, (1, M, vocabulary)."""

    __slots__ = ("logits",)

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def attend_here(model: Any) -> None:
    """Lets the decoder attend by our function and the encoder by torch's; most share one configuration otherwise."""
    own, encoder = copy.deepcopy(model.config), parts_of(model).encoder
    for module in encoder.modules():
        if getattr(module, "config", None) is model.config:
            module.config = own
    model.set_attn_implementation(ATTENTION)
    encoder.set_attn_implementation("sdpa")


def layers_of(model: Any, spec: LayerSpec, biases: Biases) -> list[RecordedLayer]:
    """What attends to the tokens before, in the order of execution."""
    own = parts_of(model).own.items()
    return [
        RecordedLayer(name, module, spec, None, bias) for (name, module), bias in zip(own, biases.tables, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Looked:
    """Tokens of a step of which it is wanted what they attend to.

    Attributes:
        tokens: Which ones.
        blocks: (blocks,) those of the source.
        source: Its tokens.
        wanted: How many of these are wanted, from the first.
        found: (heads, tokens, wanted) of each layer that has some of the heads.
    """

    tokens: slice
    blocks: torch.Tensor
    source: int
    wanted: int
    found: list[torch.Tensor] = field(default_factory=list)


class SourceLayers:
    """What attends to sources, over the caches of what attends to the tokens before.

    Args:
        model: Of transformers, with its weights.
        spec: What each of its layers needs; none of them adds a bias.
        paged: The layers that attend to the tokens before, as `layers_of` has them, with their caches.
        backend: Attends. Another one than theirs: a step has a plan of each.
        page_size: Tokens to a block.
        device: Where all of that is.
        heads: By layer, the heads whose weights are wanted where a step wants to know what tokens attend to.
    """

    def __init__(
        self,
        model: Any,
        spec: LayerSpec,
        paged: PagedLayers,
        backend: AttentionBackend,
        page_size: int,
        device: torch.device,
        heads: Mapping[int, Sequence[int]],
    ) -> None:
        parts = parts_of(model)
        self._modules = parts.beside
        self._projections = parts.projections[1:3]
        self._spec = dataclasses.replace(spec, distances=0)
        self._paged, self._backend, self._page_size, self._device = paged, backend, page_size, device
        self._heads = {layer: to_device(np.array(own), device) for layer, own in heads.items()}
        self._looked: list[_Looked] = []
        self._plan: Any = None
        # Some make what they need with a layer's cache: of one that nobody uses here.
        backend.allocate(self._spec, 1, page_size, model.dtype, device)
        attach({module: self._hook(index) for index, module in enumerate(self._modules)})

    def begin(self, batch: StepBatch, attention_spans: Int64 | None) -> None:
        """Prepares a step.

        Args:
            batch: As the scheduler has it.
            attention_spans: As of that, but of the decoder's own tokens.
        """
        sources = of_sources(batch, self._page_size)
        self._plan = None if sources is None else self._backend.plan(sources, self._page_size, self._device)
        self._looked = []
        for first, end, wanted in () if attention_spans is None else attention_spans.tolist():
            assert sources is not None
            source = int(sources.context_lens[first]) + 1
            blocks = sources.block_tables[first, : -(-source // self._page_size)].astype(np.int64)
            self._looked.append(_Looked(slice(first, end), to_device(blocks, self._device), source, wanted))

    def attention(self) -> tuple[Float32, ...]:
        """What tokens of the step attended to, as `asyncengine.step.batch.StepTokens`. Waits for the device."""
        looked, self._looked = self._looked, []
        return tuple(torch.cat(each.found).cpu().numpy() for each in looked)

    def write(self, rows: torch.Tensor, slots: Int64) -> None:
        """Writes what every layer keeps of some of a source.

        Args:
            rows: (tokens, hidden) of the encoder's output.
            slots: (tokens,) where they go.
        """
        plan = self._backend.plan(of_writing(slots, self._page_size), self._page_size, self._device)
        heads = self._spec.num_heads, self._spec.key_dim
        for module, cache in zip(self._modules, self._paged.caches, strict=True):
            key, value = (getattr(module, name)(rows).unflatten(1, heads) for name in self._projections)
            self._backend.attend(self._spec, cache, plan, key, key, value, None)

    def free(self) -> None:
        """Lets the caches go."""
        self._paged.free()
        self._plan = None

    def _look(self, cache: Any, query: torch.Tensor, heads: torch.Tensor) -> None:
        """Notes how much some heads attend to each of a source's tokens, which the back ends do not tell.

        Args:
            cache: Of the layer.
            query: (tokens, heads, dim) of the step, scaled.
            heads: (heads,) which ones.
        """
        for each in self._looked:
            keys = self._backend.keys(self._spec, cache, each.blocks)[: each.source].index_select(1, heads)
            queries = query[each.tokens].index_select(1, heads)
            scores = torch.einsum("thd,fhd->htf", queries.float(), keys.float())
            each.found.append(scores.softmax(-1)[..., : each.wanted])

    def _hook(self, index: int) -> Any:
        def hook(module: nn.Module, query: torch.Tensor, key: Any, value: Any, kwargs: Any) -> torch.Tensor:
            # None of the tokens is written, so whatever has the shape of keys and values stands for theirs.
            cache = self._paged.caches[index]
            if self._looked and (heads := self._heads.get(index)) is not None:
                self._look(cache, query, heads)
            return self._backend.attend(self._spec, cache, self._plan, query, query, query, None)

        return hook
