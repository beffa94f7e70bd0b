"""Whole engines: with drafts, whoever makes them, the output is that without, token for token."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncengine import AsyncEngine, ConfigError, EngineConfig, GenerationConfig, tiny
from asyncengine.model import memory
from asyncengine.model.loader import TransformersLoader
from asyncengine.response_format import Choice, JsonSchema, Regex
from tests.model import checkpoints

LIMITS: dict[str, Any] = {
    "device": "cpu", "max_num_sequence": 16, "kv_cache_page_size": 8, "max_total_sequence_length": 2048,
}  # fmt: skip
SQUEEZED: dict[str, Any] = {
    "prefill_chunk_size": 16, "max_total_sequence_length": 120, "max_single_sequence_length": 112,
}  # fmt: skip
TINY_DRAFT: dict[str, Any] = {"speculative_mode": "small_draft", "additional_models": ["tiny-draft"]}
STORY = "Once upon a time there was a young horse. The horse liked to pick flowers. The horse"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A random checkpoint of an architecture, and one that is like it but for some noise."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(architecture: str) -> tuple[Path, Path]:
        if architecture not in made:
            paths = [tmp_path_factory.mktemp(f"{architecture}-{role}") for role in ("target", "draft")]
            for path in paths:
                checkpoints.write(path, architecture)
            weights = load_file(paths[1] / "model.safetensors")
            noise = torch.Generator().manual_seed(1)
            for weight in weights.values():
                weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=noise)
            save_file(weights, paths[1] / "model.safetensors", metadata={"format": "pt"})
            made[architecture] = paths[0], paths[1]
        return made[architecture]

    return make


def wishes() -> list[tuple[list[int], GenerationConfig]]:
    """Prompts and what is asked of them; of several lengths, some with the same beginning, some that repeat."""
    random = np.random.default_rng(0)
    shared = random.integers(1, 199, 30).tolist()
    repeated = random.integers(1, 199, 6).tolist() * 5
    sampled = GenerationConfig(temperature=0.8, seed=11, max_tokens=12)
    return [
        (shared, GenerationConfig(temperature=0, max_tokens=12)),
        (repeated, GenerationConfig(temperature=0, max_tokens=20, logprobs=True, top_logprobs=3)),
        ([*shared, 5, 6, 7], GenerationConfig(temperature=0, max_tokens=12, n=3, repetition_penalty=1.3)),
        (repeated, sampled.replace(n=3, logprobs=True)),
        (shared[:17], sampled.replace(frequency_penalty=0.8, logit_bias={7: 2.0}, top_p=0.9)),
        ([*repeated, 9], sampled.replace(temperature=0.3, top_k=4, min_tokens=10, stop_token_ids=list(range(20, 60)))),
        (shared[:9], sampled.replace(temperature=0.2, allowed_token_ids=list(range(40)), bad_words=[[3, 4], [8]])),
    ]


async def outputs(config: EngineConfig, asked: list[tuple[Any, GenerationConfig]]) -> tuple[list[Any], AsyncEngine]:
    async with AsyncEngine(config) as engine:
        prompts, configs = [prompt for prompt, _ in asked], [wish for _, wish in asked]
        results = [*await engine.generate_many(prompts, configs), *await engine.generate_many(prompts[:2], configs[:2])]
        metrics = engine.metrics()
        assert metrics.kv_blocks_used == 0
        assert metrics.counters.draft_tokens == sum(result.usage.draft_tokens for result in results)
        assert metrics.counters.accepted_draft_tokens == sum(result.usage.accepted_draft_tokens for result in results)
        return results, metrics.counters  # type: ignore[return-value]


def same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for result, wanted in zip(found, expected, strict=True):
        for branch, other in zip(result.outputs, wanted.outputs, strict=True):
            assert (branch.token_ids, branch.text) == (other.token_ids, other.text)
            assert (branch.finish_reason, branch.stop_reason) == (other.finish_reason, other.stop_reason)
            assert (branch.logprobs is None) == (other.logprobs is None)
            for entry, like in zip(branch.logprobs or [], other.logprobs or [], strict=True):
                assert entry.logprob == pytest.approx(like.logprob, abs=1e-4)
                assert entry.top_ids == like.top_ids


NGRAM: dict[str, Any] = {"speculative_mode": "ngram", "spec_draft_length": 3}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.in_short("llama")
def test_outputs_are_those_without_drafts(
    architecture: str, pair: Callable[[str], tuple[Path, Path]], subtests: pytest.Subtests
) -> None:
    target, draft = pair(architecture)
    plain = EngineConfig(str(target), **LIMITS)
    expected, _ = asyncio.run(outputs(plain, wishes()))
    drafted: dict[str, Any] = {
        "speculative_mode": "small_draft", "additional_models": [str(draft)], "spec_draft_length": 4,
    }  # fmt: skip
    ways = {"draft, squeezed": drafted | SQUEEZED}
    if architecture in ("llama", "mistral"):
        ways |= {"ngram, squeezed": NGRAM | SQUEEZED}
    if architecture == "llama":
        ways |= {"draft, nothing cached": drafted | {"prefix_cache_mode": "disable"}}
    for name, changes in ways.items():
        with subtests.test(name):
            found, counters = asyncio.run(outputs(plain.replace(**changes), wishes()))
            same(found, expected)
            assert counters.accepted_draft_tokens > 0  # type: ignore[attr-defined]
            assert (counters.preemptions > 0) == ("squeezed" in name)  # type: ignore[attr-defined]


@pytest.mark.parametrize("architecture", [pytest.param("qwen3", marks=pytest.mark.long), "gpt_neox"])
@pytest.mark.long
def test_so_it_is_with_other_architectures(
    architecture: str, pair: Callable[[str], tuple[Path, Path]], subtests: pytest.Subtests
) -> None:
    target, draft = pair(architecture)
    asked = wishes()[:4]
    plain = EngineConfig(str(target), **LIMITS)
    expected, _ = asyncio.run(outputs(plain, asked))
    drafted = {"speculative_mode": "small_draft", "additional_models": [str(draft)], "spec_draft_length": 2}
    ways: dict[str, dict[str, Any]] = {"ngram": NGRAM, "draft": drafted}
    for name, changes in ways.items():
        with subtests.test(name):
            found, counters = asyncio.run(outputs(plain.replace(**changes), asked))
            same(found, expected)
            assert counters.accepted_draft_tokens > 0  # type: ignore[attr-defined]


def test_text_grammar_and_stop_strings_are_those_without_drafts(subtests: pytest.Subtests) -> None:
    free = GenerationConfig(temperature=0, max_tokens=44)
    sampled = GenerationConfig(temperature=1.0, seed=5, max_tokens=40)
    schema = JsonSchema({"type": "object", "properties": {"name": {"enum": ["Ada", "Alan"]}, "n": {"type": "integer"}}})
    asked = [
        (STORY, free),
        (STORY, free.replace(stop_strs=["flower", "d the"])),
        (STORY, sampled.replace(n=2, stop_strs=["ng", " a "])),
        (STORY, free.replace(response_format=Regex("( ?[a-e]+){2,9}[.]"))),
        (STORY, sampled.replace(response_format=schema, logprobs=True)),
        (STORY, sampled.replace(response_format=Choice(("a horse", "a horse and a duck")))),
    ]
    plain = EngineConfig("tiny", **LIMITS)
    expected, before = asyncio.run(outputs(plain, asked))
    for name, changes in (
        ("ngram", NGRAM),
        ("draft, reference attention", TINY_DRAFT | {"spec_draft_length": 2, "attention_backend": "torch"}),
        ("draft, adaptive", TINY_DRAFT | {"prefill_chunk_size": 16}),
    ):
        with subtests.test(name):
            found, counters = asyncio.run(outputs(plain.replace(**changes), asked))
            same(found, expected)
            assert counters.accepted_draft_tokens > 0  # type: ignore[attr-defined]
            assert counters.steps < before.steps  # type: ignore[attr-defined]


@pytest.mark.loops("either")
async def test_the_trained_draft_halves_the_steps() -> None:
    questions = ["What is the capital of France?", "What is the opposite of hot?", "Tell me a story about a duck."]
    config = GenerationConfig(temperature=0, max_tokens=120)
    async with AsyncEngine(EngineConfig("tiny", **LIMITS, **TINY_DRAFT, spec_draft_length=5)) as engine:
        tokens = 0
        for question in questions:
            result = await engine.chat([{"role": "user", "content": question}], config)
            tokens += result.usage.completion_tokens
        assert engine.metrics().counters.steps <= 0.5 * tokens


@pytest.mark.loops("either")
async def test_the_same_seeds_agree_at_a_high_temperature_because_drafts_use_the_same_random_numbers() -> None:
    config = EngineConfig(
        "tiny", **LIMITS, speculative_mode="small_draft", additional_models=("tiny",), spec_draft_length=4
    )
    async with AsyncEngine(config) as engine:
        result = await engine.generate(STORY, GenerationConfig(temperature=1.5, seed=1, max_tokens=60, ignore_eos=True))
        assert result.usage.accepted_draft_tokens >= 0.95 * result.usage.draft_tokens > 40


@pytest.mark.loops("either")
async def test_leaving_in_the_middle_frees_everything_and_disturbs_nobody() -> None:
    config = EngineConfig("tiny", **LIMITS, **TINY_DRAFT, spec_draft_length=4)
    wanted = GenerationConfig(temperature=0, max_tokens=80, ignore_eos=True)
    async with AsyncEngine(EngineConfig("tiny", **LIMITS)) as engine:
        expected = await engine.generate(STORY, wanted)
    async with AsyncEngine(config) as engine:
        staying = await engine.add_request(STORY, wanted)
        for after in range(1, 8):
            stream = await engine.add_request(STORY, wanted.replace(n=2))
            seen = 0
            async for output in stream:
                seen += len(output.token_ids)
                if seen >= after:
                    break
            await engine.abort_request(stream.request_id)  # it resolves once the blocks are free
        assert (await staying).token_ids == expected.token_ids
        assert engine.metrics().kv_blocks_used == 0


@pytest.mark.loops("either")
async def test_a_sleep_and_new_weights_leave_drafts_right() -> None:
    wanted = GenerationConfig(temperature=0, max_tokens=40, ignore_eos=True)
    async with AsyncEngine(EngineConfig("tiny", **LIMITS)) as engine:
        expected = await engine.generate(STORY, wanted)
    async with AsyncEngine(EngineConfig("tiny", **LIMITS, **TINY_DRAFT, spec_draft_length=4)) as engine:
        before = await engine.generate(STORY, wanted)
        await engine.sleep()
        await engine.wake()
        after = await engine.generate(STORY, wanted)
        await engine.pause()
        await engine.update_weights({})
        await engine.resume()
        again = await engine.generate(STORY, wanted)
    assert before.token_ids == after.token_ids == again.token_ids == expected.token_ids
    counts = {result.usage.accepted_draft_tokens for result in (before, after, again)}
    assert len(counts) == 1 and counts.pop() > 10


@pytest.mark.loops("either")
async def test_new_weights_that_the_draft_model_does_not_know_are_those_that_count() -> None:
    wanted = GenerationConfig(temperature=0, max_tokens=40, ignore_eos=True)
    old = load_file(tiny.PATH / "model.safetensors")
    noise = torch.Generator().manual_seed(2)
    new = {
        name: weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=noise)
        for name, weight in old.items()
        if weight.dim() > 1
    }
    found = []
    for changes in ({}, TINY_DRAFT | {"spec_draft_length": 4}):
        async with AsyncEngine(EngineConfig("tiny", **LIMITS, **changes)) as engine:
            before = await engine.generate(STORY, wanted)
            await engine.update_weights(new)
            found.append((before, await engine.generate(STORY, wanted)))
    (plain_before, plain), (drafted_before, drafted) = found
    assert plain.token_ids == drafted.token_ids != plain_before.token_ids == drafted_before.token_ids
    assert drafted.usage.accepted_draft_tokens < drafted_before.usage.accepted_draft_tokens


@pytest.mark.loops("either")
async def test_a_cached_prompt_keeps_its_drafts(pair: Callable[[str], tuple[Path, Path]]) -> None:
    wanted = GenerationConfig(temperature=0, max_tokens=40, ignore_eos=True)
    async with AsyncEngine(EngineConfig("tiny", **LIMITS, **TINY_DRAFT, spec_draft_length=4)) as engine:
        first = await engine.generate(STORY, wanted)
        second = await engine.generate(STORY, wanted)
    assert second.usage.cached_tokens > 0
    assert second.token_ids == first.token_ids
    assert second.usage.accepted_draft_tokens == first.usage.accepted_draft_tokens


@pytest.mark.loops("either")
async def test_another_vocabulary_is_refused_before_the_old_model_is_let_go(
    pair: Callable[[str], tuple[Path, Path]],
) -> None:
    _, other = pair("llama")
    async with AsyncEngine(EngineConfig("tiny", **LIMITS)) as engine:
        config = EngineConfig("tiny", **LIMITS, speculative_mode="small_draft", additional_models=(str(other),))
        with pytest.raises(ConfigError, match=r"vocabulary has 199 tokens; the model's has 1024"):
            await engine.reload(config)
        assert (await engine.generate("Hello", GenerationConfig(max_tokens=3))).usage.completion_tokens <= 3


def test_a_tokenizer_with_other_tokens_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny.DRAFT_PATH, tmp_path, dirs_exist_ok=True)
    config = EngineConfig("tiny", **LIMITS, speculative_mode="small_draft", additional_models=(str(tmp_path),))
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    file.write_text(json.dumps(tokenizer))
    TransformersLoader().check(config, None)  # written otherwise, the same tokens
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="whose tokenizer has other tokens than the model's"):
        TransformersLoader().check(config, None)


def test_a_shorter_draft_model_shortens_sequences_or_is_refused(tmp_path: Path) -> None:
    draft = checkpoints.write(tmp_path / "draft", "llama", max_position_embeddings=64)
    target = checkpoints.write(tmp_path / "target", "llama")
    config = EngineConfig(str(target), **LIMITS, speculative_mode="small_draft", additional_models=(str(draft),))
    loader = TransformersLoader()
    loaded = loader.load(loader.check(config, None))
    loaded.model.close()
    assert loaded.limits.max_single_sequence_length == 64
    with pytest.raises(ConfigError, match=r"max_single_sequence_length is 65; .*draft model.* allows 1..64"):
        loader.check(config.replace(max_single_sequence_length=65), None)


def test_the_draft_models_blocks_count_in_the_capacity(
    pair: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = pair("llama")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 300 << 20)
    config = EngineConfig(
        str(target), device="cpu", kv_cache_page_size=8, max_num_sequence=256, gpu_memory_utilization=0.01
    )
    loader = TransformersLoader()
    found = []
    for changes in ({}, {"speculative_mode": "small_draft", "additional_models": [str(target)]}):
        loaded = loader.load(loader.check(config.replace(**changes), None))
        loaded.model.close()
        found.append(loaded)
    assert found[1].limits.num_blocks == found[0].limits.num_blocks // 2
    weights = found[1].memory_bytes - found[0].memory_bytes
    assert weights > 100_000  # the KV caches take the same, the weights twice as much


def test_adaptive_drafts_stop_where_the_batch_is_large() -> None:
    wanted = GenerationConfig(temperature=1.0, seed=1, max_tokens=16, ignore_eos=True)
    limits = LIMITS | {"max_num_sequence": 64, "max_total_sequence_length": 8192}

    async def drafted() -> tuple[int, int]:
        async with AsyncEngine(EngineConfig("tiny", **limits, **TINY_DRAFT)) as engine:
            alone = await engine.generate(STORY, wanted)
            many = await engine.generate_many([STORY] * 64, wanted)
        return alone.usage.draft_tokens, sum(result.usage.draft_tokens for result in many)

    alone, many = asyncio.run(drafted())
    assert alone > 5
    assert many / 64 < 0.2 * alone
