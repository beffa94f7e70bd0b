"""Whole engines with heads that draft: the output is that without, token for token, and a head that knows something
saves steps.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.model.draft_heads.eagle import EagleHead
from asyncengine.response_format import Regex
from tests.model import checkpoints
from tests.model.draft_heads import eagle_heads, mtp_heads
from tests.speculation.test_engine import LIMITS, SQUEEZED, STORY, outputs, same, wishes

TINY_HEAD: dict[str, Any] = {"speculative_mode": "eagle3", "additional_models": ["tiny-eagle3"]}
GREEDY = GenerationConfig(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.mark.parametrize("mode", ["eagle3", "mtp"])
@pytest.mark.in_short("mtp")
def test_outputs_are_those_without_drafts(mode: str, tmp_path: Path) -> None:
    if mode == "mtp":
        target, models = mtp_heads.write(tmp_path, "glm4_moe", "deepseek"), []
    else:
        target = checkpoints.write(tmp_path / "target", "llama")
        models = [str(eagle_heads.write(tmp_path / "head", "authors", eagle_heads.weights()))]
    plain = EngineConfig(str(target), **LIMITS)
    expected, _ = asyncio.run(outputs(plain, wishes()))
    drafted = plain.replace(speculative_mode=mode, additional_models=models, spec_draft_length=3, **SQUEEZED)
    found, counters = asyncio.run(outputs(drafted, wishes()))
    same(found, expected)
    assert counters.draft_tokens > 60  # type: ignore[attr-defined]
    assert counters.preemptions > 0  # type: ignore[attr-defined]


def test_text_is_that_without_drafts_in_fewer_steps(subtests: pytest.Subtests) -> None:
    free = GenerationConfig(temperature=0, max_tokens=44)
    asked = [
        (STORY, free.replace(stop_strs=["d the"])),
        (STORY, GenerationConfig(temperature=1.0, seed=5, max_tokens=30, n=2)),
        (STORY, free.replace(response_format=Regex("( ?[a-e]+){2,9}[.]"))),
        (STORY[:40], free.replace(allowed_token_ids=[5])),
    ]
    plain = EngineConfig("tiny", **LIMITS)
    expected, before = asyncio.run(outputs(plain, asked))
    for name, changes in (
        ("compiled", {"prefill_chunk_size": 16}),
        ("modules", {"decoder_backend": "transformers", "spec_draft_length": 3}),
    ):
        with subtests.test(name):
            found, counters = asyncio.run(outputs(plain.replace(**TINY_HEAD | changes), asked))
            same(found, expected)
            assert counters.accepted_draft_tokens > 20  # type: ignore[attr-defined]
            assert counters.steps < before.steps  # type: ignore[attr-defined]


@pytest.mark.loops("either")
async def test_a_trained_head_saves_half_of_the_steps_also_behind_a_cached_prompt_and_a_sleep() -> None:
    async with AsyncEngine(EngineConfig("tiny", **LIMITS)) as engine:
        expected = await engine.generate(STORY, GREEDY)
    async with AsyncEngine(EngineConfig("tiny", **LIMITS, **TINY_HEAD, spec_draft_length=3)) as engine:
        results = [await engine.generate(STORY, GREEDY)]
        assert engine.metrics().counters.steps <= 0.5 * len(results[0].token_ids)
        results.append(await engine.generate(STORY, GREEDY))
        await engine.sleep()
        await engine.wake()
        results.append(await engine.generate(STORY, GREEDY))
    assert results[1].usage.cached_tokens > 0
    assert all(result.token_ids == expected.token_ids for result in results)
    kept = [result.usage.accepted_draft_tokens for result in results]
    assert kept[0] == kept[2] and kept[1] >= 0.8 * kept[0]


@pytest.mark.loops("either")
@pytest.mark.parametrize("decoder", ["auto", "transformers"])
async def test_a_head_shares_what_a_model_has_packed_in_few_bits(decoder: str) -> None:
    config = EngineConfig("tiny", **LIMITS, **TINY_HEAD, quantization="int8", spec_draft_length=3)
    async with AsyncEngine(config.replace(decoder_backend=decoder)) as engine:
        result = await engine.generate(STORY, GREEDY)
    assert result.usage.accepted_draft_tokens > 10


@pytest.mark.loops("either")
async def test_leaving_in_the_middle_disturbs_nobody() -> None:
    async with AsyncEngine(EngineConfig("tiny", **LIMITS)) as engine:
        expected = await engine.generate(STORY, GREEDY)
    async with AsyncEngine(EngineConfig("tiny", **LIMITS, **TINY_HEAD, spec_draft_length=3)) as engine:
        staying = await engine.add_request(STORY, GREEDY)
        for after in range(1, 6):
            stream = await engine.add_request(STORY, GREEDY.replace(n=2))
            seen = 0
            async for output in stream:
                seen += len(output.token_ids)
                if seen >= after:
                    break
            await engine.abort_request(stream.request_id)
        assert len(await engine.embed([STORY])) == 1
        assert (await staying).token_ids == expected.token_ids
        assert engine.metrics().kv_blocks_used == 0


@pytest.mark.loops("either")
async def test_a_head_that_fails_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncEngine(EngineConfig("tiny", **LIMITS, **TINY_HEAD, spec_draft_length=3)) as engine:
        expected = await engine.generate(STORY, GREEDY)

        def broken(self: EagleHead, hidden: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("no memory for the head")

        monkeypatch.setattr(EagleHead, "enter", broken)
        found = await engine.generate(STORY, GREEDY)
        assert found.token_ids == expected.token_ids
        assert found.usage.draft_tokens == 0 < expected.usage.draft_tokens
        assert any("no memory for the head" in note for note in engine.health().notes)


@pytest.mark.loops("either")
async def test_new_weights_that_the_head_does_not_know_are_those_that_count() -> None:
    from safetensors.torch import load_file

    from asyncengine import tiny

    noise = torch.Generator().manual_seed(2)
    new = {
        name: weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=noise)
        for name, weight in load_file(tiny.PATH / "model.safetensors").items()
        if weight.dim() > 1
    }
    found = []
    for changes in ({}, TINY_HEAD | {"spec_draft_length": 3}):
        async with AsyncEngine(EngineConfig("tiny", **LIMITS, **changes)) as engine:
            await engine.update_weights(new)
            found.append(await engine.generate(STORY, GREEDY))
    assert found[0].token_ids == found[1].token_ids
    assert found[1].usage.draft_tokens > 0


@pytest.mark.loops("either")
@pytest.mark.long
async def test_a_model_with_recurrent_layers_says_the_same_with_its_own_head(tmp_path: Path) -> None:
    """Over few tokens, so that some of a random head's guesses are right; from the prefix cache, too."""
    path = mtp_heads.write(tmp_path, "qwen3_5", "qwen", vocab_size=8)
    prompts = [[1, 2, 3, 4] * 6, [5, 6, 7, 1, 1, 2], [3] * 17]
    wishes = [
        GenerationConfig(temperature=0, max_tokens=20, ignore_eos=True),
        GenerationConfig(temperature=1.0, seed=3, n=2, max_tokens=20, ignore_eos=True),
        GenerationConfig(temperature=0, max_tokens=20, stop_token_ids=(6,), ignore_eos=True),
    ]
    found = []
    for mode in ("disable", "mtp"):
        config = EngineConfig(
            str(path), device="cpu", dtype="float32", speculative_mode=mode, max_single_sequence_length=96,
            kv_cache_page_size=4, prefix_cache_mode="radix", spec_draft_length=3 if mode == "mtp" else 0,
        )  # fmt: skip
        async with AsyncEngine(config) as engine:
            turns = [await engine.generate_many(prompts, wishes)]
            longer = [prompt + list(result.token_ids) + [2] for prompt, result in zip(prompts, turns[0], strict=True)]
            turns.append(await engine.generate_many(longer, wishes))
            found.append([[branch.token_ids for branch in result.outputs] for turn in turns for result in turn])
            if mode == "mtp":
                counters = engine.metrics().counters
                assert 0 < counters.accepted_draft_tokens < counters.draft_tokens
                assert any(result.usage.cached_tokens for result in turns[1])
    assert found[0] == found[1]
