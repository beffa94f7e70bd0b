"""Adapters of a model that runs as its own modules: what they add to the outputs of linear layers, by hooks.

Owned by the step thread. For each adapter of a step its tokens are taken out, multiplied by both factors, and added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from asyncengine.model.adapters import lora
from asyncengine.model.adapters.lora import Lora, LowRank
from asyncengine.model.attention_modules import RecordedLayer
from asyncengine.model.fp8_linear import Fp8Linear
from asyncengine.model.packed_linear import PackedLinear
from asyncengine.step.adapters import NO_ADAPTER
from asyncengine.step.batch import Int64, StepBatch


class ModulesFormat:
    """As `asyncengine.step.model.AdapterFormat`.

    Args:
        layers: Outputs and inputs of each linear layer, by its name.
        dtype: Of activations.
    """

    def __init__(self, layers: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> None:
        self._layers = layers
        self._dtype = dtype

    def prepare(self, source: Any, config: Mapping[str, Any] | None) -> Lora:
        """As the protocol says."""
        return lora.read(source, config, self._layers, self._dtype)


class AdaptedModules:
    """The adapters that a model's modules may be asked for.

    Args:
        model: The model.
        recorded: Its attention layers.
        device: Where it is.
        dtype: Of its activations.

    Attributes:
        format: Reads adapters.
    """

    def __init__(
        self, model: nn.Module, recorded: list[RecordedLayer], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._modules = _linear_layers(model, recorded)
        self.format = ModulesFormat({name: _shape(module) for name, module in self._modules.items()}, dtype)
        self._device = device
        self._adapters: dict[int, dict[str, LowRank]] = {}
        self._hooks: dict[str, Any] = {}
        self._present: list[tuple[dict[str, LowRank], torch.Tensor | None]] = []
        self._tokens = 0

    def put(self, index: int, adapter: Lora) -> None:
        """As `AdaptableModel.put_adapter`."""
        self._adapters[index] = _moved(adapter, self._device)
        for name in adapter:
            if name not in self._hooks:
                self._hooks[name] = self._modules[name].register_forward_hook(self._hook(name))

    def remove(self, index: int) -> None:
        """As `AdaptableModel.remove_adapter`."""
        del self._adapters[index]
        in_use = {name for adapter in self._adapters.values() for name in adapter}
        for name in [name for name in self._hooks if name not in in_use]:
            self._hooks.pop(name).remove()

    def move(self, device: torch.device) -> None:
        """Takes them to where the model is."""
        self._device = device
        self._adapters = {index: _moved(adapter, device) for index, adapter in self._adapters.items()}

    @contextlib.contextmanager
    def applied(self, groups: list[tuple[int, int, int]], order: torch.Tensor, tokens: int) -> Iterator[None]:
        """Adds what adapters add, within the block, in which the model is run once.

        Args:
            groups: As `groups_of` has them.
            order: Likewise, where the model is.
            tokens: In the step.
        """
        self._present = [
            (self._adapters[index], None if end - start == tokens else order[start:end]) for index, start, end in groups
        ]
        self._tokens = tokens
        try:
            yield
        finally:
            self._present = []

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not self._present:
                return None
            inputs = arguments[0].reshape(-1, arguments[0].shape[-1])
            if len(inputs) != self._tokens:
                raise RuntimeError(f"{name} sees {len(inputs)} of {self._tokens} tokens, so it cannot be adapted")
            outputs = output.reshape(-1, output.shape[-1])
            for adapter, tokens in self._present:
                factors = adapter.get(name)
                if factors is None:
                    continue
                own = inputs if tokens is None else inputs[tokens]
                added = F.linear(F.linear(own, factors.down), factors.up) * factors.scaling
                outputs = outputs + added if tokens is None else outputs.index_add(0, tokens, added)
            return outputs.view(output.shape)

        return add


def groups_of(batch: StepBatch) -> tuple[Int64, list[tuple[int, int, int]]]:
    """The tokens of each adapter of a step.

    Returns:
        Indices of tokens, those of one adapter after those of another, and for each adapter its index, and from where
        to where its tokens stand.
    """
    assert batch.adapters is not None
    of_tokens = np.repeat(batch.adapters, np.diff(batch.query_start))
    order = np.argsort(of_tokens, kind="stable")
    order = order[of_tokens[order] != NO_ADAPTER]
    indices, starts = np.unique(of_tokens[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    return order.astype(np.int64), list(zip(indices.tolist(), starts.tolist(), ends.tolist(), strict=True))


def _linear_layers(model: nn.Module, recorded: list[RecordedLayer]) -> dict[str, nn.Module]:
    """Linear layers by name that see every token of a step once: those in the blocks that attend, but for experts."""
    from transformers.pytorch_utils import Conv1D  # not where a model needs nothing of transformers

    kinds = (nn.Linear, PackedLinear, Fp8Linear, Conv1D)
    blocks = tuple(f"{layer.name.rpartition('.')[0]}." for layer in recorded)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in kinds and name.startswith(blocks) and ".experts." not in name
    }


def _shape(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs."""
    if isinstance(module, (nn.Linear, PackedLinear, Fp8Linear)):
        return module.out_features, module.in_features
    inputs, outputs = module.weight.shape  # type: ignore[misc]  # transformers' Conv1D
    return outputs, inputs


def _moved(adapter: Mapping[str, LowRank], device: torch.device) -> dict[str, LowRank]:
    return {name: LowRank(own.down.to(device), own.up.to(device), own.scaling) for name, own in adapter.items()}
