"""What a head is to the drafter: modules that go on from hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Pictured:
    """What stands in the place of some tokens, which are pieces of images.

    Attributes:
        tokens: (pieces,) int64 which of a step's tokens they are.
        rows: (pieces, hidden) their embeddings in the model.
    """

    tokens: torch.Tensor
    rows: torch.Tensor


class Head(Protocol):
    """Layers over entries, each made of a token and of the state before it. Its attention goes through the hook that
    `asyncengine.model.attention_modules.attach` gives it.

    Attributes:
        width: Of a state.
        sees_images: Whether it is given what the model sees of images, and the axes of tokens. Otherwise it has the
            token that stands for a piece of an image in a text, at the first of the axes.
    """

    width: int
    sees_images: bool

    def to(self, device: torch.device) -> object:
        """Moves it."""
        ...

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """The (tokens, width) states that it goes on from, of the (tokens, layers * hidden) that the model hands out.

        Any float type.
        """
        ...

    def run(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        before: torch.Tensor,
        pictured: Pictured | None = None,
    ) -> torch.Tensor:
        """Computes entries.

        Args:
            token_ids: (tokens,) int64.
            positions: (tokens,) int64, where they are rotated to; (axes, tokens) where that is not the same by axis.
            before: (tokens, width) the state before each of them.
            pictured: Those of them that are pieces of images.

        Returns:
            (tokens, width) the states behind them, as the head guesses them.
        """
        ...

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary of the model) of (rows, width) states that `run` returned; -inf where it knows no token."""
        ...
