"""Allowed tokens, bad words and logits processors on the embedded model; contract 14, 16 and 29."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncengine import (
    AsyncEngine,
    EngineConfig,
    GenerationConfig,
    InvalidRequestError,
    LogitsRow,
    RequestDroppedError,
    tiny,
)

pytestmark = pytest.mark.loops("either")

CONFIG: dict[str, Any] = {
    "device": "cpu", "max_total_sequence_length": 2048, "max_num_sequence": 16, "kv_cache_page_size": 16,
}  # fmt: skip
STORY = "Once upon a time"
END = 2


@pytest.fixture(scope="module")
def lasting_engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig("tiny", **CONFIG))
    engine.reload_nowait()
    yield engine
    engine.shutdown_nowait()


@pytest.fixture
async def engine(lasting_engine: AsyncEngine) -> AsyncEngine:
    await lasting_engine.reset()
    return lasting_engine


def greedy(**changes: Any) -> GenerationConfig:
    values = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    return GenerationConfig(**(values | changes))


def sampled(seed: int, **changes: Any) -> GenerationConfig:
    return greedy(**({"temperature": 1.0, "seed": seed} | changes))


def has(ids: list[int], word: tuple[int, ...]) -> bool:
    return any(tuple(ids[i : i + len(word)]) == word for i in range(len(ids)))


# Allowed tokens


async def test_only_allowed_tokens_are_drawn(engine: AsyncEngine) -> None:
    allowed = [20, 35, 300, 1023]
    results = await engine.generate_many(["x"] * 8, [sampled(seed, allowed_token_ids=allowed) for seed in range(8)])
    drawn = {token for result in results for token in result.token_ids}
    assert drawn <= set(allowed)
    assert len(drawn) > 1


async def test_the_end_token_is_drawn_only_if_it_is_allowed(engine: AsyncEngine) -> None:
    never = await engine.generate("x", sampled(0, allowed_token_ids=[20, 21], ignore_eos=False, logit_bias={END: 100}))
    assert never.finish_reason == "length"
    at_once = await engine.generate(
        "x", sampled(0, allowed_token_ids=[20, END], ignore_eos=False, logit_bias={END: 100}, min_tokens=3)
    )
    assert at_once.token_ids == [20, 20, 20, END]
    assert at_once.finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"allowed_token_ids": [1024]}, ("allowed_token_ids has token id 1024", "0..1023")),
        ({"bad_words": [[5, 2000]]}, ("bad_words has token id 2000", "0..1023")),
        ({"allowed_token_ids": [5, 6], "bad_words": [[5], [6]]}, ("allowed_token_ids has 5, 6", "bad_words")),
        ({"allowed_token_ids": [END], "min_tokens": 2, "ignore_eos": False}, ("min_tokens = 2", "stop tokens")),
    ],
)
async def test_what_can_never_be_drawn_is_refused_before_admission(
    engine: AsyncEngine, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await engine.add_request("x", greedy(**changes))
    for part in parts:
        assert part in str(caught.value)


async def test_masks_that_leave_nothing_later_end_their_own_request(engine: AsyncEngine) -> None:
    fine = await engine.add_request(STORY, sampled(1))
    stuck = await engine.add_request("x", greedy(allowed_token_ids=[5], bad_words=[[5, 5, 5]]))
    with pytest.raises(RequestDroppedError, match="forbid all"):
        await stuck
    assert stuck.result().token_ids == [5, 5]
    assert len((await fine).token_ids) == 40


# Bad words


async def test_bad_words_never_appear_and_their_beginnings_may(engine: AsyncEngine) -> None:
    free = (await engine.generate(STORY, greedy())).token_ids
    word = tuple(free[4:7])
    result = (await engine.generate(STORY, greedy(bad_words=[list(word)]))).token_ids
    assert result[:6] == free[:6]
    assert not has(result, word)
    assert result[6] != free[6]
    one = free[3]
    assert one not in (await engine.generate(STORY, greedy(bad_words=[[one]]))).token_ids


async def test_the_last_token_of_a_bad_word_may_come_after_others(engine: AsyncEngine) -> None:
    wanted = sampled(1, allowed_token_ids=[20, 21, 22], bad_words=[[20, 21], [22, 20]], n=8, temperature=8.0)
    branches = (await engine.generate("x", wanted)).outputs
    pairs = {pair for branch in branches for pair in zip(branch.token_ids, branch.token_ids[1:], strict=False)}
    every = {(first, then) for first in (20, 21, 22) for then in (20, 21, 22)}
    assert pairs == every - {(20, 21), (22, 20)}


async def test_bad_words_are_found_across_a_preemption() -> None:
    pairs_of_words = [[a, b] for a in range(300, 330) for b in range(300, 330)]
    configs = [sampled(seed, bad_words=pairs_of_words) for seed in range(3)]
    configs = [config.replace(max_tokens=90, temperature=1.5) for config in configs]
    async with AsyncEngine(EngineConfig("tiny", **CONFIG)) as engine:
        undisturbed = await engine.generate_many([STORY] * 3, configs)
    async with AsyncEngine(EngineConfig("tiny", **(CONFIG | {"max_total_sequence_length": 160}))) as engine:
        squeezed = await engine.generate_many([STORY] * 3, configs)
        assert engine.metrics().counters.preemptions > 0
    assert [result.token_ids for result in squeezed] == [result.token_ids for result in undisturbed]
    for result in squeezed:
        pairs = zip(result.token_ids, result.token_ids[1:], strict=False)
        assert not [pair for pair in pairs if 300 <= pair[0] < 330 and 300 <= pair[1] < 330]


async def test_a_text_stands_for_its_tokens_with_and_without_a_space(engine: AsyncEngine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    free = (await engine.generate(STORY, greedy())).text
    word = free.split()[2]
    assert f" {word}" in free
    result = await engine.generate(STORY, greedy(bad_words=[word]))
    for text in (word, f" {word}"):
        assert not has(result.token_ids, tuple(tokenizer.encode(text, add_special_tokens=False)))
    assert f" {word} " not in result.text


async def test_n_branches_look_at_their_own_tokens(engine: AsyncEngine) -> None:
    words = [[a, b] for a in range(300, 332) for b in range(300, 332)]
    result = await engine.generate(STORY, sampled(3, n=4, bad_words=words, temperature=1.5))
    for index, branch in enumerate(result.outputs):
        alone = await engine.generate(STORY, sampled(3 + index, bad_words=words, temperature=1.5))
        assert branch.token_ids == alone.token_ids


# Logits processors


async def test_a_processor_sees_prompt_output_and_branch_and_changes_the_logits(engine: AsyncEngine) -> None:
    seen: list[LogitsRow] = []

    def spell(logits: torch.Tensor, row: LogitsRow) -> None:
        assert logits.shape == (1024,)
        assert logits.dtype == torch.float32
        seen.append(row)
        logits[100 + 10 * row.branch + len(row.token_ids)] = 1000.0

    result = await engine.generate([5, 6, 7], greedy(logits_processors=[spell], max_tokens=4, n=2))
    assert [branch.token_ids for branch in result.outputs] == [[100, 101, 102, 103], [110, 111, 112, 113]]
    assert len(seen) == 8
    for row in seen:
        assert row.prompt_token_ids.tolist() == [5, 6, 7]
        first = 100 + 10 * row.branch
        assert row.token_ids.tolist() == list(range(first, first + len(row.token_ids)))
        for ids in (row.prompt_token_ids, row.token_ids):
            assert not ids.flags.writeable


async def test_what_a_processor_returns_takes_the_place_of_its_logits(engine: AsyncEngine) -> None:
    def other(logits: torch.Tensor, row: LogitsRow) -> torch.Tensor:
        return torch.full_like(logits, -1.0).index_fill_(0, torch.tensor([77]), 5.0).double()

    def twice(logits: torch.Tensor, row: LogitsRow) -> None:
        logits[78] = logits[77] * 2

    one = await engine.generate("x", greedy(logits_processors=[other], max_tokens=3))
    assert one.token_ids == [77] * 3
    both = await engine.generate("x", greedy(logits_processors=[other, twice], max_tokens=3))
    assert both.token_ids == [78] * 3


async def test_masks_hold_whatever_a_processor_does(engine: AsyncEngine) -> None:
    def want(logits: torch.Tensor, row: LogitsRow) -> None:
        logits[:] = -1000.0
        logits[50] = 1000.0

    result = await engine.generate("x", greedy(logits_processors=[want], allowed_token_ids=[60, 61]))
    assert set(result.token_ids) == {60}


async def test_processors_come_after_bias_and_penalties(engine: AsyncEngine) -> None:
    values: list[float] = []

    def look(logits: torch.Tensor, row: LogitsRow) -> None:
        values.append(logits[9].item())

    await engine.generate(STORY, greedy(logits_processors=[look], max_tokens=1))
    await engine.generate(STORY, greedy(logits_processors=[look], max_tokens=1, logit_bias={9: 7.0}))
    assert values[1] == pytest.approx(values[0] + 7.0, abs=1e-4)


async def test_a_processor_of_transformers_does_what_it_does_there(engine: AsyncEngine) -> None:
    from transformers import NoRepeatNGramLogitsProcessor

    theirs = NoRepeatNGramLogitsProcessor(2)

    def adapted(logits: torch.Tensor, row: LogitsRow) -> torch.Tensor:
        ids = torch.tensor(np.concatenate([row.prompt_token_ids, row.token_ids]), dtype=torch.long)
        result: torch.Tensor = theirs(ids[None], logits[None])[0]
        return result

    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    model = AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32)
    ids = torch.tensor([tokenizer(STORY).input_ids])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, eos_token_id=None,
        no_repeat_ngram_size=2,
    )  # fmt: skip
    result = await engine.generate(STORY, greedy(logits_processors=[adapted], max_tokens=60))
    assert result.token_ids == expected[0, ids.shape[1] :].tolist()


async def test_a_processor_does_not_disturb_its_neighbours(engine: AsyncEngine) -> None:
    def spoil(logits: torch.Tensor, row: LogitsRow) -> None:
        logits[:] = float("nan")

    alone = await engine.generate_many([STORY] * 3, [sampled(seed) for seed in range(3)])
    mixed = [sampled(0), sampled(9, logits_processors=[spoil]), sampled(1), sampled(2)]
    together = await engine.generate_many([STORY] * 4, mixed)
    assert [together[i].token_ids for i in (0, 2, 3)] == [result.token_ids for result in alone]


async def test_a_processor_keeps_its_place_across_a_preemption() -> None:
    def push(logits: torch.Tensor, row: LogitsRow) -> None:
        recent = torch.from_numpy(row.token_ids[-3:].astype(np.int64))
        logits[recent] = -torch.inf
        logits[100 + len(row.token_ids)] += 3.0

    configs = [sampled(seed, logits_processors=[push], max_tokens=90) for seed in range(3)]
    async with AsyncEngine(EngineConfig("tiny", **CONFIG)) as engine:
        undisturbed = await engine.generate_many([STORY] * 3, configs)
    async with AsyncEngine(EngineConfig("tiny", **(CONFIG | {"max_total_sequence_length": 160}))) as engine:
        squeezed = await engine.generate_many([STORY] * 3, configs)
        assert engine.metrics().counters.preemptions > 0
    assert [result.token_ids for result in squeezed] == [result.token_ids for result in undisturbed]


def _raise(error: BaseException) -> Any:
    def processor(logits: torch.Tensor, row: LogitsRow) -> None:
        if len(row.token_ids) == 3:
            raise error

    return processor


@pytest.mark.parametrize(
    ("processor", "part"),
    [
        (_raise(RuntimeError("mine")), "mine"),
        (_raise(SystemExit(1)), "SystemExit"),
        (lambda logits, row: logits[:5], r"returned \(5,\)"),
        (lambda logits, row: logits.long(), "torch.int64"),
        (lambda logits, row: [0.0], "returned list"),
        (lambda logits: None, "argument"),
    ],
)
async def test_a_processor_that_fails_ends_its_own_request_alone(
    engine: AsyncEngine, processor: Any, part: str
) -> None:
    expected = await engine.generate(STORY, sampled(1))
    broken = await engine.add_request("x", greedy(logits_processors=[processor], n=2))
    fine = await engine.add_request(STORY, sampled(1))
    with pytest.raises(RequestDroppedError, match=part):
        await broken
    assert {branch.finish_reason for branch in broken.result().outputs} == {"error"}
    assert (await fine).token_ids == expected.token_ids
    assert engine.metrics().kv_blocks_used == 0
    assert engine.metrics().counters.failed_steps == 0
