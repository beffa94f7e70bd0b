"""A prompt that comes in pieces, and how much of it may be computed ahead. Owned by the step thread.

Nothing is held for such a request while it waits for its next piece: whole blocks are computed as soon as their tokens
are there, go to the prefix cache, and are found there again. So a caller who says nothing for an hour costs nobody a
slot or a block, and what was computed ahead is evicted like any other cached block if others need the room.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from asyncengine.step.batch import NO_TOKENS, Int32

if TYPE_CHECKING:
    from asyncengine.step.limits import Limits
    from asyncengine.step.prefix_tree import PrefixTree


@dataclass(slots=True)
class Arriving:
    """What has come of a prompt.

    Attributes:
        tokens: (tokens,) all of it so far.
        complete: Whether nothing more will come.
        computed: How many of the tokens were computed ahead.
    """

    tokens: Int32 = field(default_factory=lambda: NO_TOKENS)
    complete: bool = False
    computed: int = 0

    def take(self, keep: int, tokens: Int32, complete: bool) -> None:
        """Adds a piece after the first `keep` tokens; those after them turned out to be others."""
        self.tokens = np.concatenate([self.tokens[:keep], tokens])
        self.computed = min(self.computed, keep)
        self.complete = complete

    def note(self, computed: Int32) -> None:
        """Notes what was computed ahead; the prompt may have become another meanwhile."""
        length = min(len(computed), len(self.tokens))
        different = np.flatnonzero(computed[:length] != self.tokens[:length])
        self.computed = int(different[0]) if len(different) else length

    def due(self, limits: Limits, tree: PrefixTree, space: int) -> Int32:
        """The tokens, in whole blocks, that should be computed now; none if that would bring nothing.

        What was computed ahead and then evicted is not computed again before the prompt is complete: where memory is
        that short, it would not stay either. Where a sequence can only go on behind a state, one chunk of it may be:
        where tokens were taken back, there is none.

        Args:
            limits: Of the model.
            tree: The prefix cache.
            space: The part of it in which what was computed ahead is.
        """
        page_size = limits.page_size
        whole = len(self.tokens) // page_size * page_size
        if not limits.reuses_prefixes or limits.max_recycling == 0 or whole <= self.computed:
            return self.tokens[:0]
        again = self.computed // page_size - len(tree.usable(self.tokens[: self.computed], space))
        most = 0 if limits.kept_states is None else limits.prefill_chunk_size // page_size
        return self.tokens[:whole] if again <= most else self.tokens[:0]
