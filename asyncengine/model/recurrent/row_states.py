"""The states of some sequences, as the cache that transformers gives its recurrent layers. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from asyncengine.model.recurrent.recorded import Key, padded


class RowStates:
    """The states of one layer for B sequences, which the layer reads, and changes or replaces.

    What it computes from them is what transformers' own `LinearAttentionLayer` would give it.

    Args:
        tensors: (B, ...) each, which are written to.
        fresh: Whether the sequences begin here: then nothing came before, and what is in the tensors is not looked at.
    """

    def __init__(self, tensors: Mapping[Key, torch.Tensor], fresh: bool) -> None:
        self._tensors = tensors
        self._fresh = fresh
        self._written: set[Key] = set()

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """(B, channels, tokens) what the convolution has seen last; None if nothing. It may be changed in place."""
        return self._present(("conv", layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """(B, ...) the state; None if there is none. It may be changed in place."""
        return self._present(("recurrent", layer_idx, state_idx))

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        """Adds (B, channels, new tokens) to what the convolution has seen; returns all that it is to see now."""
        key: Key = ("conv", layer_idx, state_idx)
        before, kept = self._present(key), self._tensors[key]
        tokens = kept.shape[-1]
        if before is None:
            seen = padded(conv_states, tokens)
        else:  # with channels beside each other, as those that come have them
            seen = torch.cat([before.mT, conv_states.mT], dim=-2).mT
        kept.copy_(seen[..., -tokens:])
        self._written.add(key)
        return seen

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Replaces the state."""
        key: Key = ("recurrent", layer_idx, state_idx)
        self._tensors[key].copy_(recurrent_states)
        self._written.add(key)
        return self._tensors[key]

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything came before."""
        return not self._fresh

    def is_recording_past(self, layer_idx: int) -> bool:
        """No state is ever taken back."""
        return False

    def only_recurrent_state(self, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The recurrent state, if there is one, only one, and of that shape. It may be changed in place."""
        keys = [key for key in self._tensors if key[0] == "recurrent"]
        if len(keys) != 1 or self._tensors[keys[0]].shape != shape:
            return None
        return self._present(keys[0])

    def _present(self, key: Key) -> torch.Tensor | None:
        return None if self._fresh and key not in self._written else self._tensors[key]
