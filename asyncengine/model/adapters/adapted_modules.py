"""Adapters of a model that runs as its own modules: what they add to the outputs of linear layers, by hooks.

Owned by the step thread. Where there are kernels for it, and in steps of few tokens, each token looks its adapter up:
two launches a layer, whatever adapters there are, and they can be captured. Else, for each adapter of a step, its
tokens are taken out, multiplied by both factors, and added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from asyncengine.model.adapters import lora
from asyncengine.model.adapters.factor_table import MOST_RANK, FactorTable
from asyncengine.model.adapters.lora import Lora, LowRank
from asyncengine.model.decoder.compiled_linear import CompiledLinear
from asyncengine.model.decoder.head_products import LatentMatrix
from asyncengine.model.latent_attention import LatentAttention
from asyncengine.model.packed_linear import PackedLinear
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.quantised.fp8_linear import Fp8Linear
from asyncengine.model.recorded import Recorded
from asyncengine.step.adapters import NO_ADAPTER
from asyncengine.step.batch import Int32, Int64, StepBatch

BY_TOKEN = 256
"""Tokens of the largest launched step in which each looks its adapter up; of more, those that share one go together."""

_LINEAR = (nn.Linear, CompiledLinear, LatentMatrix, PackedLinear, Fp8Linear, FourBitLinear, ByteLinear)


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
        recorded: Its layers that keep something of the tokens before.
        device: Where it is.
        dtype: Of its activations.
        by_token: Whether tokens may look their adapters up; if not given, where that is done by kernels of the device.

    Attributes:
        format: Reads adapters.
        active: Whether the model, run now, adds what adapters add.
    """

    def __init__(
        self,
        model: nn.Module,
        recorded: Recorded,
        device: torch.device,
        dtype: torch.dtype,
        by_token: bool | None = None,
    ) -> None:
        self._modules = _linear_layers(model, recorded)
        self._latent = {
            f"{layer.name}.kv_b_proj": layer.module
            for layer in recorded.attention
            if isinstance(layer.module, LatentAttention)
        }
        self.format = ModulesFormat({name: _shape(module) for name, module in self._modules.items()}, dtype)
        self._device = self._home = device
        self._adapters: dict[int, dict[str, LowRank]] = {}
        self._hooks: dict[str, Any] = {}
        self._table = (
            _table(self._modules, device) if by_token or (by_token is None and device.type == "cuda") else None
        )
        self.active = False
        self._present: list[tuple[dict[str, LowRank], torch.Tensor | None]] = []
        self._which: torch.Tensor | None = None
        self._tokens = 0

    @property
    def capturable(self) -> bool:
        """Whether there are adapters, with which steps can be captured."""
        return bool(self._adapters) and self.by_token(1)

    @property
    def generation(self) -> int:
        """Of what was captured with adapters, which holds as long as this stays the same."""
        return 0 if self._table is None else self._table.generation

    def put(self, index: int, adapter: Lora) -> None:
        """As `AdaptableModel.put_adapter`."""
        moved = _moved(adapter, self._device)
        if self._table is not None:
            self._table.put(index, moved)
        self._adapters[index] = moved
        for name in adapter:
            if name in self._latent:
                self._latent[name].adapting = _OfLatents(self, name)
            elif name not in self._hooks:
                self._hooks[name] = self._modules[name].register_forward_hook(self._hook(name))

    def remove(self, index: int) -> None:
        """As `AdaptableModel.remove_adapter`."""
        del self._adapters[index]
        in_use = {name for adapter in self._adapters.values() for name in adapter}
        for name in self._latent.keys() - in_use:
            self._latent[name].adapting = None
        if self._table is not None and self._adapters:  # what was captured still has all layers
            self._table.remove(index)
            return
        if self._table is not None:
            self._table.clear()
        for name in [name for name in self._hooks if name not in in_use]:
            self._hooks.pop(name).remove()

    def move(self, device: torch.device) -> None:
        """Takes them to where the model is."""
        self._device = device
        self._adapters = {index: _moved(adapter, device) for index, adapter in self._adapters.items()}
        if self._table is not None:
            self._table.clear()
            if device == self._home:
                for index, adapter in self._adapters.items():
                    self._table.put(index, adapter)

    def by_token(self, tokens: int) -> bool:
        """Whether in a step of so many tokens each looks its adapter up."""
        if self._table is None or tokens > BY_TOKEN or self._table.rank > MOST_RANK:
            return False
        return not any(layer.adapting for layer in self._latent.values())  # for which there are no kernels

    @contextlib.contextmanager
    def looked_up(self, which: torch.Tensor) -> Iterator[None]:
        """Adds what adapters add, within the block, in which the model is run once or captured.

        Args:
            which: As `places_of` has it, where the model is.
        """
        self.active, self._which, self._tokens = True, which, len(which)
        try:
            with torch.cuda.device(which.device) if which.device.type == "cuda" else contextlib.nullcontext():
                yield
        finally:
            self.active, self._which = False, None

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
        self.active, self._tokens = True, tokens
        try:
            yield
        finally:
            self.active, self._present = False, []

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not self.active:
                return None
            inputs = arguments[0].reshape(-1, arguments[0].shape[-1])
            if len(inputs) != self._tokens:
                raise RuntimeError(f"{name} sees {len(inputs)} of {self._tokens} tokens, so it cannot be adapted")
            if self._which is not None:
                assert self._table is not None
                self._table.add(name, inputs, output.view(-1, output.shape[-1]), self._which)
                return None
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


class _OfLatents:
    """What the adapters of the matrix behind latents add, where it is multiplied with queries and with what comes out
    of attention, head by head.

    Args:
        adapted: All adapters.
        name: Of that matrix.
    """

    def __init__(self, adapted: AdaptedModules, name: str) -> None:
        self._adapted = adapted
        self._name = name

    def add_to(self, made: torch.Tensor, given: torch.Tensor, part: slice, into: bool) -> torch.Tensor:
        """As `LatentAttention` has it."""
        if not self._adapted.active:
            return made
        for adapter, tokens in self._adapted._present:
            factors = adapter.get(self._name)
            if factors is None:
                continue
            own = (given if tokens is None else given[tokens]).transpose(0, 1)
            up = factors.up.view(len(own), -1, factors.up.shape[1])[:, part]
            if into:
                added = torch.bmm(own, up) @ factors.down
            else:
                added = torch.bmm(own @ factors.down.T, up.transpose(1, 2))
            added = added.transpose(0, 1) * factors.scaling
            made = made + added if tokens is None else made.index_add(0, tokens, added)
        return made


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


def places_of(batch: StepBatch, tokens: int) -> Int32:
    """The index of the adapter of each token of a step, padded to so many; `NO_ADAPTER` where there is none."""
    places = np.full(tokens, NO_ADAPTER, np.int32)
    if batch.adapters is not None:
        own = np.repeat(batch.adapters, np.diff(batch.query_start))
        places[: len(own)] = own
    return places


def _table(layers: Iterable[str], device: torch.device) -> FactorTable | None:
    try:
        return FactorTable(layers, device)
    except Exception:  # whatever a package that does not fit the system raises when it is imported
        return None


def _linear_layers(model: nn.Module, recorded: Recorded) -> dict[str, nn.Module]:
    """Linear layers by name that see every token of a step once: those in the blocks that attend or keep a state, but
    for experts and for what recurrent layers compute row by row.
    """
    from transformers.pytorch_utils import Conv1D  # not where a model needs nothing of transformers

    kinds = (*_LINEAR, Conv1D)
    names = [layer.name for layer in recorded.attention] + [layer.name for layer in recorded.recurrent]
    blocks = tuple(f"{name.rpartition('.')[0]}." for name in names)
    by_row = tuple(f"{layer.name}." for layer in recorded.recurrent)
    whole = {
        f"{layer.name}.{name}"
        for layer in recorded.recurrent
        for name in (*layer.spec.entries, layer.spec.last)
        if name is not None
    }
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in kinds
        and name.startswith(blocks)
        and ".experts." not in name
        and (name in whole or not name.startswith(by_row))
    }


def _shape(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs."""
    if isinstance(module, _LINEAR):
        return module.out_features, module.in_features
    inputs, outputs = module.weight.shape  # type: ignore[misc]  # transformers' Conv1D
    return outputs, inputs


def _moved(adapter: Mapping[str, LowRank], device: torch.device) -> dict[str, LowRank]:
    """It on a device, the second factor stored as its transpose, for loads of neighbouring outputs."""
    return {
        name: LowRank(own.down.to(device).contiguous(), own.up.to(device).t().contiguous().t(), own.scaling)
        for name, own in adapter.items()
    }
