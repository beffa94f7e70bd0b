"""What `AsyncEngine.debug_call_func_on_all_workers` can call: functions that take the transformers model first."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from asyncengine.model.decoder import compiled_layers


def num_parameters(model: nn.Module) -> int:
    """How many weights the model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def structure(model: nn.Module) -> str:
    """The modules, as torch prints them."""
    return str(model)


DEBUG_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "num_parameters": num_parameters,
    "weight_bytes": compiled_layers.weight_bytes,
    "structure": structure,
}


def debug_function(name: str) -> Callable[..., Any]:
    """One of them, or ``package.module:function``.

    Raises:
        LookupError: There is none of that name.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return found
    if name not in DEBUG_FUNCTIONS:
        raise LookupError(
            f"there is no debug function {name!r}; there are {', '.join(sorted(DEBUG_FUNCTIONS))}, and any "
            "'package.module:function'"
        )
    return DEBUG_FUNCTIONS[name]
