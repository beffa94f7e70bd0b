"""Sums of probabilities that do not depend on the order of addition, and the inverse CDF over them.

A row's result must be bitwise independent of the rows beside it, but the order in which a kernel adds floats may depend
on the shape of the batch. So masses are integers, "ticks", before they are added up; the one sum of floats runs over a
fixed chunk of a row. Functions without state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncengine.model.token_ranking import chunked

# Mass of a weight of 1. Weights are at most 1 and vocabularies below 2**19, so totals stay below 2**63.
TICKS = 2.0**44
_CHUNK = 128
_BLOCK = 1 << 20  # weights that are worked on at once where they are not kept


def ticks(weights: Tensor) -> Tensor:
    """The mass of each weight in [0, 1]: int64, rounded down."""
    return (weights * TICKS).long()  # a power of two: the product is exact


def chunk_mass(weights: Tensor) -> Tensor:
    """(rows, chunks) int64: the mass of each chunk of weights (rows, vocab); arbitrary where one is NaN."""
    return ticks(chunked(weights, _CHUNK, torch.sum))


def total_mass(weights: Tensor) -> Tensor:
    """(rows, 1) int64: the mass of each row of weights (rows, vocab)."""
    return chunk_mass(weights).sum(-1, keepdim=True)


def share(total: Tensor, top_p: Tensor) -> Tensor:
    """The least mass that is top_p of total: at least one tick, at most total."""
    return (total.double() * top_p).ceil().long().minimum(total).clamp(min=1)


def keep_prefix(mass: Tensor, target: Tensor) -> Tensor:
    """Zeroes what follows the shortest prefix of mass (rows, n) that reaches the target (rows, 1)."""
    return mass * (mass.cumsum(-1) - mass < target)


def draw_sparse(ids: Tensor, mass: Tensor, u: Tensor) -> Tensor:
    """The inverse CDF over a few candidates, in the order of their ids.

    Args:
        ids: (rows, candidates) int64, in any order.
        mass: (rows, candidates) int64 ticks. Zero is never drawn, unless all are.
        u: (rows, 1) float64 in [0, 1).

    Returns:
        (rows,) int64.
    """
    ids, order = ids.sort(dim=-1)
    return ids.gather(1, _pick(mass.gather(1, order), u)).squeeze(1)


def draw_dense(weights: Tensor, u: Tensor) -> Tensor:
    """The inverse CDF over whole rows, in the order of the ids: first the chunk, then the token within it.

    Args:
        weights: (rows, vocab) float32 in [0, 1]. Zero is never drawn, unless all are.
        u: (rows, 1) float64 in [0, 1).

    Returns:
        (rows,) int64.
    """
    vocab = weights.shape[1]
    mass = chunk_mass(weights)
    until = mass.cumsum(-1)
    point = _point(u, until[:, -1:])
    chunk = _first_above(until, point)
    within = mass.gather(1, chunk)
    u_within = (point - until.gather(1, chunk) + within).double() / within.clamp(min=1)

    ids = chunk * _CHUNK + torch.arange(_CHUNK, device=weights.device)  # (rows, _CHUNK)
    inside = weights.gather(1, ids.clamp(max=vocab - 1)) * (ids < vocab)
    # Scaled to the chunk's largest, so that a chunk of small weights has enough ticks, too.
    inside = inside / inside.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return ids.gather(1, _pick(ticks(inside), u_within)).squeeze(1).clamp(max=vocab - 1)


def log_total(logits: Tensor) -> Tensor:
    """(rows, 1) float64: the logarithm of the sum of the exponentials of logits (rows, vocab), none NaN or +inf."""
    top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    size = max(1, _BLOCK // logits.shape[1])
    parts = zip(torch.split(logits, size), torch.split(top, size), strict=True)
    total = torch.cat([total_mass((part - part_top).exp_()) for part, part_top in parts])
    return top.double() + (total.clamp(min=1).double() / TICKS).log()


def _pick(mass: Tensor, u: Tensor) -> Tensor:
    """(rows, 1): the first position at which the running sum of mass (rows, n) exceeds the fraction u (rows, 1)."""
    until = mass.cumsum(-1)
    return _first_above(until, _point(u, until[:, -1:]))


def _point(u: Tensor, total: Tensor) -> Tensor:
    """The fraction u of the total, in ticks: below it even where the product is rounded up to it."""
    return (u * total.double()).long().minimum(total - 1).clamp(min=0)


def _first_above(until: Tensor, point: Tensor) -> Tensor:
    return (until <= point).sum(-1, keepdim=True).clamp(max=until.shape[1] - 1)
