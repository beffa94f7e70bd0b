"""How much of a prompt one step computes, and what is looked at on the way. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Collection

from asyncengine.media import PromptMedia
from asyncengine.step.limits import Limits
from asyncengine.step.plan import Chunk
from asyncengine.step.sequence import Sequence, SequenceState

MAX_SCORED = 256
"""Most rows of logits that a step looks at for prompt log-probabilities: they are as wide as the vocabulary."""


def next_chunk(
    sequence: Sequence, computed: int, known: int, budget: int, beside: Collection[Chunk], limits: Limits
) -> Chunk | None:
    """What a step computes of a sequence that prefills; None if that is nothing.

    Args:
        sequence: It.
        computed: How many of its tokens are in the cache, or will be.
        known: How many tokens it has.
        budget: Tokens that the step has room for.
        beside: The step's other chunks.
        limits: What the model can take.
    """
    left = known - computed
    if not left:  # its last piece is under way
        return None
    count = left
    if not limits.whole_prompts:
        count = min(left, budget)
    elif left > budget and beside:
        return None
    request, new = sequence.request, sequence.request.new
    first = max(computed, request.unscored_from)
    scores = new.pooling is None and request.unscored
    if scores:
        room = MAX_SCORED - sum(chunk.num_scored for chunk in beside)
        if room <= 0:
            return None
        count = min(count, first + room - computed)
    if new.media is not None and new.media.whole:
        count = _with_whole_images(new.media, computed, count, budget)
        if not count:
            return None
    scored = (first, max(first, min(computed + count, request.looked_at[1]))) if scores else (0, 0)
    last = count == left
    draws = last and request.arriving is None and new.params.max_tokens > 0
    unborn: list[Sequence] = []
    if request.search is None:  # beams begin with what is likely after the same token
        unborn = [b for b in request.branches if b.state is SequenceState.UNBORN and b.slot >= 0]
    return Chunk(
        sequence, count, last, (sequence, *unborn) if draws else (), scored, _pooled(sequence, computed, count)
    )


def _pooled(sequence: Sequence, computed: int, count: int) -> tuple[int, int]:
    """Positions, from and to, whose hidden states are summed."""
    new = sequence.request.new
    if new.pooling is None:
        return 0, 0
    if new.pooling == "cls":
        return 0, 1
    if sequence.request.unscored:
        return max(computed, sequence.request.scored), computed + count
    return max(len(new.prompt) - 1, computed), computed + count


def _with_whole_images(media: PromptMedia, computed: int, count: int, most: int) -> int:
    """How many of the next `count` tokens are computed, or of `most` at most, so that no image is parted; 0 if none can
    be in this step.
    """
    end = computed + count
    for first, last in media.whole_runs:
        if first < end < last:
            if computed < first:
                return first - computed
            return last - computed if last - computed <= most else 0
    return count
