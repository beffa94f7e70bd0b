"""Recognises experts in the place of an MLP (Shazeer et al., 2017), by what their gate does to numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.decoder import routing
from asyncengine.model.decoder.parts import ExpertParts, NotRecognised
from asyncengine.model.quantised.four_bit_experts import is_transposed

ROUTERS = ("gate", "router")
SHARED = ("shared_experts", "shared_expert", "shared_mlp")
SHARED_GATES = ("shared_expert_gate",)
CLAMPED = 5
"""The activation that clamps gate and up projection (gpt-oss)."""

_ACTIVATIONS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    0: functional.silu,
    1: lambda x: functional.gelu(x, approximate="tanh"),
    2: functional.gelu,
    3: functional.relu,
    4: lambda x: functional.relu(x).square(),
}


def experts_of(mlp: nn.Module, hidden: int, dtype: torch.dtype) -> ExpertParts:
    """Finds the parts of a module that has a router and experts, and perhaps an MLP that every token is sent to.

    Args:
        mlp: The module.
        hidden: Inputs and outputs.
        dtype: Of its inputs.

    Raises:
        NotRecognised: They do something that the compiled step does not.
    """
    router = _first(mlp, ROUTERS)
    if router is None or {name for name, _ in mlp.named_children()} - {*ROUTERS, *SHARED, *SHARED_GATES, "experts"}:
        raise NotRecognised("its experts have neighbours")
    parts = alone(mlp.experts)
    if parts.hidden != hidden:
        raise NotRecognised("its experts are not those of its router")
    return routing.added(mlp, router, parts, shared_of(mlp), _first(mlp, SHARED_GATES), dtype)


def shared_of(mlp: nn.Module) -> Any:
    """The MLP beside the experts of a module, or None."""
    return _first(mlp, SHARED)


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next((part for name in names if (part := getattr(module, name, None)) is not None), None)


def alone(module: Any) -> ExpertParts:
    """The parts of a module that has the weights of experts, and is told to whom a token is sent.

    Raises:
        NotRecognised: They do something that the compiled code does not.
    """
    known = {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}
    if not {"gate_up_proj", "down_proj"} <= {name for name, _ in module.named_parameters()} <= known:
        raise NotRecognised("its experts are not one tensor each for gate, up and down projections")
    if getattr(module, "has_post_expert_norm", False):
        raise NotRecognised("its experts have norms")
    down, gate_up = module.down_proj, module.gate_up_proj
    if down.ndim != 3 or gate_up.ndim != 3:
        raise NotRecognised("its experts are not one after the other")
    transposed = is_transposed(module, gate_up, down)
    inner, hidden = down.shape[1:] if transposed else down.shape[:0:-1]
    wanted = (hidden, 2 * inner) if transposed else (2 * inner, hidden)
    if tuple(gate_up.shape[1:]) != wanted or gate_up.shape[0] != down.shape[0]:
        raise NotRecognised("its experts have no gates")
    return ExpertParts(module, *gate_of(module, inner), transposed)


def gate_of(module: Any, inner: int) -> tuple[int, float, float, bool]:
    """Activation, alpha, limit, and whether gate and up alternate."""
    x = 4 * torch.randn(8, 2 * inner, generator=torch.Generator().manual_seed(0))
    apply_gate = getattr(module, "_apply_gate", None)
    try:
        found = apply_gate(x) if apply_gate is not None else None
    except Exception as error:
        raise NotRecognised("the gate of its experts takes more than a tensor") from error
    if found is None:
        gate, up = x.chunk(2, dim=-1)
        found = module.act_fn(gate) * up
    alpha, limit = (float(getattr(module, name, None) or 0.0) for name in ("alpha", "limit"))
    for alternating in (False, True):
        gate, up = (x[:, ::2], x[:, 1::2]) if alternating else x.chunk(2, dim=-1)
        ways = {kind: function(gate) * up for kind, function in _ACTIVATIONS.items()}
        if limit:
            low = gate.clamp(max=limit)
            ways[CLAMPED] = (up.clamp(-limit, limit) + 1) * low * torch.sigmoid(alpha * low)
        for kind, wanted in ways.items():
            if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-3, atol=1e-4):
                return kind, alpha, limit, alternating
    raise NotRecognised("its experts are gated in another way")
