"""The hidden states that a head goes on from, by the places of their tokens. Owned by the step thread."""

from __future__ import annotations

import numpy as np
import torch

from asyncengine.step.batch import Int64


class KeptStates:
    """A few states, of which the oldest make room for new ones.

    Args:
        places: How many places the KV cache has.
        rows: How many states are kept.
        page_size: Places of a block.
        hidden_size: Width of a state.
        dtype: Of the states.
        device: Theirs.

    Attributes:
        page_size: As given.
    """

    def __init__(
        self, places: int, rows: int, page_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._states = torch.zeros(rows, hidden_size, dtype=dtype, device=device)
        self._row_of = np.full(places, -1, dtype=np.int64)
        self._place_of = np.zeros(rows, dtype=np.int64)
        self.page_size = page_size
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory on the device."""
        return self._states.nbytes

    def rows(self, places: Int64) -> Int64:
        """(n,) which row has the state of the token at each place; -1 where none has."""
        rows: Int64 = self._row_of[places]
        return rows

    def states(self, rows: Int64) -> torch.Tensor:
        """(n, hidden) of rows; those of -1 mean nothing."""
        return self._states[torch.from_numpy(np.maximum(rows, 0)).to(self._states.device)]

    def keep(self, places: Int64, states: torch.Tensor) -> None:
        """Keeps the (n, hidden) states of the tokens at some places, each of them once."""
        count = len(self._states)
        places, states = places[-count:], states[-count:]
        rows = (self._next + np.arange(len(places))) % count
        self._next = int((self._next + len(places)) % count)
        before = self._place_of[rows]
        self._row_of[before[self._row_of[before] == rows]] = -1
        self._place_of[rows] = places
        self._row_of[places] = rows
        self._states[torch.from_numpy(rows).to(self._states.device)] = states

    def forget(self, places: Int64) -> None:
        """The tokens at some places are others now."""
        self._row_of[places] = -1

    def copy(self, copies: Int64) -> None:
        """Blocks are copied: (C, 2) of source and destination."""
        offsets = np.arange(self.page_size)
        sources, targets = (copies[:, [side]] * self.page_size + offsets for side in (0, 1))
        rows = self._row_of[sources]
        self.forget(targets.reshape(-1))
        known = rows >= 0
        if known.any():
            self.keep(targets[known], self.states(rows[known]))

    def clear(self) -> None:
        """Forgets all of them."""
        self._row_of[:] = -1
