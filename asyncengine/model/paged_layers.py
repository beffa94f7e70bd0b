"""What a model's layers keep of the tokens before: keys and values in pages, and states. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from asyncengine.model.attention.protocol import AttentionBackend, CapturableBackend, CarryingBackend
from asyncengine.model.attention_modules import RecordedLayer, attach
from asyncengine.model.recurrent.states import States
from asyncengine.step.batch import Int64, StepBatch
from asyncengine.step.limits import Limits


class PagedLayers:
    """The KV cache of all layers that attend, the plan of the present step that they share, and the recurrent layers'
    states.

    Attributes:
        caches: One per layer; none until they are allocated.
        plan: Of the present step.
        states: None if the model has no recurrent layers.

    Args:
        layers: In the order of execution.
        backend: How they attend.
        limits: Number and size of blocks.
        dtype: Of keys and values.
        device: Theirs.
        states: As the attribute.
    """

    def __init__(
        self,
        layers: list[RecordedLayer],
        backend: AttentionBackend,
        limits: Limits,
        dtype: torch.dtype,
        device: torch.device,
        states: States | None = None,
    ) -> None:
        self.states = states
        self._layers = layers
        self._backend = backend
        self._limits = limits
        self._dtype = dtype
        self._device = device
        self.caches: list[Any] = []
        self.plan: Any = None

    @property
    def first_layer(self) -> str:
        """Name of the first module that keeps something."""
        return self._layers[0].name

    def allocate(self) -> None:
        """Makes the cache; its contents are undefined."""
        limits = self._limits
        self.caches = [
            self._backend.allocate(layer.spec, limits.num_blocks, limits.page_size, self._dtype, self._device)
            for layer in self._layers
        ]
        if isinstance(self._backend, CapturableBackend):
            self._backend.reserve(limits, self._device)
        attach({layer.module: self._hook(layer, cache) for layer, cache in zip(self._layers, self.caches, strict=True)})
        if self.states is not None:
            self.states.allocate()

    def free(self) -> None:
        """Lets the cache go."""
        self.caches = []
        self.plan = None
        attach(dict.fromkeys((layer.module for layer in self._layers), _no_cache))
        if self.states is not None:
            self.states.free()

    def begin(self, batch: StepBatch) -> Any:
        """Prepares a step: copies blocks and states, then plans; returns the attention's plan."""
        self._prepare(batch)
        self.plan = self._backend.plan(batch, self._limits.page_size, self._device)
        return self.plan

    def begin_with(
        self, batch: StepBatch, sections: Mapping[str, NDArray[Any]], captured: bool = False, mixed: bool = False
    ) -> tuple[Any, dict[str, torch.Tensor] | None]:
        """As `begin`; also returns the sections on the device if the plan's copy could take them along.

        Args:
            batch: The step.
            sections: What else it brings to the device.
            captured: Whether it is padded to the tokens of a graph, which is captured or replayed with this plan.
            mixed: Whether that graph is of all steps of so many tokens, not of decodes alone.
        """
        if captured and isinstance(self._backend, CapturableBackend):
            self._prepare(batch, captured)
            self.plan = self._backend.plan_captured(batch, self._limits.page_size, self._device)
            return self.plan, None
        if not isinstance(self._backend, CarryingBackend):
            self._prepare(batch, captured)
            self.plan = self._backend.plan(batch, self._limits.page_size, self._device)
            return self.plan, None
        self._prepare(batch, captured)
        self.plan, sent = self._backend.plan_with(batch, self._limits.page_size, self._device, sections, mixed)
        return self.plan, sent

    def end(self) -> None:
        """Keeps what is to be kept as it is behind the step."""
        if self.states is not None:
            self.states.end()

    def _prepare(self, batch: StepBatch, captured: bool = False) -> None:
        if len(batch.copies):
            self.copy_blocks(batch.copies)
        if self.states is not None:
            self.states.begin(batch, captured)

    def copy_blocks(self, copies: Int64) -> None:
        """Copies whole blocks: (C, 2) of source and destination."""
        self._backend.copy_blocks(self.caches, torch.from_numpy(copies))

    def _hook(self, layer: RecordedLayer, cache: Any) -> Callable[..., torch.Tensor]:
        attend, spec, sinks, bias = self._backend.attend, layer.spec, layer.sinks, layer.bias

        def hook(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
        ) -> torch.Tensor:
            return attend(spec, cache, self.plan, query, key, value, sinks, bias)

        return hook


def _no_cache(*_: Any) -> torch.Tensor:
    raise RuntimeError("the KV cache was freed")
