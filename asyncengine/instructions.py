"""What the event loops tell the step thread. Immutable values; each carries where its own reply goes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from asyncengine.catalogue import KeptPrefixes
from asyncengine.config import EngineConfig
from asyncengine.errors import DeadlineExceededError, InvalidRequestError
from asyncengine.events import Event
from asyncengine.generation import SamplingParams
from asyncengine.media import PromptMedia
from asyncengine.outputs import Pooling
from asyncengine.step.batch import Int32, Int64

InFlight = Literal["abort", "wait", "carry"]
"""What a reload does with requests that have begun: end them, let them finish, or go on with them on the new model."""

NewRequests = Literal["wait", "serve"]
"""What a reload does with requests that are given after it: let them wait for the new model, or let the present model
serve them as long as it is there."""

WhenFull = Literal["wait", "raise"]

_FAR = sys.float_info.max  # there are integers beyond it
_DEADLINES = ("queue", "first_token", "total")


class Mailbox(Protocol):
    """Where events go: one per event loop. In the engine it is a `StreamBack`."""

    def post(self, events: list[Event]) -> bool:
        """Hands events over; False if nobody will read them."""
        ...


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """The address of one instruction's reply."""

    mailbox: Mailbox
    ticket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long a request may take, in seconds from the call that adds it; None is unlimited.

    All that it waits for counts: a model that is being loaded, the reading of its images, room in the waiting queue.

    Attributes:
        queue: Until its first step.
        first_token: Until its first token.
        total: Until its end.
        since: When they began to count, in seconds of `time.perf_counter`, where that was before the call: a server may
            have been asked long before. None is the call.
    """

    queue: float | None = None
    first_token: float | None = None
    total: float | None = None
    since: float | None = None

    def __post_init__(self) -> None:
        since = self.since
        if since is not None and (
            isinstance(since, bool) or not isinstance(since, (int, float)) or not -_FAR <= since <= _FAR
        ):
            raise InvalidRequestError(f"deadline since is {since!r}; allowed: seconds of time.perf_counter, or None")
        for name in _DEADLINES:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _FAR:
                raise InvalidRequestError(f"deadline {name} is {value!r}; allowed: seconds > 0, or None")

    def begun(self, now: float) -> Deadlines:
        """The same, which count from now on if they do not yet."""
        return self if self.since is not None else dataclasses.replace(self, since=now)

    def ends(self) -> list[tuple[float, str]]:
        """When each of them passes, in seconds of the clock, and its name; the first one first. They have `begun`."""
        assert self.since is not None
        limits = [(getattr(self, name), name) for name in _DEADLINES]
        return sorted((self.since + seconds, name) for seconds, name in limits if seconds is not None)

    def exceeded(self, name: str, request: str) -> DeadlineExceededError:
        """What is said when one of them has passed.

        Args:
            name: Which.
            request: Whose, in words.
        """
        return DeadlineExceededError(f"{request}: the {name} deadline of {getattr(self, name)} s passed")


@dataclass(frozen=True, slots=True)
class PromptQuestion:
    """How likely a token is to follow a place of a prompt, whatever does follow there.

    Attributes:
        place: Index into the prompt.
        token_id: The token.
    """

    place: int
    token_id: int


@dataclass(frozen=True, slots=True)
class AlignmentQuestion:
    """How much each token of a prompt, from a place on, attends to each frame of the audio that the prompt begins with.

    Attributes:
        place: Index into the prompt.
        frames: How many frames of the audio, from the first.
    """

    place: int
    frames: int


@dataclass(frozen=True, slots=True)
class NewRequest:
    """One request, validated, tokenized and resolved against the model of epoch `AddRequests.epoch`.

    Attributes:
        number: The engine's own name of the request; never used twice.
        request_id: The public name.
        prompt: (tokens,) token ids.
        priority: Lower goes first.
        pin: Name under which the prompt's blocks are pinned in the prefix cache once they are computed.
        arriving: Whether the prompt, empty so far, comes in pieces by `ExtendPrompt`.
        pooling: Which of the prompt's hidden states make its embedding; None wants none.
        classifies: Whether the embedding is for the model's classification head.
        adapter: Name of the adapter that it is computed with; None is the model alone.
        media: Images, audio and videos in the prompt.
        second: Where the second of two texts begins that the prompt is made of; None if it is of one.
        question: What is wanted to know of the prompt besides.
    """

    number: int
    request_id: str
    prompt: Int32
    params: SamplingParams
    priority: int = 0
    deadlines: Deadlines | None = None
    pin: str | None = None
    arriving: bool = False
    pooling: Pooling | None = None
    adapter: str | None = None
    media: PromptMedia | None = None
    classifies: bool = False
    second: int | None = None
    question: PromptQuestion | AlignmentQuestion | None = None

    @property
    def prompt_tokens(self) -> int:
        """How many of the prompt's places are not there only to fill a block."""
        return len(self.prompt) if self.media is None else self.media.meant(len(self.prompt))


@dataclass(frozen=True, slots=True)
class AddRequests:
    """Admit requests. Reply: True, or False if another model was loaded since they were prepared.

    Attributes:
        epoch: Which model the requests were prepared for.
        when_full: What to do when the waiting queue is full: reply once there is room, or refuse at once.
    """

    requests: tuple[NewRequest, ...]
    epoch: int
    mailbox: Mailbox
    reply_to: ReplyTo | None = None
    when_full: WhenFull = "wait"


@dataclass(frozen=True, slots=True)
class ExtendPrompt:
    """Give a request the next piece of its prompt. No reply; one that has ended is passed over.

    Attributes:
        number: The request; it has been admitted.
        keep: How many of the tokens given before still hold.
        tokens: (tokens,) what comes after them.
        complete: Whether that is all, so that generation may begin; the prompt is not empty then.
    """

    number: int
    keep: int
    tokens: Int32
    complete: bool = False
    reply_to: ReplyTo | None = field(default=None, init=False)


@dataclass(frozen=True, slots=True)
class AbortRequests:
    """End requests; those that are unknown or have ended are passed over. Reply: None, once their blocks are free."""

    numbers: tuple[int, ...] = ()
    request_ids: tuple[str, ...] = ()
    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class Reload:
    """Load a model in place of the present one, if any. Reply: the completed configuration."""

    config: EngineConfig
    in_flight: InFlight = "abort"
    reply_to: ReplyTo | None = None
    new_requests: NewRequests = "wait"


@dataclass(frozen=True, slots=True)
class Unload:
    """End all requests and let the model go. Reply: None."""

    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class Reset:
    """End all requests, empty the prefix cache, zero the metrics. Reply: None."""

    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Stop stepping; requests keep their place. Reply: None."""

    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    """Step again. Reply: None."""

    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class Sleep:
    """Give the KV cache's memory back and stop stepping; requests are computed again after `Wake`. Reply: None."""

    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class Wake:
    """Undo `Sleep`. Reply: None."""

    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class UpdateWeights:
    """Replace some weights in place between two steps. Reply: the new weight version."""

    weights: Mapping[str, Any]
    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Have an adapter from now on, in place of one of the same name if there is one.

    Reply: True, or False if another model was loaded since it was prepared.

    Attributes:
        epoch: Which model it was prepared for.
        prepared: As the model takes it.
    """

    name: str
    prepared: Any
    epoch: int
    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """End the requests that use an adapter, and let it go. Reply: whether there was one of that name."""

    name: str
    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class SavePrefixes:
    """Tell what the prefix cache has. Reply: `asyncengine.catalogue.Inventory`; None with another model.

    Attributes:
        epoch: Of the model whose cache is meant.
    """

    epoch: int
    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ReadPrefixes:
    """Read some of it. Reply: as of `asyncengine.step.kept_prefixes.read`; None with another model.

    Attributes:
        epoch: As of `SavePrefixes`.
        blocks: As of `Inventory`.
        adopted: Likewise.
    """

    epoch: int
    blocks: Int32
    adopted: Int64
    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class LoadPrefixes:
    """Put prefixes into the prefix cache. Reply: `asyncengine.catalogue.Taken`; None with another model.

    Attributes:
        kept: They.
        epoch: Of the model that they are for.
    """

    kept: KeptPrefixes
    epoch: int
    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class Unpin:
    """Let a pinned prompt go. Reply: whether it was pinned."""

    pin: str
    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class DebugCall:
    """Call a function beside the model. Reply: one result per worker."""

    name: str
    args: tuple[Any, ...]
    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """Refuse new requests until all that there are have ended. Reply: None, then."""

    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class Restart:
    """Load the present model again after its device was lost. Reply: the completed configuration."""

    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End. Reply: the ids of the requests that had to be ended.

    Attributes:
        drain: Seconds that requests get to finish first; 0 ends them at once.
    """

    drain: float = 0.0
    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class JobDone:
    """From the loader: one of its jobs has ended.

    Attributes:
        job: Which one.
        value: What it made.
        error: Or what it raised.
    """

    job: int
    value: Any = None
    error: BaseException | None = None
    reply_to: ReplyTo | None = field(default=None, init=False)


Instruction = (
    AddRequests | ExtendPrompt | AbortRequests | Reload | Unload | Reset | Pause | Resume | Sleep | Wake
    | UpdateWeights | SavePrefixes | ReadPrefixes | LoadPrefixes | LoadAdapter | UnloadAdapter | Unpin | DebugCall
    | Drain | Restart | Shutdown | JobDone
)  # fmt: skip
