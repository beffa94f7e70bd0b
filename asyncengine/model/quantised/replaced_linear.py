"""Puts layers of another kind in the place of a model's linear layers, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def replace(
    model: Any,
    fits: Callable[[nn.Linear], bool],
    make: Callable[[nn.Linear, Kind | None], Kind],
    but: Collection[nn.Module] = (),
) -> tuple[int, int]:
    """Replaces every linear layer but the head.

    A layer that has several names stays one, and layers that share a weight share it still. One that shares its weight
    with anything else, an embedding or the head, stays as it is.

    Args:
        model: A causal language model of transformers.
        fits: Whether a layer can be replaced.
        make: Makes what takes its place; the second argument is what was made of a layer with the same weight.
        but: Linear layers that stay as they are.

    Returns:
        How many weights the layers had that were replaced, and how many the model had.
    """
    kept, shared = _in_use_elsewhere(model), _shared(model)
    made: dict[int, Kind] = {}  # of what is shared, which lives until all of it is replaced
    done, of = 0, sum(parameter.numel() for parameter in model.parameters())
    # No list of layers: each weight is let go before the next one is replaced.
    for module in [module for module in model.modules() if module._modules]:
        for name in list(module._modules):
            child = module._modules[name]
            if type(child) is not nn.Linear or child in but or id(child.weight) in kept or not fits(child):
                del child
                continue
            layer = made.get(id(child))
            if layer is None:
                tied = made.get(id(child.weight))
                done += child.weight.numel() if tied is None else 0
                layer = make(child, tied)
                made |= {id(each): layer for each in (child, child.weight) if id(each) in shared}
            setattr(module, name, layer)
            del child
    return done, of


def _in_use_elsewhere(model: Any) -> set[int]:
    """Identities of the parameters that something other than a linear layer uses, or the head."""
    head = model.get_output_embeddings()
    others = (module for module in model.modules() if type(module) is not nn.Linear or module is head)
    return {id(parameter) for module in others for parameter in module._parameters.values()}


def _shared(model: Any) -> dict[int, Any]:
    """Linear layers that have several names, and weights of several of them, by their identities."""
    layers = [child for module in model.modules() for child in module._modules.values() if type(child) is nn.Linear]
    once = {id(layer): layer for layer in layers}
    names = Counter(map(id, layers))
    owners = Counter(id(layer.weight) for layer in once.values())
    several = {identity: layer for identity, layer in once.items() if names[identity] > 1}
    return several | {id(layer.weight): layer.weight for layer in once.values() if owners[id(layer.weight)] > 1}
