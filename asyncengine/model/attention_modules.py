"""A model's attention modules: what was recorded of them, and how their calls are taken. Knows no transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncengine.model.attention.protocol import LayerSpec

ATTENTION = "asyncengine"
"""Name under which our attention is known to transformers."""
HOOK = "asyncengine_attention"
"""Attribute of an attention module that takes its calls."""


@dataclass(frozen=True, slots=True)
class RecordedLayer:
    """One attention module in the order of execution.

    Attributes:
        name: Of the module.
        module: Itself.
        spec: What it needs.
        sinks: Its learned sink logits, (heads,), if it has some.
        bias: What it adds to scores by distance, (heads, distances) float32, if it does.
    """

    name: str
    module: nn.Module
    spec: LayerSpec
    sinks: torch.Tensor | None
    bias: torch.Tensor | None = None


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text."""
    return config.get_text_config(decoder=True)


def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Calls what `attach` gave an attention module, in the module's place; (tokens, heads, dim) in and out."""
    attended: torch.Tensor = getattr(module, HOOK)(module, query, key, value, {})
    return attended


@contextlib.contextmanager
def hooked(hooks: dict[nn.Module, Any]) -> Iterator[None]:
    """Lets attention modules call `hooks` within the block, and then what they called before."""
    before = {module: hook for module in hooks if (hook := getattr(module, HOOK, None)) is not None}
    attach(hooks)
    try:
        yield
    finally:
        for module in hooks.keys() - before.keys():
            delattr(module, HOOK)
        attach(before)


def attach(hooks: dict[nn.Module, Any]) -> None:
    """Lets each attention module call its hook: (module, query, key, value, arguments) -> output."""
    for module, hook in hooks.items():
        setattr(module, HOOK, hook)
