"""Recognises experts in the place of an MLP (Shazeer et al., 2017), by what router and gate do to numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.decoder.parts import ExpertParts, NotRecognised, Routing
from asyncengine.model.quantised.four_bit_experts import is_transposed

ROUTERS = ("gate", "router")
CLAMPED = 5
"""The activation that clamps gate and up projection (gpt-oss)."""

_ACTIVATIONS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    0: functional.silu,
    1: lambda x: functional.gelu(x, approximate="tanh"),
    2: functional.gelu,
    3: functional.relu,
    4: lambda x: functional.relu(x).square(),
}


def experts_of(mlp: nn.Module, hidden: int) -> ExpertParts:
    """Finds the parts of a module that has a router and experts, and nothing else.

    Args:
        mlp: The module.
        hidden: Inputs and outputs.

    Raises:
        NotRecognised: They do something that the compiled step does not.
    """
    router: Any = next((found for name in ROUTERS if (found := getattr(mlp, name, None)) is not None), None)
    if router is None or {name for name, _ in mlp.named_children()} - {*ROUTERS, "experts"}:
        raise NotRecognised("its experts have neighbours")
    parts = alone(mlp.experts)
    routing = Routing(router, *_routing(router, hidden))
    if parts.hidden != hidden or router.weight.shape[0] != parts.count:
        raise NotRecognised("its experts are not those of its router")
    return replace(parts, routing=routing)


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


def _routing(router: Any, hidden: int) -> tuple[int, bool, bool]:
    """How many experts it chooses, whether before the softmax, and whether their weights add up to 1."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.shape[1] != hidden:
        raise NotRecognised("its router is more than a matrix")
    x = torch.randn(16, hidden, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    # So small that no expert has all the weight: then the ways to weigh them could not be told apart.
    x = x / functional.linear(x, weight).float().std().clamp_min(1.0).to(x.dtype)
    try:
        _, scores, indices = router(x)
        order = indices.sort(-1)
    except Exception as error:
        raise NotRecognised("its router gives no weights and indices of experts") from error
    logits = functional.linear(x, weight, getattr(router, "bias", None)).float()
    top = int(indices.shape[1])
    chosen = logits.topk(top, -1)
    if scores.shape != indices.shape or not torch.equal(chosen.indices.sort(-1).values, order.values):
        raise NotRecognised("its router does not choose by its products alone")
    found = scores.float().gather(1, order.indices)
    ways = {
        (True, True): chosen.values.softmax(-1),
        (False, True): (shares := logits.softmax(-1).gather(1, chosen.indices)) / shares.sum(-1, keepdim=True),
        (False, False): shares,
    }
    for (first, normalised), weights in ways.items():
        if torch.allclose(weights.gather(1, chosen.indices.sort(-1).indices), found, rtol=2e-2, atol=2e-3):
            return top, first, normalised
    raise NotRecognised("its router weighs experts otherwise than by a softmax")


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
