"""Random combinations of everything a request may ask for, in engines of every kind, against the scalar reference.

A case is a model, a few dozen requests, and engines that serve them all at once. What each branch got is compared with
what it should have got alone: one plain forward, no cache, no chunks, and a sampler that takes one row at a time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, LogitsRow, RequestOptions, RequestResult, tiny
from asyncengine.grammar.select import make_backend
from asyncengine.model.tokenizer import load_tokenizer
from asyncengine.response_format import Choice, EbnfGrammar, JsonSchema, Regex, StructuralTag, StructuralTags
from tests.model import letters
from tests.model.scalar_reference import Reference, check_entry

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

MODES: list[dict[str, Any]] = [{}]
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
            allowed_token_ids=None if format_ else sometimes(0.2, [self.end, *self.token_ids(self.vocabulary // 3)]),
            bad_words=[] if format_ else sometimes(0.3, words[self.integer(0, 4) :], []),
            logits_processors=sometimes(0.2, [push], []),
            prompt_logprobs=sometimes(0.25, self.integer(0, 4)),
        )


async def pieces(prompt: list[int]) -> AsyncIterator[list[int]]:
    for start in range(0, len(prompt), 5):
        yield prompt[start : start + 5]
        await asyncio.sleep(0)


async def served(
    config: EngineConfig, prompts: list[list[int]], wishes: list[GenerationConfig]
) -> tuple[list[RequestResult], int]:
    """All requests at once, with priorities, every seventh prompt in pieces; and how often one was preempted."""
    async with AsyncEngine(config) as engine:
        results = await asyncio.gather(*(
            engine.generate(
                pieces(prompt) if index % 7 == 0 else prompt, wish, RequestOptions(priority=index % 3 - 1)
            )
            for index, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True))
        ))  # fmt: skip
        metrics = engine.metrics()
        assert metrics.kv_blocks_used == 0
        return results, metrics.counters.preemptions


def check(reference: Reference, prompts: list[list[int]], wishes: list[GenerationConfig], results: Any) -> None:
    for prompt, wish, result in zip(prompts, wishes, results, strict=True):
        assert len(result.outputs) == wish.n
        assert result.usage.prompt_tokens == len(prompt)
        assert result.usage.completion_tokens == sum(len(branch.token_ids) for branch in result.outputs)
        for branch in result.outputs:
            reference.check(prompt, wish, branch, LIMIT)
        if wish.prompt_logprobs is None:
            assert result.prompt_logprobs is None
            continue
        assert (result.prompt_token_ids, result.prompt_logprobs[0]) == (prompt, None)
        assert len(result.prompt_logprobs) == len(prompt)
        rows = reference.logits(prompt)
        for row, token_id, entry in zip(rows, prompt[1:], result.prompt_logprobs[1:], strict=False):
            check_entry(row, token_id, entry, wish.prompt_logprobs)


def combine(path: Path, seed: int, requests: int, engines: int, end: int) -> None:
    """One case: so many requests in so many engines, whose knobs and modes are drawn."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    vocabulary = model.config.vocab_size
    backend = make_backend("llguidance", load_tokenizer(path), vocabulary, (end,))
    reference = Reference(model, tokenizer, backend.compile, end)
    draw = Wishes(seed, vocabulary, end, tokenizer(letters.STORY).input_ids)
    prompts = [draw.prompt() for _ in range(requests)]
    wishes = [draw.config() for _ in range(requests)]
    for index in range(engines):
        knobs = KNOBS[(seed * engines + index) % len(KNOBS)]
        mode = MODES[draw.integer(0, len(MODES))]
        config = EngineConfig.from_dict({
            "model": str(path), "device": "cpu", "dtype": "float32",
            "max_single_sequence_length": LIMIT, "max_total_sequence_length": 4096, "max_num_sequence": 32,
            "kv_cache_page_size": 8, **knobs, **mode,
        })  # fmt: skip
        results, preemptions = asyncio.run(served(config, prompts, wishes))
        assert preemptions > 0 or "max_total_sequence_length" not in knobs, "blocks were meant to run out"
        check(reference, prompts, wishes, results)


@pytest.mark.parametrize("seed", range(int(os.environ.get("CASES", "3"))))
def test_whatever_is_asked_for_together_is_what_the_reference_gives(checkpoint: Callable[..., Path], seed: int) -> None:
    """The first three cases have all the knobs between them."""
    architecture = ["llama", "gemma2", "gpt2"][seed % 3]
    layers = {"n_layer": 2} if architecture == "gpt2" else {"num_hidden_layers": 2}
    path = checkpoint(architecture, vocab_size=letters.VOCABULARY, eos_token_id=letters.END, **layers)
    letters.write(path)
    combine(path, seed, requests=50, engines=3, end=letters.END)


def test_so_it_is_with_the_tiny_model() -> None:
    combine(Path(tiny.PATH), seed=2, requests=24, engines=2, end=2)
