"""What a head is to the drafter: modules that go on from hidden states."""

from __future__ import annotations

from typing import Protocol

import torch


class Head(Protocol):
    """Layers over entries, each made of a token and of the state before it. Its attention goes through the hook that
    `asyncengine.model.attention_modules.attach` gives it.

    Attributes:
        width: Of a state.
    """

    width: int

    def to(self, device: torch.device) -> object:
        """Moves it."""
        ...

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """The (tokens, width) states that it goes on from, of the (tokens, layers * hidden) that the model hands out.

        Any float type.
        """
        ...

    def run(self, token_ids: torch.Tensor, positions: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Computes entries.

        Args:
            token_ids: (tokens,) int64.
            positions: (tokens,) int64, where they are rotated to.
            before: (tokens, width) the state before each of them.

        Returns:
            (tokens, width) the states behind them, as the head guesses them.
        """
        ...

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary of the model) of (rows, width) states that `run` returned; -inf where it knows no token."""
        ...
