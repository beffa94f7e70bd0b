"""Contract 13 to 18 on the embedded model: what one request gets does not depend on anything but itself."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, tiny

pytestmark = pytest.mark.loops("either")

TINY = EngineConfig("tiny", device="cpu", max_total_sequence_length=2048, max_num_sequence=16, kv_cache_page_size=16)
STORY = "Once upon a time"


@pytest.fixture
async def engine() -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(TINY) as engine:
        yield engine


def sampled(seed: int, **changes: Any) -> GenerationConfig:
    return GenerationConfig(temperature=1.0, seed=seed, max_tokens=40, ignore_eos=True).replace(**changes)


async def test_text_is_what_the_tokenizer_makes_of_the_tokens(engine: AsyncEngine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    configs = [sampled(seed, temperature=2.5, max_tokens=80) for seed in range(10)]
    for result in await engine.generate_many([STORY] * 10, configs):
        text = tokenizer.decode(result.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert result.text == text


async def test_prompts_are_encoded_as_transformers_does(engine: AsyncEngine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    result = await engine.generate(STORY, GenerationConfig(max_tokens=1))
    assert result.usage.prompt_tokens == len(tokenizer(STORY).input_ids)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    chat = await engine.chat(messages, GenerationConfig(temperature=0, max_tokens=32))
    assert chat.usage.prompt_tokens == len(ids)
    assert chat.finish_reason == "stop"
    assert "Paris" in chat.text


async def test_seeded_tokens_do_not_depend_on_the_batch(engine: AsyncEngine) -> None:
    alone = [(await engine.generate(STORY, sampled(seed))).token_ids for seed in range(8)]
    configs = [sampled(seed) for seed in range(8)]
    together = await engine.generate_many([STORY] * 8, configs)
    assert [result.token_ids for result in together] == alone
    assert len({tuple(tokens) for tokens in alone}) == 8


async def test_branches_draw_from_consecutive_seeds(engine: AsyncEngine) -> None:
    branches = (await engine.generate(STORY, sampled(5, n=3))).outputs
    for index, branch in enumerate(branches):
        assert branch.token_ids == (await engine.generate(STORY, sampled(5 + index))).token_ids


async def test_preemption_does_not_change_what_is_drawn() -> None:
    configs = [sampled(seed, max_tokens=60, frequency_penalty=0.5, n=2) for seed in range(5)]
    async with AsyncEngine(TINY) as engine:
        undisturbed = await engine.generate_many([STORY] * 5, configs)
        assert engine.metrics().counters.preemptions == 0
    async with AsyncEngine(TINY.replace(max_total_sequence_length=192, prefill_chunk_size=16)) as engine:
        squeezed = await engine.generate_many([STORY] * 5, configs)
        assert engine.metrics().counters.preemptions > 0
    for a, b in zip(undisturbed, squeezed, strict=True):
        assert [branch.token_ids for branch in a.outputs] == [branch.token_ids for branch in b.outputs]


async def test_logprobs_are_those_of_the_model(engine: AsyncEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    config = sampled(3, temperature=0.7, top_k=5, logprobs=True, top_logprobs=4, logit_bias={7: 5.0})
    result = await engine.generate(STORY, config)
    prompt = tokenizer(STORY).input_ids
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + result.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.float(), dim=-1)
    assert result.outputs[0].logprobs is not None
    for row, token_id, logprob in zip(expected, result.token_ids, result.outputs[0].logprobs, strict=True):
        assert logprob.logprob == pytest.approx(row[token_id].item(), abs=1e-3)
        values, ids = row.topk(4)
        assert list(logprob.top_ids) == ids.tolist()
        assert list(logprob.top_logprobs) == pytest.approx(values.tolist(), abs=1e-3)


async def test_a_stop_string_ends_the_text_before_it_wherever_tokens_end(engine: AsyncEngine) -> None:
    whole = (await engine.generate(STORY, GenerationConfig(temperature=0, max_tokens=60))).text
    assert len(whole) > 40
    for start in range(5, 35, 3):
        stop = whole[start : start + 4]
        pieces = []
        stream = await engine.add_request(STORY, GenerationConfig(temperature=0, max_tokens=60, stop_strs=[stop, "§"]))
        async for output in stream:
            pieces.append(output.text)
        text = "".join(pieces)
        assert text == whole[: whole.index(stop)]
        result = stream.result()
        assert result.text == text
        assert result.finish_reason == "stop"
        assert result.outputs[0].stop_reason == stop


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
async def test_max_tokens_is_exact(engine: AsyncEngine, tokens: int) -> None:
    result = await engine.generate(STORY, GenerationConfig(max_tokens=tokens, ignore_eos=True, n=2))
    assert [len(branch.token_ids) for branch in result.outputs] == [tokens] * 2
    assert result.usage.completion_tokens == 2 * tokens
    assert result.finish_reason == "length"


async def test_stop_tokens_end_a_branch_but_not_before_min_tokens(engine: AsyncEngine) -> None:
    free = await engine.generate(STORY, GenerationConfig(temperature=0, max_tokens=30, ignore_eos=True))
    stop = free.token_ids[6]
    first = free.token_ids.index(stop)
    result = await engine.generate(STORY, GenerationConfig(temperature=0, max_tokens=30, stop_token_ids=[stop]))
    assert result.token_ids == free.token_ids[: first + 1]
    assert result.outputs[0].stop_reason == stop
    late = await engine.generate(
        STORY, GenerationConfig(temperature=0, max_tokens=30, stop_token_ids=[stop], min_tokens=20, ignore_eos=True)
    )
    assert stop not in late.token_ids[:20]
    assert len(late.token_ids) > 20


async def test_the_context_window_ends_a_branch_with_length(engine: AsyncEngine) -> None:
    assert engine.complete_engine_config is not None
    window = engine.complete_engine_config.max_single_sequence_length
    assert window is not None
    prompt = [5] * (window - 3)
    result = await engine.generate(prompt, GenerationConfig(ignore_eos=True))
    assert len(result.token_ids) == 3
    assert result.finish_reason == "length"


async def test_penalties_act_as_in_transformers(engine: AsyncEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    ids = torch.tensor([tokenizer(STORY).input_ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False, repetition_penalty=1.3,
        eos_token_id=None,
    )  # fmt: skip
    config = GenerationConfig(temperature=0, repetition_penalty=1.3, max_tokens=50, ignore_eos=True)
    assert (await engine.generate(STORY, config)).token_ids == output[0, ids.shape[1] :].tolist()
