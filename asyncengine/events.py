"""What the step thread tells an event loop. Immutable values; requests are named by number, never by object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asyncengine.classifier import Classifier
from asyncengine.outputs import FinishReason, Usage
from asyncengine.step.batch import Float32, TokenLogprobs

BranchKey = tuple[int, int]
"""Number of the request, index of the branch."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One new token for each of several branches.

    Attributes:
        keys: The branches. The same tuple object is used again from step to step while the batch stays the same, so
            that its reader may remember what it made of it.
        token_ids: One per branch.
        logprobs: One per branch, None where not asked for; None altogether where nobody asked.
    """

    keys: tuple[BranchKey, ...]
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of the prompt's next tokens; those of the first token, which has none, are left out."""

    number: int
    logprobs: list[TokenLogprobs]


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """A request's embedding, (hidden,) float32, as the model has it.

    Attributes:
        classifier: That model's classification head, if the request is for it: another model may be loaded by the time
            that this is read.
    """

    number: int
    vector: Float32
    classifier: Classifier | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """How much the tokens that a request asks for attend to an audio, all of them.

    Attributes:
        parts: (heads, tokens, frames) each, as `StepTokens.attention`: those of each piece in which they were computed.
    """

    number: int
    parts: tuple[Float32, ...]


@dataclass(frozen=True, slots=True)
class BranchEnded:
    """A branch will get no more tokens.

    Attributes:
        score: Of a text that a beam search has found, as `BranchResult.score`.
    """

    key: BranchKey
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """All branches have ended; the last that is heard of a request.

    Attributes:
        error: Raised to the reader once everything that was generated is read; None for an ordinary end.
    """

    number: int
    usage: Usage
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of an instruction.

    Attributes:
        ticket: Which one.
        value: Its result.
        error: Or what it raised.
    """

    ticket: int
    value: Any = None
    error: BaseException | None = None


Event = Tokens | PromptLogprobs | Pooled | Attention | BranchEnded | RequestEnded | Reply
