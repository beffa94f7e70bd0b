"""How far off a compiled step may be: what rounding comes to where transformers does it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from asyncengine.model.draft_heads.taps import Taps

COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1.2e-1}
"""Relative error of the median row that a compiled step may have at most. It keeps more digits between its products
than the model does."""


@dataclass(frozen=True, slots=True)
class Bound:
    """How far off a compiled step may be from what transformers computes in float32.

    Attributes:
        tolerance: Relative error of the logits.
        sparse: Whether tokens are sent to some of several experts. A rounding sends one of them elsewhere now and then,
            and whatever comes behind it in its sequence is off then, be it by a third; so it is the first tokens that
            are judged, but for those that see no other, and two of them have to be right.
        states: (layers + 1, sequences, first tokens, hidden) as they enter each layer and leave the last; none if they
            are not compared. A mistake that is in all layers is largest beside what rounding has come to in the first.
        of_states: Relative error of each of these.
    """

    tolerance: float
    sparse: bool = False
    states: torch.Tensor | None = None
    of_states: tuple[float, ...] = ()

    @classmethod
    def of(cls, rounded: Seen, exact: Seen, expected: Seen, sparse: bool, dtype: torch.dtype) -> Bound:
        """What rounding in `dtype` comes to where transformers does it is what it may come to.

        Args:
            rounded: What the model comes to as it is.
            exact: The same in float32.
            expected: The same of weights as the compiled step has them.
            sparse: As the attribute.
            dtype: The model's.
        """
        own, least, most = cls(0.0, sparse), torch.finfo(dtype).eps / 2, COMPILED_TOLERANCE[dtype]
        first = exact.states.shape[2]

        def allowed(found: torch.Tensor, right: torch.Tensor) -> float:
            return min(max(own.error(found, right, first), least), most)

        states = tuple(map(allowed, rounded.states, exact.states))
        return cls(allowed(rounded.logits, exact.logits), sparse, expected.states, states)

    def error(self, found: torch.Tensor, expected: torch.Tensor, first: int) -> float:
        """What a tolerance is of.

        Args:
            found: (sequences, tokens, columns) logits or states.
            expected: What they should be.
            first: Tokens of each sequence that are computed at once.
        """
        if self.sparse and found[:, 1:first].shape[1] > 1:
            return float(errors(found, expected)[:, 1:first].flatten().kthvalue(2).values)
        return in_parts(found, expected, first)

    def taps(self) -> Taps | None:
        """Where a step of the first tokens is to leave its states, if they are compared."""
        if self.states is None:
            return None
        layers, sequences, first, width = self.states.shape
        return Taps(range(layers), sequences * first, width, torch.float32, self.states.device)

    def errors_of_states(self, taps: Taps | None) -> Iterator[tuple[float, float]]:
        """Relative errors of the states in `taps`, and what they may be."""
        if taps is None or self.states is None:
            return
        layers, sequences, first, width = self.states.shape
        found = taps.of(sequences * first).view(sequences, first, layers, width)
        for layer, (expected, allowed) in enumerate(zip(self.states, self.of_states, strict=True)):
            yield self.error(found[:, :, layer], expected, first), allowed


@dataclass(frozen=True, slots=True)
class Seen:
    """What transformers makes of the sequences: logits, and states as `Bound` has them."""

    logits: torch.Tensor
    states: torch.Tensor


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of the median row."""
    return float(errors(found, expected).flatten().median())


def errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative error of each row."""
    of_rows: torch.Tensor = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
    return of_rows


def in_parts(found: torch.Tensor, expected: torch.Tensor, first: int) -> float:
    """The same of the first tokens of each sequence or of all others, whichever is larger.

    What goes on from a cache or a state is judged by itself: a model that keeps none would pass by the others.
    """
    parts = [part for part in (slice(first), slice(first, None)) if expected[:, part].numel()]
    return float(torch.tensor([relative(found[:, part], expected[:, part]) for part in parts]).max())  # NaN is largest
