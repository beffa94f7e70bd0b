"""Rotary embeddings that turn with the length of the longest sequence of a batch, and up to which length they do not.

transformers computes with other frequencies once a sequence is longer than those that a model was first trained on
("longrope", Ding et al., 2024; dynamic NTK), for all of its tokens. No cache of keys can follow that: keys of earlier
tokens, and those of other sequences, are rotated already. So either no sequence is that long, or all are rotated as
long ones are, as vLLM does it. Which of the two is settled when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from asyncengine.errors import UnsupportedModelError
from asyncengine.model.attention_modules import text_config

_KINDS = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class RopeLimit:
    """Up to where nothing changes.

    Attributes:
        kind: As configurations call it.
        tokens: The longest sequence that is rotated as all shorter ones are.
        lasting: Whether longer ones are all rotated alike, whatever their length.
    """

    kind: str
    tokens: int
    lasting: bool


def limit_of(config: Any, longest: int) -> RopeLimit | None:
    """The limit of a configuration of transformers'; None if it rotates all sequences alike, up to `longest` tokens."""
    limits = list(_limits(text_config(config), longest))
    return min(limits, key=lambda limit: limit.tokens) if limits else None


def length_for(asked: int | None, longest: int, limits: Sequence[RopeLimit | None]) -> tuple[int, str]:
    """Most tokens in one sequence, and what there is to be said of that, in words; empty if there is nothing.

    Args:
        asked: How many are wanted, at most `longest`; None leaves that to the models.
        longest: What they allow.
        limits: Theirs.
    """
    first = min((limit for limit in limits if limit is not None), key=lambda limit: limit.tokens, default=None)
    if first is None or first.tokens >= longest:
        return asked or longest, ""
    if asked is None:
        more = "longer ones cannot be served"
        if all(limit is None or limit.lasting for limit in limits):
            more = f"with max_single_sequence_length, up to {longest}, all are rotated as longer ones are"
        how = f"a sequence has at most {first.tokens} tokens, up to which all are rotated alike ({first.kind!r})"
        return first.tokens, f"positions: {how}; {more}"
    if asked <= first.tokens:
        return asked, ""
    return asked, (
        f"positions: all sequences are rotated as those of more than {first.tokens} tokens are ({first.kind!r}), so "
        "shorter ones come out otherwise than with transformers; a max_single_sequence_length of at most "
        f"{first.tokens} has them rotated as they are there"
    )


def settle(config: Any, max_length: int) -> None:
    """Has a configuration rotate all sequences of up to `max_length` tokens alike, before a model is made of it.

    Raises:
        UnsupportedModelError: It cannot.
    """
    limit = limit_of(config, max_length)
    if limit is None:
        return
    if not limit.lasting:
        names = getattr(config, "architectures", None)
        raise UnsupportedModelError(
            f"{names[0] if names else config.model_type} has rotary embeddings of type {limit.kind!r}, which change "
            f"for every sequence in the batch once one has more than {limit.tokens} tokens; set "
            f"max_single_sequence_length to at most {limit.tokens}"
        )
    for _, rope in _ropes(text_config(config)):
        if rope.get("rope_type") == "longrope":
            rope["short_factor"] = rope["long_factor"]


def _ropes(text: Any) -> list[tuple[str | None, dict[str, Any]]]:
    """How each kind of layer rotates; one that has no name is for all."""
    parameters: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    nested: list[tuple[str | None, dict[str, Any]]]
    nested = [(kind, each) for kind, each in parameters.items() if isinstance(each, dict)]
    return nested or [(None, parameters)]


def _limits(text: Any, longest: int) -> Iterator[RopeLimit]:
    for layers, rope in _ropes(text):
        kind = str(rope.get("rope_type", "default"))
        if kind not in _KINDS:
            continue
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        tokens = int(original or text.max_position_embeddings)
        if longest <= tokens:
            continue
        scales = rope.get("short_mscale"), rope.get("long_mscale")  # Phi-3.5-MoE's, with a rotary module of its own
        lasting = kind == "longrope" and scales[1] is None
        try:
            changes = _change(text, kind, layers, tokens, longest) or scales[0] != scales[1]
        except Exception:  # a configuration without something that transformers' function needs
            changes, lasting = True, False
        if changes:
            yield RopeLimit(kind, tokens, lasting)


def _change(text: Any, kind: str, layers: str | None, *lengths: int) -> bool:
    """Whether two sequences of these lengths are rotated in different ways."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    named = {} if layers is None else {"layer_type": layers}
    make, cpu = ROPE_INIT_FUNCTIONS[kind], torch.device("cpu")
    (first, _), (second, _) = (make(text, cpu, seq_len=length, **named) for length in lengths)
    return not torch.equal(first, second)
