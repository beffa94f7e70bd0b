"""Lets the modules of a model go at once, without a collection of garbage."""

from __future__ import annotations

from torch import nn

_HELD = ("asyncengine_attention", "matrix", "experts")
"""Attributes in which modules keep what the engine has given them."""


def take_apart(model: nn.Module) -> None:
    """Takes a model's modules apart by hand.

    Modules of transformers refer to each other in circles. A collection would find them, but it holds the interpreter's
    lock for some 300 ms in a process that has torch.
    """
    for module in list(model.modules()):
        for held in (module._parameters, module._buffers, module._modules):
            held.clear()
        for name in _HELD:
            module.__dict__.pop(name, None)
