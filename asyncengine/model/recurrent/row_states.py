"""The states of some sequences, as the cache that transformers gives its recurrent layers. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from asyncengine.model.recurrent.places import Places
from asyncengine.model.recurrent.recorded import Key, padded


class RowStates:
    """The states of one layer for B sequences, which the layer reads, and changes or replaces.

    What it computes from them is what transformers' own `LinearAttentionLayer` would give it.

    Args:
        tensors: (B, ...) each, which are written to.
        fresh: Whether the sequences begin here: then nothing came before, and what is in the tensors is not looked at.
        places: Where those of the sequences are in the tensors, which are of all sequences then, (places, ...). The
            layer gets them so, and hands them on to functions that know what to do with them.
    """

    def __init__(self, tensors: Mapping[Key, torch.Tensor], fresh: bool, places: Places | None = None) -> None:
        self._tensors = tensors
        self._fresh = fresh
        self._places = places
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
        before, kept, places = self._present(key), self._tensors[key], self._places
        tokens = kept.shape[-1]
        if before is not None and places is not None:
            before = before.index_select(0, places.sources)
        if before is None:
            seen = padded(conv_states, tokens)
        else:  # with channels beside each other, as those that come have them
            seen = torch.cat([before.mT, conv_states.mT], dim=-2).mT
        if places is None:
            kept.copy_(seen[..., -tokens:])
        else:
            kept.index_copy_(0, places.targets, seen[..., -tokens:].to(kept.dtype))
        self._written.add(key)
        return seen

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Replaces the state."""
        key: Key = ("recurrent", layer_idx, state_idx)
        kept = self._tensors[key]
        if self._places is None:
            kept.copy_(recurrent_states)
        elif not _is(recurrent_states, kept):  # it is itself behind a kernel
            kept.index_copy_(0, self._places.targets, recurrent_states.to(kept.dtype))
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

    def places_of(self, state: torch.Tensor) -> Places | None:
        """Where the sequences' own are in a state, if it is one that was given for all."""
        if self._places is None or not any(_is(state, tensor) for tensor in self._tensors.values()):
            return None
        return self._places

    def _present(self, key: Key) -> torch.Tensor | None:
        return None if self._fresh and key not in self._written else self._tensors[key]


def _is(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.shape == other.shape and one.data_ptr() == other.data_ptr())
