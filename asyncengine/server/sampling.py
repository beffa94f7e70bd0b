"""The fields that say how to generate, which most routes share, and the engine's values they become."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from asyncengine.errors import InvalidRequestError
from asyncengine.generation import GenerationConfig
from asyncengine.instructions import Deadlines
from asyncengine.loop.prepare import RequestOptions
from asyncengine.server.refusal import Refusal


class DeadlineFields(msgspec.Struct, forbid_unknown_fields=True):
    """Seconds that a request may take; past one of them it ends with an error."""

    queue: float | None = None
    first_token: float | None = None
    total: float | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries beside the answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Sampling(msgspec.Struct, kw_only=True):
    """Fields of OpenAI's that two or more routes share, then those that only engines like this one have."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int = 1
    seed: int | None = None
    stop: str | list[str] = []
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None

    allowed_token_ids: list[int] | None = None
    bad_words: list[str | list[int]] = []
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    skip_special_tokens: bool = True
    priority: int = 0
    deadlines: DeadlineFields | None = None
    num_beams: int | None = None
    use_beam_search: bool = False
    length_penalty: float | None = None
    early_stopping: bool | str | None = None


NAMES: Mapping[str, str] = {
    **{name: name for name in Sampling.__struct_fields__},
    **{name: name for name in ("logprobs", "top_logprobs", "prompt_logprobs", "messages", "prompt", "request_id")},
    "stop_strs": "stop",
    "deadline": "deadlines",
    "adapter": "model",
}
"""The engine's names of fields to those on the wire."""

IGNORED = frozenset({
    "metadata", "moderation", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip
"""Fields of OpenAI's that are about its own service: they cannot change an answer here."""


OTHERS: dict[str, str] = {
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"), "use response_format"
    ),
}
"""Fields of other servers that would change an answer and have another name here, or none."""


def generation_config(body: Sampling, **changes: Any) -> GenerationConfig:
    """How to generate.

    Raises:
        InvalidRequestError: A value is out of range.
        Refusal: A field cannot be honoured.
    """
    top_k = None if body.top_k in (-1, 0) else body.top_k  # what others take for "off"
    num_beams = (body.n if body.use_beam_search else 1) if body.num_beams is None else body.num_beams
    values: dict[str, Any] = {
        "n": body.n,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": top_k,
        "min_p": body.min_p,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": _bias(body.logit_bias),
        "max_tokens": body.max_tokens,
        "min_tokens": body.min_tokens,
        "seed": body.seed,
        "stop_strs": body.stop,
        "stop_token_ids": body.stop_token_ids,
        "ignore_eos": body.ignore_eos,
        "skip_special_tokens": body.skip_special_tokens,
        "response_format": body.response_format,
        "allowed_token_ids": body.allowed_token_ids,
        "bad_words": body.bad_words,
        "num_beams": num_beams,
    }
    if num_beams != 1:
        values |= {"length_penalty": body.length_penalty, "early_stopping": body.early_stopping}
    elif body.use_beam_search:
        field = "n" if body.num_beams is None else "num_beams"
        message = f"use_beam_search is true and {field} is 1; a beam search needs 2 beams or more"
        raise Refusal(400, message, "invalid_field", field)
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "stream_options is given and stream is false", "invalid_field", "stream_options")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        message = "stream_options.include_obfuscation cannot be honoured: there is no obfuscation here"
        raise Refusal(400, message, "unsupported_field", "stream_options.include_obfuscation")
    return GenerationConfig.from_dict(values | changes)


def request_options(body: Sampling, request_id: str, label: str, adapter: str | None) -> RequestOptions:
    """How the request is handled; a full queue refuses it.

    Args:
        body: What was asked for.
        request_id: What the engine knows the request by.
        label: Id of the HTTP request.
        adapter: What it is computed with; None is the model alone.

    Raises:
        InvalidRequestError: A value is out of range.
    """
    return RequestOptions(
        request_id=request_id,
        label=label,
        priority=body.priority,
        deadlines=deadlines_of(body.deadlines),
        when_full="raise",
        adapter=adapter,
    )


def deadlines_of(fields: DeadlineFields | None) -> Deadlines | None:
    """Deadlines that count from now on: the request has just been read.

    Raises:
        InvalidRequestError: A value is out of range.
    """
    return None if fields is None else Deadlines(**msgspec.structs.asdict(fields), since=time.perf_counter())


def _bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise InvalidRequestError(f"logit_bias has key {key!r}; allowed: token ids >= 0")
    return {int(key): value for key, value in bias.items()}
