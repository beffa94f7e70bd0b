"""Log-probabilities of the prompt: those of one transformers forward, however the prompt was computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, InvalidRequestError, TokenLogprobs, tiny

pytestmark = pytest.mark.loops("either")

CONFIG: dict[str, Any] = {
    "device": "cpu", "max_total_sequence_length": 4096, "max_num_sequence": 8, "kv_cache_page_size": 16,
    "prefill_chunk_size": 24,
}  # fmt: skip
STORY = (
    "Once upon a time there was a young horse who lived near a quiet lake. The horse liked to pick flowers. "
    "One evening, the horse found a red ball beside the path. Then an old duck came by, and the old duck was sad."
)


@pytest.fixture(scope="module")
def lasting_engine(expected: torch.Tensor) -> Iterator[AsyncEngine]:
    """Loads once the reference is there: transformers does not load two models at once in two threads."""
    engine = AsyncEngine(EngineConfig("tiny", **CONFIG))
    engine.reload_nowait()
    yield engine
    engine.shutdown_nowait()


@pytest.fixture
async def engine(lasting_engine: AsyncEngine) -> AsyncEngine:
    await lasting_engine.reset()
    return lasting_engine


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """(tokens, vocabulary) log-probabilities of the token after each of the story's."""
    return reference(ids())


def ids(text: str = STORY) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(tiny.PATH)(text).input_ids
    return found


def reference(prompt: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), dim=-1)


def check(entries: list[TokenLogprobs | None] | None, prompt: list[int], expected: torch.Tensor, k: int) -> None:
    assert entries is not None
    assert len(entries) == len(prompt)
    assert entries[0] is None
    for row, token_id, entry in zip(expected, prompt[1:], entries[1:], strict=False):
        assert entry is not None
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=2e-4)
        values, tokens = row.topk(k)
        assert len(entry.top_ids) == k
        assert list(entry.top_logprobs) == pytest.approx(values.tolist(), abs=2e-4)
        if k > 1 and (values[:-1] - values[1:]).min() > 1e-3:
            assert list(entry.top_ids) == tokens.tolist()


async def test_equal_those_of_one_forward_whatever_the_chunks(engine: AsyncEngine, expected: torch.Tensor) -> None:
    result = await engine.generate(STORY, GenerationConfig(max_tokens=3, prompt_logprobs=4, temperature=0))
    assert result.prompt_token_ids == ids()
    assert len(ids()) > 2 * CONFIG["prefill_chunk_size"]
    check(result.prompt_logprobs, ids(), expected, 4)
    plain = await engine.generate(STORY, GenerationConfig(max_tokens=3, temperature=0))
    assert plain.token_ids == result.token_ids
    assert plain.prompt_logprobs is None
    assert plain.prompt_token_ids is None


async def test_a_prompt_that_is_cached_is_computed_again(engine: AsyncEngine, expected: torch.Tensor) -> None:
    for k in (0, 3):
        await engine.generate(STORY, GenerationConfig(max_tokens=2))
        hit = await engine.generate(STORY, GenerationConfig(max_tokens=2))
        assert hit.usage.cached_tokens > 0
        scored = await engine.generate(STORY, GenerationConfig(max_tokens=2, prompt_logprobs=k))
        assert scored.usage.cached_tokens == 0
        check(scored.prompt_logprobs, ids(), expected, k)


async def test_preempted_requests_have_each_entry_once(expected: torch.Tensor) -> None:
    config = CONFIG | {"max_total_sequence_length": 160, "max_single_sequence_length": 120}
    wanted = GenerationConfig(max_tokens=40, prompt_logprobs=2, ignore_eos=True, n=2, seed=3)
    async with AsyncEngine(EngineConfig("tiny", **config)) as engine:
        results = await engine.generate_many([STORY] * 4, wanted)
        assert engine.metrics().counters.preemptions > 0
    for result in results:
        check(result.prompt_logprobs, ids(), expected, 2)
        assert [len(branch.token_ids) for branch in result.outputs] == [40, 40]


async def test_a_pause_in_the_middle_of_a_prompt_loses_and_repeats_nothing(engine: AsyncEngine) -> None:
    prompt = [(i * 37) % 1000 + 10 for i in range(900)]
    stream = await engine.add_request(prompt, GenerationConfig(max_tokens=1, prompt_logprobs=0))
    while stream.prompt_logprobs is None or len(stream.prompt_logprobs) < 2:
        await engine.abort_request("nobody")  # a step
    await engine.sleep()
    assert len(stream.prompt_logprobs) < len(prompt), "it was through before it was put to sleep"
    await engine.wake()
    check((await stream).prompt_logprobs, prompt, reference(prompt), 0)


async def test_scored_and_plain_requests_share_steps(engine: AsyncEngine, expected: torch.Tensor) -> None:
    plain = GenerationConfig(temperature=0, max_tokens=12, ignore_eos=True)
    alone = await engine.generate("Once upon a time", plain)
    configs = [plain, plain.replace(prompt_logprobs=1), plain, plain.replace(prompt_logprobs=5)]
    results = await engine.generate_many(["Once upon a time", STORY, "Once upon a time", STORY], configs)
    for index, k in ((1, 1), (3, 5)):
        check(results[index].prompt_logprobs, ids(), expected, k)
    assert results[0].token_ids == results[2].token_ids == alone.token_ids


async def test_more_than_one_step_may_look_at() -> None:
    prompts = [[(i * (7 + p)) % 1000 + 10 for i in range(400)] for p in range(3)]
    async with AsyncEngine(EngineConfig("tiny", **(CONFIG | {"prefill_chunk_size": 1000}))) as engine:
        scores = await engine.score(prompts, top_logprobs=1)
        assert engine.metrics().counters.steps >= 3 * 400 // 256
    for score, prompt in zip(scores, prompts, strict=True):
        check(score.logprobs, prompt, reference(prompt), 1)


async def test_scoring_generates_nothing(engine: AsyncEngine, expected: torch.Tensor) -> None:
    (story, one) = await engine.score([STORY, [5]], top_logprobs=2)
    check(story.logprobs, ids(), expected, 2)
    assert story.token_ids == ids()
    total = sum(row[token].item() for row, token in zip(expected, ids()[1:], strict=False))
    assert math.isclose(story.logprob, total, abs_tol=1e-2)
    assert (one.token_ids, one.logprobs, one.logprob) == ([5], [None], 0.0)
    assert engine.metrics().counters.generation_tokens == 0
    assert engine.metrics().kv_blocks_used == 0


async def test_scoring_refuses_what_generating_refuses(engine: AsyncEngine) -> None:
    assert await engine.score([]) == []
    with pytest.raises(InvalidRequestError, match="list of prompts"):
        await engine.score("a text")
    with pytest.raises(InvalidRequestError, match="prompt_logprobs is 21"):
        await engine.score(["a"], top_logprobs=21)
    with pytest.raises(InvalidRequestError, match="at least one token"):
        await engine.score(["a", ""])
