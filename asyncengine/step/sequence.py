"""Requests and their branches as the step thread sees them. Owned by the step thread."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from asyncengine.detokenizer import TextStream
from asyncengine.instructions import AlignmentQuestion, Mailbox, NewRequest
from asyncengine.outputs import Usage
from asyncengine.speculation.lengths import NOTHING, Learnt
from asyncengine.step.adapters import NO_SPACE, Adapter
from asyncengine.step.arriving import Arriving
from asyncengine.step.batch import Float32, Float64, Int32
from asyncengine.step.beam_search import BeamSearch


class SequenceState(enum.Enum):
    """Where a branch is."""

    UNBORN = "unborn"  # waits for the first branch to compute the prompt that they share; or is a beam without a text
    HELD = "held"  # waits for more of its prompt; in no queue
    WAITING = "waiting"  # has neither slot nor blocks
    PREFILL = "prefill"  # has a slot and blocks; part of what it knows is not in the KV cache
    DECODE = "decode"  # all but its newest token is in the KV cache
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Request:
    """One request.

    Attributes:
        new: As it was asked for.
        mailbox: Where its events go.
        arrival: Order of admission; unique.
        arrived_at: Seconds of the core's clock, as are the other times.
        branches: n sequences, in order, or as many as a search has beams; none once it has ended.
        search: The beam search that it is, if it is one: its branches are beams then, and the texts that it finds what
            the reader knows as branches.
        adapter: What it is computed with; None is the model alone.
        cached_tokens: Prompt tokens found in the prefix cache at the first admission to a batch.
        arriving: Its prompt, until that has come whole. Meanwhile `new.prompt` is what is to be computed of it now.
        computed_ahead: How many tokens of the prompt were computed, or found, before it had come whole.
        scored: How many of the prompt's positions have been looked at, where all are: for the log-probability of the
            token after them, for their hidden state, or for what they attend to.
        pooled: (hidden,) sum of the hidden states that have been looked at.
        attention: As `asyncengine.events.Attention.parts`, of those that have been looked at.
        draft_tokens: Tokens guessed, over all branches.
        accepted_draft_tokens: How many of them were kept.
        ended: Whether its end has been told.
    """

    new: NewRequest
    mailbox: Mailbox
    arrival: int
    arrived_at: float
    branches: list[Sequence] = field(default_factory=list)
    search: BeamSearch | None = None
    adapter: Adapter | None = None
    started_at: float | None = None
    first_token_at: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    scored: int = 0
    arriving: Arriving | None = None
    computed_ahead: int = 0
    pooled: Float64 | None = None
    attention: tuple[Float32, ...] = ()
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    ended: bool = False

    @property
    def space(self) -> int:
        """The part of the prefix cache that it may use."""
        return NO_SPACE if self.adapter is None else self.adapter.space

    @property
    def num_output(self) -> int:
        """Tokens generated, over all branches; true when all of them have ended."""
        if self.search is not None:
            return self.search.num_told
        return sum(branch.num_output for branch in self.branches)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, as far as it has come."""
        return self.new.prompt_tokens if self.arriving is None else len(self.arriving.tokens)

    def usage(self, now: float) -> Usage:
        """What it has taken until `now`, in seconds of the core's clock."""
        first, started = self.first_token_at, self.started_at
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.num_output,
            cached_tokens=self.cached_tokens,
            audio_tokens=0 if self.new.media is None else self.new.media.num_tokens("audio"),
            preemptions=self.preemptions,
            queue_seconds=(now if started is None else started) - self.arrived_at,
            first_token_seconds=None if first is None else first - self.arrived_at,
            total_seconds=now - self.arrived_at,
            draft_tokens=self.draft_tokens,
            accepted_draft_tokens=self.accepted_draft_tokens,
        )

    @property
    def bound(self) -> bool:
        """Whether a step with a piece of its prompt must be through before the next one is scheduled."""
        new = self.new
        read = self.unscored or new.pooling is not None or new.media is not None
        return read or self.search is not None or new.params.follows_tokens

    def has_media(self, digest: bytes) -> bool:
        """Whether its prompt has an image or an audio."""
        return self.new.media is not None and any(item.digest == digest for item in self.new.media.items)

    @property
    def unscored(self) -> bool:
        """Whether positions of the prompt are to be looked at that were not yet."""
        if self.new.pooling is not None:
            return self.new.pooling == "mean" and self.scored < len(self.new.prompt)
        return max(self.scored, self.looked_at[0]) < self.looked_at[1]

    @property
    def looked_at(self) -> tuple[int, int]:
        """From and to of the prompt's positions whose logits are looked at, or what they attend to."""
        question = self.new.question
        if isinstance(question, AlignmentQuestion):
            return question.place, len(self.new.prompt)
        if question is not None:
            return question.place, question.place + 1
        return 0, len(self.new.prompt) - 1 if self.new.params.num_prompt_logprobs >= 0 else 0

    @property
    def unscored_from(self) -> int:
        """The first position of the prompt that is to be looked at, or may be."""
        return self.scored if self.new.pooling is not None else max(self.scored, self.looked_at[0])


class Sequence:
    """One branch of a request.

    Attributes:
        state: See `SequenceState`.
        slot: Row of the slot table while it is in PREFILL or DECODE (an unborn branch may hold one already), else -1.
        tokens: Prompt and output while it has no slot; the slot table has them otherwise.
        num_output: Tokens generated, as of when it last gave up a slot.
        weight_version: Of the weights that all its keys and values were computed with.
        in_flight: Tokens in prefill that a step computes which was launched and is not settled.
        text: Looks for stop strings, where the request has some.
        learnt: How its drafts fared, as of when it last gave up a slot.
    """

    __slots__ = (
        "branch", "in_flight", "key", "learnt", "num_output", "order", "request", "slot", "state", "text", "tokens",
        "weight_version",
    )  # fmt: skip

    def __init__(self, request: Request, branch: int) -> None:
        self.request = request
        self.branch = branch
        self.key = (request.new.number, branch)
        self.order = (request.new.priority, request.arrival, branch)
        self.state = SequenceState.WAITING if branch == 0 else SequenceState.UNBORN
        self.slot = -1
        self.tokens: Int32 = request.new.prompt
        self.num_output = 0
        self.weight_version = -1
        self.in_flight = 0
        self.text: TextStream | None = None
        self.learnt: Learnt = NOTHING

    @property
    def resident(self) -> bool:
        """Whether it takes part in steps."""
        return self.state is SequenceState.PREFILL or self.state is SequenceState.DECODE
