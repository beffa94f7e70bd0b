"""The KV cache of a head's layers, in the blocks of the model that it drafts for. Owned by the step thread.

The entry of a token is made of its embedding and of the hidden state of the token before it, so the first token of a
text has none; nor has one before which the state is not at hand. Its place must not be attended to: keys and queries
have some dimensions more, whose product is 0 for an entry that is there, and far below all others for one that is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention_modules import RecordedLayer
from asyncengine.model.paged_layers import PagedLayers

_MORE = 8
"""Dimensions of a head beside its own: kernels like multiples of it."""
_FAR = 128.0
"""Its square, scaled as scores are, is more than an exponent can hold; every type of keys has it exactly."""


def widened(layer: RecordedLayer) -> RecordedLayer:
    """A head's layer with room for whether an entry is there."""
    return dataclasses.replace(layer, spec=spec_of(layer.spec))


def spec_of(spec: LayerSpec) -> LayerSpec:
    """The same of what it needs."""
    return dataclasses.replace(spec, key_dim=spec.key_dim + _MORE)


class EntryLayers(PagedLayers):
    """As `PagedLayers`, of layers that are `widened`.

    Attributes:
        absent: (tokens,) bool, on the device: which entries of the present step are not there.
    """

    absent: torch.Tensor

    def _hook(self, layer: RecordedLayer, cache: Any) -> Callable[..., torch.Tensor]:
        attend = super()._hook(layer, cache)

        def hook(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
        ) -> torch.Tensor:
            asked = query.new_zeros(*query.shape[:2], _MORE)
            asked[:, :, 0] = _FAR
            answer = key.new_zeros(*key.shape[:2], _MORE)
            answer[:, :, 0] = self.absent[:, None].to(key.dtype) * -_FAR
            return attend(module, torch.cat([query, asked], -1), torch.cat([key, answer], -1), value, kwargs)

        return hook
