"""Functions that recurrent layers call, replaced by faster ones that compute the same.

transformers' layers call convolutions, scans and state updates by names of their module (`causal_conv1d_fn`,
`torch_chunk_gated_delta_rule` and so on), so that packages with kernels can stand in for its own functions in plain
torch. They do so for us as well: a layer's forward is made once more, over a copy of its module's globals with other
functions under those names. Nothing of transformers itself is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.recurrent.places import Places
from asyncengine.model.recurrent.recorded import padded
from asyncengine.model.recurrent.row_states import RowStates


class Present:
    """What a layer computes with at present, for functions that are not told all of it.

    Attributes:
        rows: The states that it was given; None between calls.
    """

    rows: RowStates | None = None

    def recurrent_state(self, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The only recurrent state, if it has that shape; None if there is none yet."""
        return None if self.rows is None else self.rows.only_recurrent_state(shape)

    def places_of(self, state: torch.Tensor | None) -> Places | None:
        """Where the rows' own are in a state, if it is one of all sequences that the layer was given."""
        return None if self.rows is None or state is None else self.rows.places_of(state)


Replacement = Callable[[Callable[..., Any], Present], Callable[..., Any]]
"""Takes a function of transformers', and what the layer that calls it computes with; returns what is called instead."""
Functions = Mapping[str, Replacement]
"""Replacements, by the names that transformers' layers call."""


def forward_with(module: nn.Module, functions: Functions, present: Present) -> Callable[..., Any]:
    """A module's forward, calling what stands in `functions` for what it calls; its own where it calls none of that."""
    forward: Callable[..., Any] = module.forward
    plain = inspect.unwrap(type(module).forward)
    names = called(module, functions)
    if not names:
        return forward
    replaced = {name: functions[name](plain.__globals__[name], present) for name in names}
    other = FunctionType(
        plain.__code__, plain.__globals__ | replaced, plain.__name__, plain.__defaults__, plain.__closure__
    )
    other.__kwdefaults__ = plain.__kwdefaults__
    return MethodType(other, module)


def called(module: nn.Module, functions: Functions) -> list[str]:
    """The names in `functions` that a module's forward calls."""
    plain = inspect.unwrap(type(module).forward)
    if not isinstance(plain, FunctionType):
        return []
    return [name for name in plain.__code__.co_names if name in functions and name in plain.__globals__]


def causal_conv1d_fn(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    """Convolution of each channel over the tokens up to each: (B, channels, tokens) in and out, (channels, taps).

    As a sum of shifted products: torch's convolution of single channels takes hundreds of times as long on a CPU in
    bfloat16.
    """
    taps, tokens = weight.shape[-1], hidden_states.shape[-1]
    seen = padded(hidden_states.float(), tokens + taps - 1)
    return _activated(_convolved(seen, weight, bias, tokens), activation).to(hidden_states.dtype)


def causal_conv1d_update(
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """The same behind tokens that were seen before: (B, channels, tokens of the state), which is moved on in place."""
    tokens = hidden_states.shape[-1]
    seen = torch.cat([conv_state, hidden_states], dim=-1)
    conv_state.copy_(seen[..., -conv_state.shape[-1] :])
    seen = seen[..., -(tokens + weight.shape[-1] - 1) :].float()
    return _activated(_convolved(seen, weight, bias, tokens), activation).to(hidden_states.dtype)


def _convolved(seen: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: int) -> torch.Tensor:
    taps = weight.float().unbind(-1)
    out = seen[..., :tokens] * taps[0][:, None]
    for at, tap in enumerate(taps[1:], 1):
        out.addcmul_(seen[..., at : at + tokens], tap[:, None])
    return out if bias is None else out + bias.float()[:, None]


def _activated(out: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation in ("silu", "swish"):
        return functional.silu(out)
    if activation is None:
        return out
    from transformers.activations import ACT2FN

    activated: torch.Tensor = ACT2FN[activation](out)
    return activated


CPU: Functions = {
    "causal_conv1d_fn": lambda original, present: causal_conv1d_fn,
    "causal_conv1d_update": lambda original, present: causal_conv1d_update,
}
"""What is faster on a CPU that has no compiler."""
