"""Hidden states that a model hands out in each step, as they enter some of its layers. Owned by the step thread.

They lie in tensors that never move: what is captured writes there as well, and whoever runs the step need not return
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from asyncengine.errors import UnsupportedModelError


class Taps:
    """Where the hidden states of the newest step are.

    Args:
        layers: Of which they are wanted, from 0 to the number of layers, which means as they leave the last one; before
            the model's last norm in any case. The same one may come again.
        tokens: Of the largest step.
        hidden_size: Their width.
        dtype: Of the tensors.
        device: Theirs.
    """

    def __init__(
        self, layers: Sequence[int], tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers = tuple(sorted(set(layers)))
        self._order = [self.layers.index(layer) for layer in layers]
        self._states = torch.zeros(len(self.layers), tokens, hidden_size, dtype=dtype, device=device)
        self._taken: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._states.nbytes

    def take(self, layer: int, hidden: torch.Tensor) -> None:
        """Copies the (tokens, hidden) states of a layer, if they are wanted."""
        if layer in self.layers:
            self._states[self.layers.index(layer), : len(hidden)].copy_(hidden)
            self._taken.add(layer)

    def place(self, layer: int) -> int | None:
        """The address where float32 states of a layer go; None if they are not wanted."""
        if layer not in self.layers:
            return None
        self._taken.add(layer)
        return self._states[self.layers.index(layer)].data_ptr()

    def of(self, tokens: int) -> torch.Tensor:
        """(tokens, layers * hidden), one layer behind the other in the order in which they are wanted; a copy."""
        return torch.cat([self._states[at, :tokens] for at in self._order], dim=-1)

    def check(self) -> None:
        """Looks, behind a step, whether the model hands them out.

        Raises:
            UnsupportedModelError: It does not.
        """
        if missing := sorted(set(self.layers) - self._taken):
            raise UnsupportedModelError(f"the model gives out no hidden states of its layers {missing}")


def tap_modules(model: nn.Module, layer_name: str, taps: Taps) -> None:
    """Lets a model's layers hand out their states whenever they are run as modules.

    Args:
        model: Of transformers.
        layer_name: Of a module in one of its layers.
        taps: Where to.
    """
    layers = layers_of(model, layer_name)

    def entering(layer: int) -> Any:
        def take(module: nn.Module, arguments: Any, named: Any) -> None:
            taps.take(layer, (arguments[0] if arguments else named["hidden_states"])[0])

        return take

    def leaving(module: nn.Module, arguments: Any, output: Any) -> None:
        taps.take(len(layers), (output if isinstance(output, torch.Tensor) else output[0])[0])

    for layer in taps.layers:
        if layer < len(layers):
            layers[layer].register_forward_pre_hook(entering(layer), with_kwargs=True)
        else:
            layers[-1].register_forward_hook(leaving)


@contextlib.contextmanager
def tapped(model: nn.Module, layer_name: str, tokens: int) -> Iterator[list[torch.Tensor]]:
    """Within the block, what a model's modules hand on from layer to layer.

    Args:
        model: Of transformers.
        layer_name: As `tap_modules` has it.
        tokens: The first of each sequence, whose states are wanted.

    Yields:
        A list to which a run adds (sequences, tokens, hidden) float32 states: as they enter each layer, and leave the
        last one.
    """
    layers, found = layers_of(model, layer_name), list[torch.Tensor]()

    def entering(module: nn.Module, arguments: Any, named: Any) -> None:
        found.append((arguments[0] if arguments else named["hidden_states"])[:, :tokens].float())

    def leaving(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append((output if isinstance(output, torch.Tensor) else output[0])[:, :tokens].float())

    hooks = [layer.register_forward_pre_hook(entering, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(leaving))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def layers_of(model: nn.Module, layer_name: str) -> nn.ModuleList:
    """A model's layers.

    Args:
        model: It.
        layer_name: Of a module in one of them.

    Raises:
        UnsupportedModelError: They are no list.
    """
    names = layer_name.split(".")
    for end in range(1, len(names)):
        found = model.get_submodule(".".join(names[:end]))
        if isinstance(found, nn.ModuleList):
            return found
    raise UnsupportedModelError(
        f"{layer_name!r} is in no list of layers, so nothing can draft from their hidden states"
    )
