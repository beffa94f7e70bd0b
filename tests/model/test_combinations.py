"""Random combinations of everything a request may ask for, in four engines, against the scalar reference."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, LogitsRow, tiny
from asyncengine.grammar.select import make_backend
from asyncengine.model.tokenizer import load_tokenizer
from asyncengine.response_format import Choice, EbnfGrammar, JsonSchema, Regex
from tests.model.scalar_reference import Reference, check_logprobs

REQUESTS = 24
STORY = (
    "Once upon a time there was a young horse who lived near a quiet lake. The horse liked to pick flowers. "
    "One evening, the horse found a red ball beside the path."
)
FORMATS = [
    Choice(("a horse", "a duck", "a horse and a duck")),
    Regex("( ?[a-e]+){2,6}[.]"),
    JsonSchema({"type": "array", "items": {"enum": [1, 22, "x"]}, "minItems": 1, "maxItems": 4}),
    EbnfGrammar('start: pair ("," pair)*\npair: "(" /[0-9]+/ ")"'),
]
ENGINES: list[dict[str, Any]] = [
    {},
    {"prefill_chunk_size": 16, "max_total_sequence_length": 104, "max_single_sequence_length": 104},
    {"prefill_mode": "chunked", "prefix_cache_mode": "disable", "max_num_sequence": 3},
    {"speculative_mode": "small_draft", "additional_models": ["tiny-draft"], "spec_draft_length": 3},
]


def push(logits: torch.Tensor, row: LogitsRow) -> None:
    logits[(17 * len(row.token_ids) + len(row.prompt_token_ids)) % len(logits)] += 2.0
    logits[row.token_ids[-1:].tolist()] -= 1.0


def draw(generator: np.random.Generator) -> GenerationConfig:
    """One request's wishes."""

    def sometimes(share: float, value: Any, otherwise: Any = None) -> Any:
        return value if generator.random() < share else otherwise

    def token_ids(count: int) -> list[int]:
        found: list[int] = generator.integers(6, 1024, count).tolist()
        return found

    max_tokens = int(generator.integers(1, 30))
    format_ = sometimes(0.5, FORMATS[int(generator.integers(len(FORMATS)))])
    logprobs = generator.random() < 0.4
    return GenerationConfig(
        n=int(generator.integers(1, 4)),
        temperature=[0.0, 0.7, 1.0, 1.6][int(generator.integers(4))],
        top_k=sometimes(0.3, int(generator.integers(1, 40))),
        top_p=sometimes(0.3, 0.9),
        min_p=sometimes(0.2, 0.02),
        frequency_penalty=sometimes(0.3, 0.6),
        presence_penalty=sometimes(0.3, 0.5),
        repetition_penalty=sometimes(0.3, 1.2),
        logprobs=logprobs,
        top_logprobs=int(generator.integers(0, 5)) if logprobs else 0,
        logit_bias=sometimes(0.3, dict.fromkeys(token_ids(3), 3.0)),
        max_tokens=max_tokens,
        min_tokens=sometimes(0.3, int(generator.integers(0, max_tokens + 1)), 0),
        seed=int(generator.integers(0, 2**62)),
        stop_strs=sometimes(0.4, [" a", "22", "he", "d ."], []),
        stop_token_ids=sometimes(0.3, token_ids(20), []),
        ignore_eos=generator.random() < 0.5,
        response_format=format_,
        allowed_token_ids=None if format_ else sometimes(0.2, [2, *token_ids(300)]),
        bad_words=sometimes(0.3, [[token] for token in token_ids(3)] + [token_ids(2)], []) if not format_ else [],
        logits_processors=sometimes(0.3, [push], []),
        prompt_logprobs=sometimes(0.3, int(generator.integers(0, 4))),
    )


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_asked_for_together_is_what_the_reference_gives(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    model = AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32)
    backend = make_backend("llguidance", load_tokenizer(tiny.PATH), 1024, (2,))
    reference = Reference(model, tokenizer, backend.compile)
    whole = tokenizer(STORY).input_ids
    prompts = [whole[: int(generator.integers(1, len(whole) + 1))] for _ in range(REQUESTS)]
    configs = [draw(generator) for _ in range(REQUESTS)]
    assert any(config.response_format and config.logits_processors for config in configs)

    async def generate(config: dict[str, Any]) -> tuple[list[Any], int]:
        async with AsyncEngine(EngineConfig("tiny", device="cpu", kv_cache_page_size=8, **config)) as engine:
            results = await engine.generate_many(prompts, configs)
            assert engine.metrics().kv_blocks_used == 0
            return results, engine.metrics().counters.preemptions

    with torch.inference_mode():
        expected = {len(p): model(torch.tensor([p])).logits[0].double().numpy() for p in prompts}
    for config in ENGINES:
        limits = {"max_total_sequence_length": 4096, "max_num_sequence": 16} | config
        results, preemptions = asyncio.run(generate(limits))
        assert (preemptions > 0) == ("max_single_sequence_length" in config)
        for prompt, wanted, result in zip(prompts, configs, results, strict=True):
            assert wanted.seed is not None and wanted.max_tokens is not None
            assert len(result.outputs) == wanted.n
            for branch in result.outputs:
                reference.check(prompt, wanted, branch, wanted.seed, wanted.max_tokens)
            if wanted.prompt_logprobs is not None:
                entries = result.prompt_logprobs
                assert len(entries) == len(prompt)
                for row, token_id, entry in zip(expected[len(prompt)], prompt[1:], entries[1:], strict=False):
                    check_logprobs(row, token_id, entry, wanted.prompt_logprobs)
