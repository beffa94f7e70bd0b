"""OpenAI's shapes of answers, as msgspec structs: encoding one takes less than a microsecond."""

from __future__ import annotations

from typing import Any

import msgspec

from asyncengine.outputs import Usage


class PromptDetails(msgspec.Struct):
    """Of a prompt's tokens. Where there is no audio, nothing is said of it."""

    cached_tokens: int
    audio_tokens: int | msgspec.UnsetType = msgspec.UNSET


class CompletionDetails(msgspec.Struct):
    """Of what was guessed ahead by speculative decoding."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageRecord(msgspec.Struct):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | msgspec.UnsetType = msgspec.UNSET


class TopLogprob(msgspec.Struct):
    """An alternative to a token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(msgspec.Struct):
    """A token's log-probability, in a chat."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a chat's choice."""

    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a completion's choice."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Function(msgspec.Struct):
    """A function that is called."""

    name: str
    arguments: str


class Call(msgspec.Struct, omit_defaults=True):
    """A tool call; in a stream with its index."""

    id: str
    function: Function
    type: str | msgspec.UnsetType = msgspec.UNSET
    index: int | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to a message."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[Call] | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(msgspec.Struct):
    """One branch in a chunk of a chat."""

    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(msgspec.Struct):
    """A chunk of a chat."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageRecord | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "chat.completion.chunk"


class Message(msgspec.Struct):
    """An assistant's message."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[Call] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One branch of a chat."""

    index: int
    message: Message
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct):
    """A chat's answer."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageRecord
    object: str = "chat.completion"


class PromptLogprob(msgspec.Struct):
    """A token at a place of the prompt; `rank` is None where it is not among the likeliest that were asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""Per token of the prompt, by id: the token itself and the likeliest. The first token follows nothing."""


class CompletionChoice(msgspec.Struct):
    """One branch of a completion, or what a chunk adds to it."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct):
    """A completion, or a chunk of one."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageRecord | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "text_completion"


def usage_of(records: list[Usage], speculates: bool) -> UsageRecord:
    """The sum of what requests cost.

    Args:
        records: Of each request.
        speculates: Whether tokens are guessed ahead, so that it is said how many of them were right.
    """
    prompt, completion = sum(u.prompt_tokens for u in records), sum(u.completion_tokens for u in records)
    cached = sum(u.cached_tokens for u in records)
    heard = sum(u.audio_tokens for u in records)
    details = PromptDetails(cached, heard or msgspec.UNSET)
    found = UsageRecord(prompt, completion, prompt + completion, details)
    guessed = sum(u.draft_tokens for u in records)
    if speculates or guessed:
        accepted = sum(u.accepted_draft_tokens for u in records)
        found.completion_tokens_details = CompletionDetails(accepted, guessed - accepted)
    return found


def jsonable(value: Any) -> Any:
    """A struct as dictionaries and lists."""
    return msgspec.to_builtins(value)
