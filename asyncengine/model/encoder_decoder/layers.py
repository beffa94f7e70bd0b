"""The layers of a decoder that attends twice: to the tokens before, and to all of what an encoder gives out.

Both kinds of keys and values are of one shape and lie in one cache, in the places that
`asyncengine.model.encoder_decoder.parting` describes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from asyncengine.model.attention.protocol import AttentionBackend, LayerSpec
from asyncengine.model.attention_modules import ATTENTION, RecordedLayer, attach
from asyncengine.model.encoder_decoder.parting import of_sources, of_writing
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.step.batch import Int64, StepBatch


class Output:
    """What a forward gives out: ``logits``, (1, M, vocabulary)."""

    __slots__ = ("logits",)

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def attend_here(model: Any) -> None:
    """Lets the decoder attend by our function and the encoder by torch's; they share one configuration otherwise."""
    own = copy.deepcopy(model.config)
    for module in model.model.encoder.modules():
        if getattr(module, "config", None) is model.config:
            module.config = own
    model.set_attn_implementation(ATTENTION)
    model.model.encoder.set_attn_implementation("sdpa")


def layers_of(model: Any, spec: LayerSpec) -> list[RecordedLayer]:
    """What attends to the tokens before, in the order of execution."""
    return [
        RecordedLayer(f"model.decoder.layers.{index}.self_attn", layer.self_attn, spec, None)
        for index, layer in enumerate(model.model.decoder.layers)
    ]


class SourceLayers:
    """What attends to sources, over the caches of what attends to the tokens before.

    Args:
        model: Of transformers, with its weights.
        spec: What each of its layers needs.
        paged: The layers that attend to the tokens before, as `layers_of` has them, with their caches.
        backend: Attends. Another one than theirs: a step has a plan of each.
        page_size: Tokens to a block.
        device: Where all of that is.
    """

    def __init__(
        self,
        model: Any,
        spec: LayerSpec,
        paged: PagedLayers,
        backend: AttentionBackend,
        page_size: int,
        device: torch.device,
    ) -> None:
        self._modules = [layer.encoder_attn for layer in model.model.decoder.layers]
        self._spec = spec
        self._paged, self._backend, self._page_size, self._device = paged, backend, page_size, device
        self._plan: Any = None
        # Some make what they need with a layer's cache: of one that nobody uses here.
        backend.allocate(self._spec, 1, page_size, model.dtype, device)
        attach({module: self._hook(index) for index, module in enumerate(self._modules)})

    def begin(self, batch: StepBatch) -> None:
        """Prepares a step, as the scheduler has it."""
        sources = of_sources(batch, self._page_size)
        self._plan = None if sources is None else self._backend.plan(sources, self._page_size, self._device)

    def write(self, rows: torch.Tensor, slots: Int64) -> None:
        """Writes what every layer keeps of some of a source.

        Args:
            rows: (tokens, hidden) of the encoder's output.
            slots: (tokens,) where they go.
        """
        plan = self._backend.plan(of_writing(slots, self._page_size), self._page_size, self._device)
        heads = self._spec.num_heads, self._spec.key_dim
        for module, cache in zip(self._modules, self._paged.caches, strict=True):
            key, value = (project(rows).unflatten(1, heads) for project in (module.k_proj, module.v_proj))
            self._backend.attend(self._spec, cache, plan, key, key, value, None)

    def free(self) -> None:
        """Lets the caches go."""
        self._paged.free()
        self._plan = None

    def _hook(self, index: int) -> Any:
        def hook(module: nn.Module, query: torch.Tensor, key: Any, value: Any, kwargs: Any) -> torch.Tensor:
            # None of the tokens is written, so whatever has the shape of keys and values stands for theirs.
            cache = self._paged.caches[index]
            return self._backend.attend(self._spec, cache, self._plan, query, query, query, None)

        return hook
