"""What the scheduler asks of whoever drafts tokens, and all that it knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from asyncengine.generation import SamplingParams
from asyncengine.step.batch import Int32, Int64
from asyncengine.step.slots import SlotTable


class Drafter(Protocol):
    """Guesses how sequences go on. Used from the step thread alone.

    Whatever it guesses, the output is the same: a guess is only ever kept where the model draws the same token. It is
    told nothing of what was kept, because the slot table says it: a sequence's tokens are what became of its drafts.
    The table is to be read, never written. Negative tokens in it are pieces of images, and no guesses.
    """

    def place(self, slot: int, params: SamplingParams, branch: int) -> None:
        """A sequence takes a slot."""
        ...

    def copy(self, copies: Int64) -> None:
        """Blocks are copied before the next step: (C, 2) of source and destination."""
        ...

    def follow(self, table: SlotTable, slots: Int64) -> None:
        """A piece of these slots' prefill was computed."""
        ...

    def propose(self, table: SlotTable, slots: Int64, lengths: Int64) -> Sequence[Int32]:
        """Guesses how decoding sequences go on.

        Args:
            table: Has their tokens, and blocks for `lengths` tokens more.
            slots: (rows,) theirs.
            lengths: (rows,) the most tokens that are wanted of each, at least 1.

        Returns:
            For each row its next tokens, fewer or none where there is no good guess.
        """
        ...
