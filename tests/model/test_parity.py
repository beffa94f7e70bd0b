"""Contract 17: greedy float32 output equals transformers' `generate`, token for token, with everything switched on."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import uvloop

from asyncengine import AsyncEngine, EngineConfig, EngineMetrics, GenerationConfig, RequestResult
from tests.model.checkpoints import ARCHITECTURES, RECURRENT
from tests.model.reference import Reference

NEW_TOKENS = 12
COMPILED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "olmo3", "granite", "smollm3",
    "gpt2", "gpt_neox", "cohere", "cohere2", "exaone4", "starcoder2", "opt", "glm4", "phi", "mixtral", "qwen3_moe",
    "gpt_oss", "qwen2_moe", "glm4_moe",
)  # fmt: skip
BESIDE = ("qwen2_moe", "glm4_moe")
"""Experts that have an MLP beside them."""
AS_MODULES = (
    "llama", "gemma2", "gpt2", "cohere", "mixtral", "gpt_oss",
)  # fmt: skip
"""Of those, the ones that run as transformers' modules in short: they have all kinds of attention and experts."""
LIKE_OTHERS = ("qwen3_5_moe", "falcon_mamba", "bamba")
"""Those whose layers are all among those of others here."""
BRANCHES, LONGEST = 3, 4  # of the prompts below: the one that is answered twice, and the longest
GREEDY = GenerationConfig(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
LONG = pytest.mark.long


NEEDED = {
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox",
    "olmo2", "granite", "cohere", "starcoder2", "gpt_oss",
}  # fmt: skip


def test_covers_what_was_promised() -> None:
    assert set(ARCHITECTURES) >= NEEDED
    assert not set(ARCHITECTURES) & set(RECURRENT)
    window = ARCHITECTURES["mistral"][1]["sliding_window"]
    assert window < len(prompts()[LONGEST])


def prompts() -> list[list[int]]:
    """Mixed lengths, from one token to several chunks; some share a prefix of whole pages and a bit."""
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 2, 16, 33, 70)
    mixed = [torch.randint(1, 199, (length,), generator=generator).tolist() for length in lengths]
    prefix = mixed[-1][:39]
    return [*mixed, [*prefix, 5, 6, 7], [*prefix, 5, 6, 8, 9]]


def verified(path: Path, results: Sequence[RequestResult]) -> list[list[int]]:
    """The tokens of the results, each of which is transformers' own."""
    reference = Reference(path)
    for index, (prompt, result) in enumerate(zip(prompts(), results, strict=True)):
        assert len(result.token_ids) == NEW_TOKENS
        assert result.token_ids == reference.after_each(prompt, result.token_ids), f"prompt {index}"
    assert results[LONGEST].token_ids[:4] == reference.generated(prompts()[LONGEST], 4)
    return [result.token_ids for result in results]


@pytest.fixture(scope="module")
def references() -> dict[str, list[list[int]]]:
    return {}


@pytest.mark.parametrize(
    ("architecture", "backend"),
    # Those that run compiled on one back end run as transformers' modules on the other; all others are modules anyway.
    [
        *(
            pytest.param(name, "cpu", marks=LONG if name in LIKE_OTHERS else ())
            for name in (*ARCHITECTURES, *RECURRENT, *BESIDE)
        ),
        *(pytest.param(name, "torch", marks=() if name in AS_MODULES else LONG) for name in COMPILED),
    ],
)
def test_greedy_equals_transformers(
    architecture: str,
    backend: str,
    checkpoint: Callable[..., Path],
    references: dict[str, list[list[int]]],
) -> None:
    path = checkpoint(architecture)
    config = EngineConfig(
        str(path),
        dtype="float32",
        device="cpu",
        attention_backend=backend,  # type: ignore[arg-type]
        prefill_chunk_size=32,
        kv_cache_page_size=16,
        max_num_sequence=12,
        max_total_sequence_length=144,  # the requests below need more than twice as much: some are preempted
    )

    async def serve() -> tuple[list[RequestResult], list[RequestResult], EngineMetrics]:
        async with AsyncEngine(config) as engine:
            complete = engine.complete_engine_config
            assert complete is not None
            compiled = backend == "cpu" and architecture in COMPILED
            assert complete.decoder_backend == ("compiled" if compiled else "transformers")
            configs = [GREEDY.replace(n=2) if index == BRANCHES else GREEDY for index in range(len(prompts()))]
            results = await engine.generate_many(prompts(), configs)
            again = await engine.generate_many(prompts()[-2:], GREEDY.replace(max_tokens=4))
            return results, again, engine.metrics()

    # What is tested is the model, not the loop: each back end gets one of the two.
    results, again, metrics = (asyncio if backend == "cpu" else uvloop).run(serve())
    if architecture not in references:
        references[architecture] = verified(path, results)
    expected = references[architecture]
    for index, (result, tokens) in enumerate(zip(results, expected, strict=True)):
        for branch in result.outputs:
            assert branch.token_ids == tokens, f"prompt {index}, branch {branch.index}"
    assert [result.token_ids for result in again] == [tokens[:4] for tokens in expected[-2:]]
    assert len(results[BRANCHES].outputs) == 2
    assert metrics.counters.preemptions > 0
    assert metrics.counters.prefix_cache_hits > 0
    assert all(result.usage.cached_tokens > 0 for result in again)
