"""What one step is to do, and whom it concerns: values that the scheduler makes. Owned by the step thread."""

from __future__ import annotations

from dataclasses import dataclass

from asyncengine.instructions import AlignmentQuestion
from asyncengine.step.batch import Int64, StepBatch
from asyncengine.step.drafting import Drafts
from asyncengine.step.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one sequence's prefill.

    Attributes:
        count: Tokens computed in this step.
        last: Whether that completes it, so that a token is drawn.
        branches: Who draws from the last token: the sequence and those unborn branches that have a slot.
        scored: Positions of the prompt, from and to, whose logits are looked at for the log-probability of the token
            after each; or of which it is looked at what they attend to.
        pooled: Positions of the prompt, from and to, whose hidden states are summed.
    """

    sequence: Sequence
    count: int
    last: bool
    branches: tuple[Sequence, ...]
    scored: tuple[int, int] = (0, 0)
    pooled: tuple[int, int] = (0, 0)

    @property
    def num_scored(self) -> int:
        """How many positions that are."""
        return self.scored[1] - self.scored[0]

    @property
    def aligns(self) -> bool:
        """Whether it is looked at what some attend to, not at their logits."""
        return self.num_scored > 0 and isinstance(self.sequence.request.new.question, AlignmentQuestion)

    @property
    def pools(self) -> bool:
        """Whether hidden states are summed."""
        return self.pooled[0] < self.pooled[1]


@dataclass(frozen=True, slots=True)
class StateMoves:
    """What a step does with states, for models that keep some.

    Attributes:
        copies: As `StepBatch.state_copies`.
        saves: As `StepBatch.state_saves`.
    """

    copies: Int64
    saves: Int64


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: what the model computes, and whom it concerns.

    Attributes:
        decodes: The sequences that decode, one per row; the same list object while they stay the same.
        decode_slots: (decodes,) theirs.
        chunks: The rows after those.
        drafts: What is guessed of the rows that decode.
        bound: Whether it must be through, with its tokens at hand, before the next one can be scheduled.
        searching: Whether any of the rows that decode is a beam of a search.
        departures: Of the scheduler, then.
    """

    batch: StepBatch
    decodes: list[Sequence]
    decode_slots: Int64
    chunks: list[Chunk]
    drafts: Drafts | None = None
    bound: bool = False
    searching: bool = False
    departures: int = 0

    @property
    def num_decode_samples(self) -> int:
        """How many entries of the batch's samples are of rows that decode; they come first."""
        return len(self.decodes) + (0 if self.drafts is None else len(self.drafts.token_ids))
