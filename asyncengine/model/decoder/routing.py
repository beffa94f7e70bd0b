"""Recognises how tokens are sent to experts, by what a module does that has a router, experts and perhaps an MLP.

The module runs once over random tokens with something else in the place of its experts, which notes to whom tokens are
sent. What is not to be learned from numbers is not taken for granted: the logits of the whole model are compared later.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.decoder.parts import Beside, ExpertParts, NotRecognised, Projection, Routing

MOST_GROUPS = 64
"""As many bits as the compiled step has for them."""
_TOKENS = 32
_DRAWN = 2048
"""Of which these are some."""
_LARGE = 8
"""How many times as large logits are for another look."""
_GROUPS = ("num_group", "n_group")
_GROUPS_ASKED = ("topk_group",)
_FAR = 1e-2
"""How far off a factor may be that is measured in few digits."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Sent:
    """What became of random tokens.

    Attributes:
        x: (tokens, hidden) they.
        indices: (tokens, top) to whom they were sent.
        shares: (tokens, top) what their answers were multiplied by.
        beside: (tokens,) what the answer of the MLP beside them was multiplied by.
    """

    x: torch.Tensor
    indices: torch.Tensor
    shares: torch.Tensor
    beside: torch.Tensor


def added(
    mlp: nn.Module, router: nn.Module, parts: ExpertParts, shared: nn.Module | None, gate: Any, dtype: torch.dtype
) -> ExpertParts:
    """The parts of experts with what there is to be said of their router, and of the MLP beside them.

    Args:
        mlp: Has all of them.
        router: Chooses experts.
        parts: Of the experts.
        shared: The MLP beside them, or None.
        gate: Tells how much that counts, or None.
        dtype: Of inputs.

    Raises:
        NotRecognised: They do something that the compiled step does not.
    """
    owner = _owner(router)
    if tuple(owner.weight.shape) != (parts.count, parts.hidden):
        raise NotRecognised("its experts are not those of its router")
    correction = _correction(mlp, router, owner, parts.count)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_DRAWN, parts.hidden, generator=generator).to(dtype)
    # So large that experts can be told apart, and so small that none has all the weight.
    x = x / _logits(owner, x, wide=True).std().clamp_min(1e-9).to(dtype)
    # Trained corrections may all be alike. These are in the way of some experts, and matter little to others.
    drawn = -0.2 * torch.rand(parts.count, generator=generator) ** 3
    x = _telling(x, _logits(owner, x, wide=True), correction is not None, router, drawn)
    with _in_place_of(correction, drawn):
        sent = _sent(mlp, parts.module, shared, x)
        routing = _routing(owner, router, sent, correction, parts.count)
        if correction is None and not routing.sigmoid:  # what cuts logits off, or bends them, does it to large ones
            _routing(owner, router, _sent(mlp, parts.module, shared, _LARGE * x), None, parts.count)
    return dataclasses.replace(parts, routing=routing, beside=None if shared is None else _beside(sent, gate))


def _owner(router: nn.Module) -> Any:
    """What has the weight of a router: it, or the only linear layer in it."""
    within = [module for module in router.modules() if isinstance(getattr(module, "weight", None), torch.Tensor)]
    if len(within) != 1 or within[0].weight.ndim != 2:
        raise NotRecognised("its router is more than a matrix")
    return within[0]


def _correction(mlp: nn.Module, router: nn.Module, owner: Any, count: int) -> tuple[nn.Module, str] | None:
    """Where there is a number for each expert, beside what belongs to the router's products."""
    known = (owner.weight, getattr(owner, "bias", None))
    found = [
        (module, name)
        for module in dict.fromkeys((mlp, *router.modules()))
        for name, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None and value.numel() == count and not any(value is each for each in known)
    ]
    if len(found) > 1:
        raise NotRecognised("its router has several numbers for each expert")
    return found[0] if found else None


@contextlib.contextmanager
def _in_place_of(correction: tuple[nn.Module, str] | None, drawn: torch.Tensor) -> Iterator[None]:
    """Other numbers for each expert, within the block."""
    if correction is None:
        yield
        return
    module, name = correction
    place: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    before = place[name]
    other = drawn.to(before).view_as(before)
    place[name] = nn.Parameter(other, requires_grad=False) if place is module._parameters else other
    try:
        yield
    finally:
        place[name] = before


def _sent(mlp: nn.Module, experts: nn.Module, shared: nn.Module | None, x: torch.Tensor) -> _Sent:
    """Runs a module with answers of our own in the place of its experts, and of the MLP beside them."""
    generator = torch.Generator().manual_seed(1)
    answers, others = (torch.randn(x.shape, generator=generator).to(x) for _ in range(2))
    told: list[tuple[torch.Tensor, torch.Tensor]] = []

    def ask(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        told.append((top_k_index, top_k_weights))
        return answers.view(hidden_states.shape)

    def ask_shared(hidden_states: torch.Tensor) -> torch.Tensor:
        return others.view(hidden_states.shape)

    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_doing(experts, ask))
            if shared is not None:
                stack.enter_context(_doing(shared, ask_shared))
            found = mlp(x[None])
        found = found[0] if isinstance(found, tuple) else found
        [(indices, shares)] = told
        found = found.reshape(x.shape).double()
        ours = torch.stack([answers, others], dim=-1).double()
    except Exception as error:
        raise NotRecognised("its experts are asked in another way") from error
    factors = torch.linalg.lstsq(ours, found[..., None]).solution[..., 0]  # (tokens, 2)
    left = (found - (ours * factors[:, None]).sum(-1)).norm() / found.norm()
    scale, off = float(factors[:, 0].mean()), factors[:, 0] - factors[:, 0].mean()
    if not left < _FAR or not float(off.abs().max()) < _FAR * abs(scale):
        raise NotRecognised("what its experts answer is not added up alone")
    if indices.shape != shares.shape or indices.shape[0] != len(x):
        raise NotRecognised("its router gives no weights and indices of experts")
    return _Sent(x, indices, shares.double() * _exact(scale, mlp), factors[:, 1])


@contextlib.contextmanager
def _doing(module: nn.Module, forward: Any) -> Iterator[None]:
    """A module that does something else, within the block."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def _routing(owner: Any, router: Any, sent: _Sent, correction: tuple[nn.Module, str] | None, count: int) -> Routing:
    """What sends tokens as they were sent."""
    top, order = sent.indices.shape[1], sent.indices.sort(-1)
    shares = sent.shares.gather(1, order.indices)
    groups, asked = _number(router, _GROUPS), _number(router, _GROUPS_ASKED)
    if groups > MOST_GROUPS or count % groups or count // groups * asked < top:
        raise NotRecognised("its experts are in more groups than there is room for")
    chosen, best = False, (float("inf"), Routing(owner, top, False, False))
    numbers = torch.zeros(count) if correction is None else getattr(*correction).float().flatten()
    for wide in (False, True):
        logits = _logits(owner, sent.x, wide)
        for sigmoid, scores in ((False, logits.softmax(-1)), (True, logits.sigmoid())):
            by = _open(logits if correction is None else scores + numbers, groups, asked)
            mine = by.topk(top, -1).indices.sort(-1).values
            if not torch.equal(mine, order.values):
                continue
            chosen = True
            ways = {
                (True, True): logits.gather(1, mine).softmax(-1),
                (False, True): (plain := scores.gather(1, mine)) / plain.sum(-1, keepdim=True),
                (False, False): plain,
            }
            for (first, normalised), weights in ways.items():
                if first and (sigmoid or correction is not None):
                    continue
                scale = float((shares * weights).sum() / weights.double().square().sum())
                error = float((shares - scale * weights).norm() / shares.norm())
                if error < best[0]:
                    scale = _exact(scale, router)
                    how = Routing(owner, top, first, normalised, sigmoid, scale, correction, groups, asked)
                    best = error, how
    if not chosen:
        raise NotRecognised("its router does not choose by its products alone")
    if not best[0] < _FAR:
        raise NotRecognised("its router weighs experts otherwise than by a softmax or by sigmoids")
    return best[1]


def _number(router: Any, names: tuple[str, ...]) -> int:
    """The first of these settings that a router has; 1 if it has none."""
    return int(next((found for name in names if (found := getattr(router, name, None))), 1))


def _telling(
    x: torch.Tensor, logits: torch.Tensor, sigmoid: bool, router: Any, correction: torch.Tensor
) -> torch.Tensor:
    """Some of many random tokens: where experts are in groups, also those that tell how the groups are chosen, by their
    two best experts or by the best, and are near to neither choice's edge.
    """
    count, groups, asked = logits.shape[1], _number(router, _GROUPS), _number(router, _GROUPS_ASKED)
    if asked >= groups or count % groups:
        return x[:_TOKENS]
    by = (logits.sigmoid() + correction if sigmoid else logits).view(len(x), groups, -1)
    ways = [by.topk(min(best, by.shape[2]), -1).values.sum(-1).sort(-1, descending=True) for best in (1, 2)]
    edge = torch.stack([way.values[:, asked - 1] - way.values[:, asked] for way in ways]).amin(0)
    one, two = (way.indices[:, :asked].sort(-1).values for way in ways)
    edge[(one == two).all(-1)] = -1.0
    edge[:_TOKENS] = -1.0
    most = edge.topk(_TOKENS)
    return torch.cat((x[:_TOKENS], x[most.indices[most.values > 0]]))


def _open(by: torch.Tensor, groups: int, asked: int) -> torch.Tensor:
    """(tokens, experts) what chooses experts, less those whose groups are not chosen."""
    if asked >= groups:
        return by
    grouped = by.view(len(by), groups, -1)
    if grouped.shape[2] < 2:
        raise NotRecognised("its groups of experts have no two")
    best = grouped.topk(2, -1).values.sum(-1).topk(asked, -1).indices
    shut = torch.ones(len(by), groups, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(shut[..., None], -torch.inf).view(by.shape)


def _logits(owner: Any, x: torch.Tensor, wide: bool) -> torch.Tensor:
    """(tokens, experts) float32: a router's products; in float32, or as they are in the dtype of its weight."""
    weight, bias = owner.weight, getattr(owner, "bias", None)
    kind = torch.float32 if wide else weight.dtype
    return functional.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)).float()


def _beside(sent: _Sent, gate: Any) -> Beside:
    """How much the answer of the MLP beside experts counts."""
    found = sent.beside
    wanted = torch.ones_like(found)
    if gate is not None:
        wanted = gate(sent.x).sigmoid().double()
        if tuple(wanted.shape) != (len(found), 1):
            raise NotRecognised("what gates its shared expert has several outputs")
        wanted = wanted[:, 0]
    scale = float((found * wanted).sum() / wanted.square().sum())
    if not abs(scale) > _FAR or not float((found - scale * wanted).abs().max()) < 2 * _FAR * abs(scale):
        raise NotRecognised("its shared expert is not added, or not by a sigmoid")
    return Beside(None if gate is None else Projection(gate), _exact(scale))


def _exact(measured: float, *modules: nn.Module) -> float:
    """What a factor is that was measured in few digits: 1, or one of the modules' own numbers, if it is near."""
    own = [value for module in modules for value in vars(module).values() if isinstance(value, float) and value > 0]
    near = [each for each in (1.0, *own, 0.5) if abs(each - measured) < _FAR * each]
    return min(near, key=lambda each: abs(each - measured)) if near else measured
