"""Guesses for models with recurrent layers: tokens are transformers' own, whatever was guessed and taken back.

Over six tokens, a text repeats itself now and then, and another model guesses right by chance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncengine import AsyncEngine, ConfigError, EngineConfig, GenerationConfig, RequestOptions
from asyncengine.metrics import Counters
from asyncengine.model import memory
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.memory import StateBudget
from tests.model.reference import reference

pytestmark = pytest.mark.loops("either")
VOCABULARY = 6
GREEDY = GenerationConfig(temperature=0, max_tokens=40, ignore_eos=True)
CHANGES: dict[str, dict[str, Any]] = {"mamba": {"seed": 3, "tie_word_embeddings": False}}  # else it repeats a token
DRAW = np.random.default_rng(0)
PROMPTS = [DRAW.integers(0, VOCABULARY, length).tolist() for length in (37, 24, 5)]

Checkpoint = Callable[..., Path]


def config_of(path: Path, mode: Any, checkpoint: Checkpoint, **changes: Any) -> EngineConfig:
    drafts = (str(checkpoint("llama", vocab_size=VOCABULARY)),) if mode == "small_draft" else ()
    return EngineConfig(
        str(path), device="cpu", dtype="float32", max_num_sequence=4, max_total_sequence_length=512,
        kv_cache_page_size=8, prefill_chunk_size=32, speculative_mode=mode, additional_models=drafts,
    ).replace(**({"spec_draft_length": 4} if mode != "disable" else {}), **changes)  # fmt: skip


def small(checkpoint: Checkpoint, architecture: str) -> Path:
    return checkpoint(architecture, vocab_size=VOCABULARY, **CHANGES.get(architecture, {}))


async def said(engine: AsyncEngine, path: Path, prompts: Sequence[list[int]], wish: Any = GREEDY) -> list[list[int]]:
    """What is said to prompts at once, which is what transformers says."""
    results = await asyncio.gather(*(engine.generate(prompt, wish) for prompt in prompts))
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == reference(path).after_each(prompt, result.token_ids)
    return [result.token_ids for result in results]


def some_were_right(counters: Counters) -> None:
    assert 0 < counters.accepted_draft_tokens < counters.draft_tokens


@pytest.mark.parametrize(
    ("architecture", "mode"),
    [
        *((architecture, "ngram") for architecture in ("qwen3_5", "lfm2", "mamba2", "mamba")),
        ("mamba2", "small_draft"),
        pytest.param("granitemoehybrid", "ngram", marks=pytest.mark.long),
        pytest.param("qwen3_5", "small_draft", marks=pytest.mark.long),
    ],
)
@pytest.mark.in_short("qwen3_5-ngram", "lfm2-ngram")
async def test_greedy_is_that_of_transformers(checkpoint: Checkpoint, architecture: str, mode: Any) -> None:
    """Across ends of blocks, with preemptions, and in a turn that goes on behind a state that was kept."""
    path = small(checkpoint, architecture)
    async with AsyncEngine(config_of(path, mode, checkpoint, max_total_sequence_length=112)) as engine:
        wish = GREEDY.replace(max_tokens=27)
        await said(engine, path, PROMPTS, wish)
        assert engine.metrics().counters.preemptions
        some_were_right(engine.metrics().counters)
        (answer,) = await said(engine, path, PROMPTS[2:], wish)
        turn = [*PROMPTS[2], *answer, 3]
        again = await engine.generate(turn, wish)
        assert again.usage.cached_tokens == 24  # of 5 + 27
        assert again.token_ids == reference(path).after_each(turn, again.token_ids)
        assert engine.metrics().kv_blocks_used == 0


async def test_branches_samples_and_grammars_are_those_without_guesses(checkpoint: Checkpoint) -> None:
    path = small(checkpoint, "qwen3_5")
    wishes = [
        GREEDY.replace(n=3, temperature=1, seed=3),
        GREEDY.replace(repetition_penalty=1.2),
        GREEDY.replace(stop_token_ids=[4], ignore_eos=False),
        GREEDY.replace(max_tokens=23),
        GREEDY.replace(allowed_token_ids=[1, 2, 3]),
    ]
    found = []
    for mode in ("disable", "ngram"):
        async with AsyncEngine(config_of(path, mode, checkpoint)) as engine:
            wanted = (engine.generate(PROMPTS[at % 3], wish) for at, wish in enumerate(wishes))
            both = await asyncio.gather(*wanted, engine.score(PROMPTS), engine.embed(PROMPTS))
            *results, scores, vectors = both
            tokens = [[branch.token_ids for branch in result.outputs] for result in results]
            found.append((tokens, [score.logprob for score in scores], [vector.vector for vector in vectors]))
            counters = engine.metrics().counters
    some_were_right(counters)
    assert found[0][0] == found[1][0]
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert np.allclose(found[1][2], found[0][2], atol=1e-5)


async def test_an_abort_a_sleep_and_new_weights_leave_no_state_that_is_wrong(checkpoint: Checkpoint) -> None:
    path = small(checkpoint, "lfm2")
    weights = dict(reference(path).model.named_parameters())
    async with AsyncEngine(config_of(path, "ngram", checkpoint)) as engine:
        stream = await engine.add_request(PROMPTS[1], GREEDY.replace(max_tokens=200), RequestOptions())
        async for output in stream:
            if output.token_ids:
                stream.abort()
        await said(engine, path, PROMPTS)
        await engine.sleep()
        await engine.wake()
        await said(engine, path, PROMPTS)
        await engine.update_weights({name: weight.detach() for name, weight in weights.items()})
        await said(engine, path, PROMPTS)
        some_were_right(engine.metrics().counters)


async def test_where_few_states_can_be_set_aside_fewer_tokens_are_guessed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, budget = small(checkpoint, "mamba2"), memory.state_budget

    def scarce(**given: Any) -> StateBudget:
        found = budget(**given)
        assert found.drafted == 16
        return StateBudget(found.sequences, 0, 2, found.nbytes)

    monkeypatch.setattr(memory, "state_budget", scarce)
    async with AsyncEngine(config_of(path, "ngram", checkpoint)) as engine:
        before = engine.metrics().counters.steps
        await said(engine, path, PROMPTS)
        counters = engine.metrics().counters
        some_were_right(counters)
        assert counters.draft_tokens <= 2 * (counters.steps - before)


def test_a_draft_model_with_recurrent_layers_is_refused_before_a_load(checkpoint: Checkpoint) -> None:
    recurrent, llama = checkpoint("lfm2"), checkpoint("llama")
    for model in (recurrent, llama):
        config = EngineConfig(
            str(model), device="cpu", speculative_mode="small_draft", additional_models=(str(recurrent),)
        )
        with pytest.raises(
            ConfigError, match="from whose states guesses cannot be taken back; name one with attention"
        ):
            TransformersLoader().check(config, None)
