"""Temperature, top-k, min-p and top-p: what is left of a row of logits to draw from. Functions without state.

Tokens are ranked as in `token_ranking`, and each filter keeps the first so many. Top-k keeps exactly k of them. Min-p
keeps those at least min_p times as likely as the likeliest. Top-p keeps the fewest that have, of the mass that
the other two leave, at least top_p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncengine.model.device_copy import at_hand
from asyncengine.model.token_mass import draw_dense, draw_sparse, keep_prefix, share, ticks, total_mass
from asyncengine.model.token_ranking import top_tokens

# How many of the likeliest tokens are searched for the nucleus before the whole row is.
_NUCLEUS_TRY = 256
_SEARCH_BLOCK = 1 << 18  # weights whose search stays in the processor's cache
_LOW_BITS = 15
SEARCH_ROWS = 64
"""Rows that are searched for their nucleus at once: enough to keep any device busy."""
HISTOGRAM_BYTES = 36 << _LOW_BITS
"""Of a row that is searched: its histogram of mass, and what is made of that, beside what grows with the vocabulary."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What some rows of a batch may draw.

    Attributes:
        rows: (n,) which rows of the batch; None is all.
        ids: (n, candidates) int64; None where `mass` is as wide as the vocabulary.
        mass: With ids: (n, candidates) int64 ticks. Without: (n, vocab) float32 weights. Zero is dropped.
    """

    rows: Tensor | None
    ids: Tensor | None
    mass: Tensor

    def draw(self, u: Tensor) -> Tensor:
        """(n,) int64: the token at u, of shape (batch, 1)."""
        if self.rows is not None:
            u = u[self.rows]
        return draw_dense(self.mass, u) if self.ids is None else draw_sparse(self.ids, self.mass, u)

    def mask(self, vocab: int) -> Tensor:
        """(n, vocab) bool: which tokens are kept."""
        if self.ids is None:
            return self.mass > 0
        nothing = torch.zeros(len(self.mass), vocab, dtype=torch.bool, device=self.mass.device)
        return nothing.scatter_(1, self.ids, self.mass > 0)


def narrow(
    logits: Tensor, scale: Tensor | None, top_k: Tensor, max_k: int, min_p: Tensor | None, top_p: Tensor
) -> list[Kept]:
    """Keeps what top-k, min-p and top-p leave; only the top-k tokens are looked at.

    Args:
        logits: (rows, vocab) float32.
        scale: As in `plain`.
        top_k: (rows, 1) int64, 1..max_k.
        max_k: At most vocab.
        min_p: As in `plain`.
        top_p: (rows, 1) float64.
    """
    ids = top_tokens(logits, max_k)
    values = logits.gather(1, ids)
    gaps = values - values[:, :1]
    weights = (gaps if scale is None else gaps * scale).exp_()
    kept = torch.arange(max_k, device=logits.device) < top_k
    if min_p is not None:
        kept &= weights >= min_p
    mass = ticks(weights * kept)
    return [Kept(None, ids, keep_prefix(mass, share(mass.sum(-1, keepdim=True), top_p)))]


def plain(logits: Tensor, scale: Tensor | None, min_p: Tensor | None) -> list[Kept]:
    """Keeps what min-p leaves.

    Args:
        logits: (rows, vocab) float32; overwritten.
        scale: (rows, 1) float32, one over the temperature; None where it is 1 for all.
        min_p: (rows, 1) float32; None where it is 0 for all.
    """
    return [Kept(None, None, _weights(logits, scale, min_p))]


def nucleus(logits: Tensor, scale: Tensor | None, min_p: Tensor | None, top_p: Tensor) -> list[Kept]:
    """Keeps what min-p and top-p leave.

    On the CPU the likeliest few tokens are searched first and the whole row only where they do not have the mass. That
    choice needs a look at the result, so on other devices the whole row is searched at once.

    Args:
        logits: (rows, vocab) float32; overwritten.
        scale: As in `plain`.
        min_p: As in `plain`.
        top_p: (rows, 1) float64.
    """
    weights = _weights(logits, scale, min_p)
    if not at_hand(weights):
        drop_outside_nucleus(weights, top_p)
        return [Kept(None, None, weights)]
    target = share(total_mass(weights), top_p)
    ids = top_tokens(weights, min(_NUCLEUS_TRY, weights.shape[1]))
    mass = ticks(weights.gather(1, ids))
    found = mass.sum(-1) >= target.squeeze(1)
    mass = keep_prefix(mass, target)
    if found.all():
        return [Kept(None, ids, mass)]
    parts = []
    if found.any():
        rows = found.nonzero().squeeze(1)
        parts.append(Kept(rows, ids[rows], mass[rows]))
        rows = (~found).nonzero().squeeze(1)
        weights, top_p = weights[rows], top_p[rows]
    else:
        rows = None
    size = max(1, _SEARCH_BLOCK // weights.shape[1])
    for some_weights, some_top_p in zip(torch.split(weights, size), torch.split(top_p, size), strict=True):
        drop_outside_nucleus(some_weights, some_top_p)
    return [*parts, Kept(rows, None, weights)]


def is_sound(logits: Tensor, scale: Tensor | None) -> Tensor:
    """(rows,) bool: whether a row can be drawn from: no NaN, no +inf, not only -inf, nor made so by its scale."""
    top = logits.amax(-1, keepdim=True)
    return torch.isfinite(top if scale is None else top * scale).squeeze(1)


def _weights(logits: Tensor, scale: Tensor | None, min_p: Tensor | None) -> Tensor:
    """(rows, vocab) float32 in [0, 1]: in proportion to the probabilities, or zero where min-p drops the token."""
    if scale is not None:
        logits.mul_(scale)
    if at_hand(logits):
        weights = torch.softmax(logits, dim=-1, out=logits)  # row after row in the cache: a third of exp's time alone
    else:  # no sum whose order could depend on the batch
        weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    if min_p is not None:
        _drop_below(weights, weights.amax(-1, keepdim=True) * min_p)
    return weights


def _drop_below(weights: Tensor, threshold: Tensor) -> None:
    """Zeroes the weights below the threshold (rows, 1), in place."""
    # A product with 0.0 or 1.0: on the CPU several times faster than with a bool, `where` or `masked_fill`.
    below = torch.nextafter(threshold, torch.full_like(threshold, -1.0))
    weights.mul_((weights - below).sign_().relu_())


def drop_outside_nucleus(weights: Tensor, top_p: Tensor) -> None:
    """Zeroes the weights outside the nucleus (Holtzman et al., 2019), in place.

    Args:
        weights: (rows, vocab) float32 in [0, 1].
        top_p: (rows, 1) float64.
    """
    for some_weights, some_top_p in zip(
        torch.split(weights, SEARCH_ROWS), torch.split(top_p, SEARCH_ROWS), strict=True
    ):
        _drop_outside_nucleus(some_weights, some_top_p)


def _drop_outside_nucleus(weights: Tensor, top_p: Tensor) -> None:
    """As `drop_outside_nucleus`, for a few rows.

    Finds the largest weight at and above which the tokens have the mass, from two histograms of mass: over the upper
    bits of the weights, then over the lower bits within the bin where the mass is reached. No sort, no shape
    that depends on the data, and exact. Of the tokens with just that weight only as many as needed are kept.
    """
    bits = weights.view(torch.int32)  # below 2**30, and in the order of the weights, as none is negative
    mass = ticks(weights)
    bins = 1 << _LOW_BITS
    upper_bits = (bits >> _LOW_BITS).clamp_(0, bins - 1)  # it is NaN, and a meaningless row, that lies beyond
    upper = mass.new_zeros(len(weights), bins).scatter_add_(1, upper_bits.long(), mass)
    upper_bin, missing = _reach(upper, share(upper.sum(-1, keepdim=True), top_p))

    base = upper_bin.to(torch.int32) << _LOW_BITS
    lower = mass.new_zeros(len(weights), bins + 2)  # between a bin for all lower weights and one for all higher
    lower.scatter_add_(1, (bits - (base - 1)).clamp_(0, bins + 1).long(), mass)
    lower = lower[:, 1:-1]
    lower_bin, missing = _reach(lower, missing)

    threshold = (base + lower_bin.to(torch.int32)).view(torch.float32)
    each = ticks(threshold).clamp(min=1)
    needed = (missing + each - 1) // each
    equal = lower.gather(1, lower_bin) // each
    if not at_hand(weights) or (needed < equal).any():
        edge = weights == threshold
        weights.mul_(~edge | (edge.cumsum(-1) <= needed))
    _drop_below(weights, threshold)


def _reach(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sum of mass (rows, bins) from the last bin down reaches the target (rows, 1).

    Returns:
        The bin, and how much of the target is missing above it, both (rows, 1) int64.
    """
    until = mass.cumsum(-1)
    above = until[:, -1:] - until  # in the bins above each, falling
    reached = (above >= target).sum(-1, keepdim=True).clamp(max=mass.shape[1] - 1)
    return reached, target - above.gather(1, reached)
