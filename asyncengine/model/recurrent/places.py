"""Where the states of a step's rows lie among those of all sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Places:
    """Of rows of one token each.

    Attributes:
        sources: (rows,) int64 where the state lies that a row goes on from.
        targets: (rows,) int64 where the state goes that the row comes to; of each row its own, or `nowhere`.
        nowhere: The place of rows that stand for nobody: nothing of it counts.
    """

    sources: torch.Tensor
    targets: torch.Tensor
    nowhere: int

    @classmethod
    def same(cls, places: torch.Tensor, nowhere: int) -> Places:
        """Of states that are changed in their places."""
        return cls(places, places, nowhere)
