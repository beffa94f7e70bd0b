"""Embeddings: those of one transformers forward, however the prompt was computed and whatever else is in the batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from asyncengine import AsyncEngine, Embedding, EngineConfig, GenerationConfig, InvalidRequestError, tiny
from asyncengine.outputs import Pooling
from tests.model.test_parity import COMPILED

pytestmark = pytest.mark.loops("either")

CONFIG: dict[str, Any] = {
    "device": "cpu", "max_total_sequence_length": 4096, "max_num_sequence": 8, "kv_cache_page_size": 16,
    "prefill_chunk_size": 24,
}  # fmt: skip
OTHERS = ("gpt2", "cohere", "deepseek_v3", "gpt_oss")
STORY = (
    "Once upon a time there was a young horse who lived near a quiet lake. The horse liked to pick flowers. "
    "One evening, the horse found a red ball beside the path. Then an old duck came by, and the old duck was sad."
)


def prompts() -> list[list[int]]:
    """One token, one page, several chunks; two share a prefix."""
    generator = torch.Generator().manual_seed(2)
    mixed = [torch.randint(1, 199, (length,), generator=generator).tolist() for length in (1, 16, 25, 90)]
    return [*mixed, [*mixed[-1][:40], 7, 8]]


WAYS: tuple[Pooling, ...] = ("mean", "last")


def reference(model: Any, prompt: list[int], pooling: Pooling) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        hidden = model(torch.tensor([prompt])).last_hidden_state[0].double()
    pooled = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
    return np.asarray((pooled / pooled.norm()).numpy())


@pytest.fixture(scope="module")
def embedded_model() -> Any:
    return AutoModel.from_pretrained(tiny.PATH, dtype=torch.float32)


def story() -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(tiny.PATH)(STORY).input_ids
    return found


@pytest.fixture(scope="module")
def lasting_engine(embedded_model: Any) -> Iterator[AsyncEngine]:
    """Loads once the reference is there: transformers does not load two models at once in two threads."""
    engine = AsyncEngine(EngineConfig("tiny", **CONFIG))
    engine.reload_nowait()
    yield engine
    engine.shutdown_nowait()


@pytest.fixture
async def engine(lasting_engine: AsyncEngine) -> AsyncEngine:
    await lasting_engine.reset()
    return lasting_engine


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", *OTHERS])
@pytest.mark.in_short("deepseek_v3", "cohere", "gemma3_text", "gpt2")
def test_equal_those_of_one_forward(architecture: str, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(architecture)

    async def embedded() -> list[tuple[Pooling, list[Embedding]]]:
        async with AsyncEngine(EngineConfig(str(path), dtype="float32", **CONFIG)) as engine:
            config = engine.complete_engine_config
            compiled = architecture in COMPILED and config is not None and config.attention_backend == "cpu"
            assert config is not None and config.decoder_backend == ("compiled" if compiled else "transformers")
            return [(way, await engine.embed(prompts(), way)) for way in WAYS]

    model = AutoModel.from_pretrained(path, dtype=torch.float32)
    for way, found in asyncio.run(embedded()):
        for prompt, embedding in zip(prompts(), found, strict=True):
            expected = reference(model, prompt, way)
            assert embedding.vector.dtype == np.float32 and embedding.vector.shape == expected.shape
            assert np.abs(embedding.vector - expected).max() < 2e-5


@pytest.mark.parametrize("backend", ["compiled", "transformers"])
async def test_of_the_embedded_model_in_both_ways_of_running_it(backend: Any, embedded_model: Any) -> None:
    async with AsyncEngine(EngineConfig("tiny", decoder_backend=backend, **CONFIG)) as engine:
        for pooling in ("mean", "last"):
            (found,) = await engine.embed([STORY], pooling)  # type: ignore[arg-type]
            assert np.abs(found.vector - reference(embedded_model, story(), pooling)).max() < 2e-5  # type: ignore[arg-type]
            assert found.usage.prompt_tokens == len(story()) > 2 * CONFIG["prefill_chunk_size"]
        assert engine.metrics().counters.generation_tokens == 0
        assert engine.metrics().kv_blocks_used == 0


async def test_share_steps_with_everything_else_and_change_nothing_of_it(
    engine: AsyncEngine, embedded_model: Any
) -> None:
    greedy = GenerationConfig(temperature=0, max_tokens=24, ignore_eos=True)
    alone = await engine.generate("Once upon a time", greedy)
    steps = engine.metrics().counters.steps
    generated, (embedded,), (score,) = await asyncio.gather(
        engine.generate("Once upon a time", greedy), engine.embed([STORY], "mean"), engine.score([STORY])
    )
    assert engine.metrics().counters.steps - steps < 24 + 2 * len(story()) // CONFIG["prefill_chunk_size"]
    assert generated.token_ids == alone.token_ids
    assert len(score.logprobs) == len(story())
    assert np.abs(embedded.vector - reference(embedded_model, story(), "mean")).max() < 2e-5


@pytest.mark.parametrize("backend", ["auto", "transformers"])
@pytest.mark.in_short("auto")
def test_drafts_scores_and_vectors_share_the_chunks_of_a_step(backend: Any, embedded_model: Any) -> None:
    greedy = GenerationConfig(temperature=0, max_tokens=60, ignore_eos=True, prompt_logprobs=1)
    drafts: dict[str, Any] = {"speculative_mode": "ngram", "spec_draft_length": 3}

    async def served(changes: dict[str, Any]) -> tuple[Any, Any, AsyncEngine]:
        async with AsyncEngine(EngineConfig("tiny", **CONFIG, decoder_backend=backend, **changes)) as engine:
            generated, embedded, again = await asyncio.gather(
                engine.generate(STORY, greedy), engine.embed([STORY], "mean"), engine.generate(STORY[::-1], greedy)
            )
            return [generated, again], embedded[0], engine

    async def both() -> None:
        plain, _, _ = await served({})
        drafted, embedded, engine = await served(drafts)
        for result, wanted in zip(drafted, plain, strict=True):
            assert result.token_ids == wanted.token_ids
            entries = zip(result.prompt_logprobs[1:], wanted.prompt_logprobs[1:], strict=True)
            assert all(abs(entry.logprob - like.logprob) < 1e-4 for entry, like in entries)
        assert np.abs(embedded.vector - reference(embedded_model, story(), "mean")).max() < 2e-5
        assert engine.metrics().counters.accepted_draft_tokens > 0

    asyncio.run(both())


async def test_a_last_token_is_embedded_after_a_prefix_hit_and_a_mean_computes_the_prompt_again(
    engine: AsyncEngine, embedded_model: Any
) -> None:
    first, again = [(await engine.embed([STORY], "last"))[0] for _ in range(2)]
    assert first.usage.cached_tokens == 0 < again.usage.cached_tokens
    assert np.abs(again.vector - first.vector).max() < 2e-5
    (mean,) = await engine.embed([STORY], "mean")
    assert mean.usage.cached_tokens == 0
    assert np.abs(mean.vector - reference(embedded_model, story(), "mean")).max() < 2e-5


async def test_a_sleep_in_the_middle_of_a_prompt_counts_no_token_twice(
    engine: AsyncEngine, embedded_model: Any
) -> None:
    prompt = [(i * 37) % 1000 + 10 for i in range(900)]
    embedding = asyncio.ensure_future(engine.embed([prompt], "mean"))
    steps = engine.metrics().counters.steps
    while engine.metrics().counters.steps < steps + 3:
        await engine.abort_request("nobody")  # a step
    await engine.sleep()
    assert not embedding.done()
    await engine.wake()
    (found,) = await embedding
    assert np.abs(found.vector - reference(embedded_model, prompt, "mean")).max() < 5e-5


async def test_vectors_are_cut_and_made_of_length_one_where_that_is_asked_for(engine: AsyncEngine) -> None:
    (whole,) = await engine.embed([STORY], normalize=False)
    (cut,) = await engine.embed([STORY], dimensions=8, normalize=False)
    (short,) = await engine.embed([STORY], dimensions=8)
    assert np.linalg.norm(whole.vector) != pytest.approx(1.0)
    assert np.array_equal(cut.vector, whole.vector[:8])
    assert short.vector.tolist() == pytest.approx((cut.vector / np.linalg.norm(cut.vector)).tolist())


async def test_what_cannot_be_embedded_is_refused_by_name(engine: AsyncEngine) -> None:
    assert await engine.embed([]) == []
    with pytest.raises(InvalidRequestError, match="list of prompts"):
        await engine.embed("a text")
    with pytest.raises(InvalidRequestError, match="pooling is 'max'; allowed: 'mean', 'last'"):
        await engine.embed(["a"], "max")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"dimensions is 0"):
        await engine.embed(["a"], dimensions=0)
    with pytest.raises(InvalidRequestError, match=r"dimensions is 100000; allowed: 1\.\."):
        await engine.embed(["a"], dimensions=100_000)
    with pytest.raises(InvalidRequestError, match="normalize is 1"):
        await engine.embed(["a"], normalize=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="at least one token"):
        await engine.embed(["a", ""])
    assert engine.metrics().kv_blocks_used == 0


async def test_a_checkpoint_says_how_it_pools(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(tiny.PATH / name)
    (tmp_path / "1_Pooling").mkdir()
    says = tmp_path / "1_Pooling" / "config.json"
    says.write_text('{"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": false}')
    async with AsyncEngine(EngineConfig(str(tmp_path), **CONFIG)) as engine:
        (found,), (last,) = await engine.embed([STORY]), await engine.embed([STORY], "last")
        assert np.array_equal(found.vector, last.vector)
        says.write_text('{"pooling_mode_cls_token": true}')
        await engine.reload(EngineConfig(str(tmp_path), **CONFIG))
        with pytest.raises(InvalidRequestError, match="pools by 'cls'"):
            await engine.embed([STORY])
        assert len(await engine.embed([STORY], "mean")) == 1


async def test_hidden_states_take_no_second_copy_of_the_weights(engine: AsyncEngine) -> None:
    before = await engine.debug_call_func_on_all_workers("weight_bytes")
    await engine.embed([STORY])
    assert await engine.debug_call_func_on_all_workers("weight_bytes") == before
