"""What a request yields. Values; no torch, no asyncio."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from asyncengine.step.batch import Float32, TokenLogprobs

Pooling = Literal["mean", "last", "cls"]
"""Which hidden states make an embedding: the mean over all tokens, the last one's, or of an encoder the first one's."""


class FinishReason(enum.StrEnum):
    """Why a branch ended. Compares equal to its string."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost. True counts, also after an abort or an error.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens generated and delivered, over all branches.
        cached_tokens: Prompt tokens that came from the prefix cache.
        audio_tokens: Prompt tokens that stand for audio.
        preemptions: How often a branch lost its KV blocks and was computed again.
        queue_seconds: From admission to the first step.
        first_token_seconds: From admission to the first token; None if there was none.
        total_seconds: From admission to the end.
        draft_tokens: Tokens that speculative decoding guessed, over all branches.
        accepted_draft_tokens: How many of them were right and so cost no step of their own.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    audio_tokens: int = 0
    preemptions: int = 0
    queue_seconds: float = 0.0
    first_token_seconds: float | None = None
    total_seconds: float = 0.0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class RequestOutput(NamedTuple):
    """One delta of one branch. Deltas of a branch, one after the other, are the branch's result exactly.

    Attributes:
        text: New text. Never breaks a character; may be empty while a character or stop string is incomplete.
        token_ids: New tokens.
        logprobs: One entry per new token if asked for, else None.
        index: The branch, 0 to n - 1.
        finish_reason: Set in the branch's last delta.
        stop_reason: The token id or the stop string that ended the branch, where one did.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    index: int = 0  # type: ignore[assignment]  # a field, where a tuple has a method that nobody asks an output for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class BranchResult:
    """One branch, whole. Attributes as in `RequestOutput`, and:

    Attributes:
        score: Of a text that a beam search has found: the sum of its tokens' log-probabilities, divided by their number
            to the power of the length penalty. None of others.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    index: int
    finish_reason: FinishReason
    stop_reason: int | str | None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class RequestResult:
    """A request, whole.

    Attributes:
        request_id: The engine's id of the request, or the one that the caller gave.
        outputs: One per branch, in order.
        usage: Token counts and timings.
        prompt_token_ids: The prompt, if its log-probabilities were asked for.
        prompt_logprobs: One entry per token of the prompt; the first, which follows nothing, is None. Fewer where the
            request ended before its prompt was computed. None if they were not asked for.
    """

    request_id: str
    outputs: list[BranchResult] = field(default_factory=list)
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def text(self) -> str:
        """Text of branch 0."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Tokens of branch 0."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Finish reason of branch 0."""
        return self.outputs[0].finish_reason


@dataclass(frozen=True, slots=True)
class PromptScore:
    """How likely a text is, token by token.

    Attributes:
        token_ids: The tokens.
        logprobs: One entry per token; the first, which follows nothing, is None.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]

    @property
    def logprob(self) -> float:
        """Of the text after its first token: the sum over its tokens."""
        return math.fsum(entry.logprob for entry in self.logprobs if entry is not None)


@dataclass(frozen=True, slots=True)
class TranscriptWord:
    """A word of what is said in an audio, with the punctuation that is written beside it.

    Words, one after the other, are the text of their segment, but for spaces around it.

    Attributes:
        word: It, with the space before it.
        start: Seconds from the beginning of the audio.
        end: The same of its end; not before `start`, and the same where the model passes over it.
        probability: Of a token of it, in the middle of them, among those that may be said; None if nobody has asked.
    """

    word: str
    start: float
    end: float
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class TranscriptSegment:
    """A part of what is said in an audio.

    Attributes:
        start: Seconds from the beginning of the audio.
        end: The same of its end; later than `start`.
        text: What is said.
        token_ids: As the model has written it, with the tokens of its times.
        logprob: Of a token that is said, in the middle of them; None if there are none.
        avg_logprob: Of a token of all that was heard at once, the one that ends it included, in the middle of them:
            openai-whisper distrusts less than -1.
        compression_ratio: Of the text of all that was heard at once: bytes, by how many zlib makes of them.
            openai-whisper distrusts more than 2.4, which is text that repeats itself.
        no_speech_prob: How likely the model finds it that nothing is said in all that was heard at once.
        temperature: At which that was written down.
        seek: Where what was heard at once begins, in hundredths of a second.
        words: Its words, in their order, if they were asked for.
    """

    start: float
    end: float
    text: str
    token_ids: tuple[int, ...]
    logprob: float | None = None
    avg_logprob: float | None = None
    compression_ratio: float | None = None
    no_speech_prob: float | None = None
    temperature: float | None = None
    seek: int = 0
    words: tuple[TranscriptWord, ...] = ()


@dataclass(frozen=True, slots=True)
class TranscriptDelta:
    """What has come of a transcript. Deltas, one after the other, are its text and its segments exactly.

    Attributes:
        text: New text.
        segments: New segments, if they were asked for: those of what was heard at once come together, behind its text.
    """

    text: str
    segments: tuple[TranscriptSegment, ...] = ()


@dataclass(frozen=True, slots=True)
class Transcript:
    """What is said in an audio.

    Attributes:
        text: It.
        usage: What it cost; of an audio that is heard in pieces, all of them together.
        finish_reason: ``"length"`` if it is cut off, ``"abort"`` if a piece of it was aborted.
        language: That is spoken, by its code, if it was said or found out.
        segments: Its parts, in their order, if they were asked for.
        seconds: How long the audio is; None if nobody has counted.
    """

    text: str
    usage: Usage
    finish_reason: FinishReason
    language: str | None = None
    segments: tuple[TranscriptSegment, ...] = ()
    seconds: float | None = None

    @property
    def words(self) -> tuple[TranscriptWord, ...]:
        """Those of all segments, in their order."""
        return tuple(word for segment in self.segments for word in segment.words)


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """A text as a vector.

    Attributes:
        vector: (dimensions,) float32.
        usage: What it cost.
    """

    vector: Float32
    usage: Usage


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """What a classification head says of a text.

    Attributes:
        logits: (labels,) float32, as the head gives them. Of a reward model, whose head has one label, the reward.
        probs: (labels,) float32. By the checkpoint's ``problem_type``: softmax, or sigmoid of each where several labels
            may hold at once; where it has none, softmax, or sigmoid of a single label. None of a regression, whose
            logits are the values themselves.
        labels: The labels' names.
        usage: What it cost.
    """

    logits: Float32
    probs: Float32 | None
    labels: tuple[str, ...]
    usage: Usage

    @property
    def label(self) -> str:
        """The likeliest label."""
        return self.labels[int(self.logits.argmax())]

    @property
    def score(self) -> float:
        """The one logit of a head with one label: a reward, a relevance, a value.

        Raises:
            ValueError: There are several.
        """
        if len(self.labels) != 1:
            raise ValueError(f"there is a score for each of {len(self.labels)} labels; look at logits or probs")
        return float(self.logits[0])


@dataclass(frozen=True, slots=True)
class Relevance:
    """How far a document answers a query.

    Attributes:
        index: The document's.
        logit: What the classification head says, or the logit of the model's "yes" above that of its "no".
        score: The same in (0, 1): the sigmoid of `logit`, so of "yes" and "no" the probability of "yes".
        usage: What it cost.
    """

    index: int
    logit: float
    score: float
    usage: Usage
