"""What the tests of combinations ask for: random requests, and the engines that serve them.

`case` draws one case of `tests/model/test_combinations.py`; `FEATURES` names what a request in an engine makes use of,
for the table in docs/features.md. To add a way to decode, add its configuration to `MODES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asyncengine import GenerationConfig, LogitsRow
from asyncengine.response_format import Choice, EbnfGrammar, JsonSchema, Regex, StructuralTag, StructuralTags

LIMIT = 96
FORMATS = [
    Choice(("a horse", "a duck", "a horse and a duck")),
    Regex("( ?[a-e]+){2,6}[.]"),
    JsonSchema({"type": "array", "items": {"enum": [1, 22, "x"]}, "minItems": 1, "maxItems": 4}),
    EbnfGrammar('start: pair ("," pair)*\npair: "(" /[0-9]+/ ")"'),
    StructuralTags([StructuralTag("<n>", {"type": "integer"}, "</n>")]),
]

KNOBS: list[dict[str, Any]] = [
    {},
    {"prefill_chunk_size": 7, "kv_cache_page_size": 4},
    {"prefix_cache_mode": "disable", "prefill_mode": "chunked"},
    {"prefill_mode": "chunked", "prefill_chunk_size": 16, "max_num_sequence": 5},
    {"kv_cache_page_size": 4, "max_total_sequence_length": LIMIT + 16},
    {"prefill_chunk_size": 16, "max_total_sequence_length": LIMIT, "max_num_sequence": 12},
    {"decoder_backend": "transformers", "kv_cache_page_size": 16},
    {"decoder_backend": "transformers", "attention_backend": "torch", "prefill_chunk_size": 10},
    {"prefix_cache_max_num_recycling_seqs": 1, "max_num_sequence": 8},
]
"""How an engine may be set; `max_total_sequence_length` where it shall preempt."""

MODES: list[dict[str, Any]] = [
    {},
    {"speculative_mode": "ngram", "spec_draft_length": 3},
    {"speculative_mode": "small_draft"},  # the model is its own draft
]
"""Ways to decode, each combined with some of the knobs."""


def push(logits: torch.Tensor, row: LogitsRow) -> None:
    logits[(17 * len(row.token_ids) + len(row.prompt_token_ids)) % len(logits)] += 2.0
    logits[row.token_ids[-1:].tolist()] -= 1.0


class Wishes:
    """Draws requests."""

    def __init__(self, seed: int, vocabulary: int, end: int, prompt: list[int]) -> None:
        self.generator = np.random.default_rng(seed)
        self.vocabulary = vocabulary
        self.end = end
        self.whole = prompt

    def sometimes(self, share: float, value: Any, otherwise: Any = None) -> Any:
        return value if self.generator.random() < share else otherwise

    def integer(self, low: int, high: int) -> int:
        return int(self.generator.integers(low, high))

    def token_ids(self, count: int) -> list[int]:
        found: list[int] = self.generator.integers(6, self.vocabulary, count).tolist()
        return found

    def prompt(self) -> list[int]:
        """They share what they begin with."""
        shared = self.whole[: self.integer(1, min(len(self.whole), LIMIT - 8))]
        return shared + self.sometimes(0.3, self.token_ids(self.integer(1, 4)), [])

    def config(self) -> GenerationConfig:
        sometimes = self.sometimes
        max_tokens = sometimes(0.97, self.integer(0, 18))
        format_ = sometimes(0.35, FORMATS[self.integer(0, len(FORMATS))])
        logprobs = sometimes(0.4, True, False)
        words: list[Any] = [[token] for token in self.token_ids(3)] + [self.token_ids(2), "horse", " the", "e"]
        return GenerationConfig(
            n=self.integer(1, 4),
            temperature=[0.0, 0.0, 0.7, 1.0, 1.6][self.integer(0, 5)],
            top_k=sometimes(0.3, self.integer(1, 40)),
            top_p=sometimes(0.3, 0.9),
            min_p=sometimes(0.2, 0.02),
            frequency_penalty=sometimes(0.3, [0.6, -0.4][self.integer(0, 2)]),
            presence_penalty=sometimes(0.3, 0.5),
            repetition_penalty=sometimes(0.3, 1.2),
            logprobs=logprobs,
            top_logprobs=self.integer(0, 5) if logprobs else 0,
            logprobs_mode=sometimes(0.3, "processed", "raw"),
            logit_bias=sometimes(0.3, dict.fromkeys([*self.token_ids(3), self.end], 3.0)),
            max_tokens=max_tokens,
            min_tokens=sometimes(0.3, self.integer(0, (max_tokens or 0) + 1), 0),
            seed=self.integer(-(2**62), 2**62),
            stop_strs=sometimes(0.4, [" a", "22", "he", "d .", "e"], []),
            stop_token_ids=sometimes(0.3, self.token_ids(20), []),
            ignore_eos=sometimes(0.5, True, False),
            skip_special_tokens=sometimes(0.7, True, False),
            detokenize=sometimes(0.9, True, False),
            response_format=format_,
            jump_forward=sometimes(0.8, True, False),
            allowed_token_ids=sometimes(0.05 if format_ else 0.2, [self.end, *self.token_ids(self.vocabulary // 3)]),
            bad_words=sometimes(0.1 if format_ else 0.3, words[self.integer(0, 4) :], []),
            logits_processors=sometimes(0.2, [push], []),
            prompt_logprobs=sometimes(0.25, self.integer(0, 4)),
        )


@dataclass(frozen=True)
class Asked:
    """One request in one engine.

    Attributes:
        wish: What it asks for.
        in_pieces: Whether its prompt comes in pieces.
        adapter: What it is computed with.
        knobs: How the engine is set.
    """

    wish: GenerationConfig
    in_pieces: bool
    adapter: str | None
    knobs: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Requests, and the engines that each serve all of them at once."""

    prompts: list[list[int]]
    wishes: list[GenerationConfig]
    engines: list[dict[str, Any]]

    def in_pieces(self, index: int) -> bool:
        """Whether a prompt comes in pieces."""
        return index % 7 == 0

    def adapter(self, index: int) -> str | None:
        """The adapter that a request is computed with."""
        return (None, "one", None, "two", None)[index % 5]

    def asked(self) -> list[Asked]:
        """Every request in every engine."""
        return [
            Asked(wish, self.in_pieces(index), self.adapter(index), knobs)
            for knobs in self.engines
            for index, wish in enumerate(self.wishes)
        ]


def case(seed: int, vocabulary: int, end: int, story: list[int], requests: int, engines: int) -> Case:
    """Draws a case. As many in a row as there are knobs have all of them between them."""
    draw = Wishes(seed, vocabulary, end, story)
    return Case(
        [draw.prompt() for _ in range(requests)],
        [draw.config() for _ in range(requests)],
        [KNOBS[(seed * engines + index) % len(KNOBS)] | MODES[(seed + index) % len(MODES)] for index in range(engines)],
    )


def _jumps(wish: GenerationConfig) -> bool:
    return bool(wish.response_format and wish.jump_forward and not wish.logprobs and not wish.logits_processors)


FEATURES: dict[str, Callable[[Asked], bool]] = {
    "several branches": lambda asked: asked.wish.n > 1,
    "sampling filters": lambda asked: bool(
        asked.wish.temperature and (asked.wish.top_k or asked.wish.top_p or asked.wish.min_p)
    ),
    "penalties and biases": lambda asked: bool(
        asked.wish.logit_bias
        or asked.wish.frequency_penalty
        or asked.wish.presence_penalty
        or asked.wish.repetition_penalty
    ),
    "masks": lambda asked: bool(asked.wish.allowed_token_ids or asked.wish.bad_words or asked.wish.min_tokens),
    "stop tokens and strings": lambda asked: bool(asked.wish.stop_strs or asked.wish.stop_token_ids),
    "log-probabilities": lambda asked: asked.wish.logprobs,
    "log-probabilities of the prompt": lambda asked: asked.wish.prompt_logprobs is not None,
    "response format": lambda asked: asked.wish.response_format is not None,
    "jump-forward": lambda asked: _jumps(asked.wish),
    "logits processors": lambda asked: bool(asked.wish.logits_processors),
    "prompt in pieces": lambda asked: asked.in_pieces,
    "adapter": lambda asked: asked.adapter is not None,
    "small chunks": lambda asked: asked.knobs.get("prefill_chunk_size", 512) < 20,
    "separate prefill": lambda asked: asked.knobs.get("prefill_mode") == "chunked",
    "prefix cache": lambda asked: asked.knobs.get("prefix_cache_mode") != "disable",
    "preemption": lambda asked: "max_total_sequence_length" in asked.knobs,
    "transformers' modules": lambda asked: asked.knobs.get("decoder_backend") == "transformers",
    "compiled step": lambda asked: "decoder_backend" not in asked.knobs,
    "speculation": lambda asked: "speculative_mode" in asked.knobs,
}
