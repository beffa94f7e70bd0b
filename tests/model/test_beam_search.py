"""Beam searches over real models: the texts and scores of transformers' own ``generate(num_beams=...)``."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncengine import (
    AsyncEngine,
    EngineConfig,
    GenerationConfig,
    InvalidRequestError,
    LogitsRow,
    Regex,
    RequestDroppedError,
    RequestResult,
)

pytestmark = pytest.mark.loops("either")

MOST = 8
ENDS = tuple(range(20, 40))
"""Tokens that end a text: so many that most searches find some."""
PROMPTS = [
    torch.randint(40, 199, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (1, 6, 19)
]
Texts = list[tuple[list[int], float]]


class Transformers:
    """A checkpoint as transformers searches it."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def found(self, prompt: Sequence[int], beams: int, **asked: Any) -> Texts:
        """All that a search finds, best first."""
        ids = torch.tensor([list(prompt)])
        values: dict[str, Any] = {"max_new_tokens": MOST, "eos_token_id": list(ENDS), "pad_token_id": 0}
        made = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=beams, num_return_sequences=beams, do_sample=False,
            return_dict_in_generate=True, output_scores=True, **(values | asked),
        )  # fmt: skip
        ends = values | asked
        texts = [sequence[len(prompt) :] for sequence in made.sequences.tolist()]
        whole = [[*itertools.takewhile(lambda token: token not in ends["eos_token_id"], text)] for text in texts]
        texts = [text[: len(begun) + 1] for text, begun in zip(texts, whole, strict=True)]
        return list(zip(texts, made.sequences_scores.tolist(), strict=True))


def config(path: Path, **changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "kv_cache_page_size": 4, "max_num_sequence": 12,
        "max_total_sequence_length": 400, "prefill_chunk_size": 16,
    }  # fmt: skip
    return EngineConfig(str(path), **(values | changes))


def searching(beams: int, **changes: Any) -> GenerationConfig:
    values: dict[str, Any] = {"n": beams, "max_tokens": MOST, "stop_token_ids": ENDS, "ignore_eos": True}
    return GenerationConfig(num_beams=beams, **(values | changes))


def agree(result: RequestResult, expected: Texts) -> None:
    assert [output.token_ids for output in result.outputs] == [tokens for tokens, _ in expected]
    assert [output.score for output in result.outputs] == pytest.approx([score for _, score in expected], abs=1e-4)
    for output in result.outputs:
        assert output.finish_reason == ("stop" if output.token_ids[-1] in ENDS else "length")


@pytest.fixture(scope="module")
def llama(checkpoint: Callable[..., Path]) -> Transformers:
    return Transformers(checkpoint("llama"))


@pytest.fixture(scope="module")
def served(checkpoint: Callable[..., Path]) -> Iterator[AsyncEngine]:
    serving = AsyncEngine(config(checkpoint("llama")))
    assert serving._config is not None
    asyncio.run(serving.reload(serving._config))
    yield serving
    asyncio.run(serving.shutdown())


WAYS = list(itertools.product((2, 5), ({}, {"length_penalty": 0.0}, {"length_penalty": -1.0}), (True, False, "never")))


async def test_they_find_what_transformers_finds(served: AsyncEngine, llama: Transformers) -> None:
    """All at once, beside requests that draw."""
    asked = [
        (prompt, beams, changes | {"early_stopping": early}) for prompt in PROMPTS[1:] for beams, changes, early in WAYS
    ]
    drawing = [served.generate(prompt, GenerationConfig(max_tokens=30, seed=1)) for prompt in PROMPTS]
    searches = [served.generate(prompt, searching(beams, **changes)) for prompt, beams, changes in asked]
    results = (await asyncio.gather(*drawing, *searches))[len(drawing) :]
    ended = set[str]()
    for (prompt, beams, changes), result in zip(asked, results, strict=True):
        agree(result, llama.found(prompt, beams, **changes))
        ended |= {output.finish_reason for output in result.outputs}
    assert ended == {"stop", "length"}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
        ({"min_tokens": 6}, {"min_new_tokens": 6}),
        ({"logit_bias": {100: 3.0, 101: -100.0}}, {"sequence_bias": {(100,): 3.0, (101,): -100.0}}),
        ({"bad_words": [[175], [105, 85]]}, {"bad_words_ids": [[175], [105, 85]]}),
        ({"max_tokens": 1}, {"max_new_tokens": 1}),
    ],
    ids=lambda values: next(iter(values)),
)
async def test_what_else_is_asked_for_holds_for_beams(
    ours: dict[str, Any], theirs: dict[str, Any], served: AsyncEngine, llama: Transformers
) -> None:
    """On the log-probabilities that are added up, as transformers has it, not on logits."""
    plain = await served.generate(PROMPTS[2], searching(4))
    result = await served.generate(PROMPTS[2], searching(4, **ours))
    agree(result, llama.found(PROMPTS[2], 4, **theirs))
    assert [output.token_ids for output in result.outputs] != [output.token_ids for output in plain.outputs]


@pytest.mark.parametrize("architecture", ["qwen3_next", "mamba2"])
async def test_beams_of_recurrent_layers_have_states_of_their_own(
    architecture: str, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint(architecture)
    theirs = Transformers(path)
    async with AsyncEngine(config(path)) as serving:
        results = await asyncio.gather(*[serving.generate(prompt, searching(4)) for prompt in PROMPTS])
        for prompt, result in zip(PROMPTS, results, strict=True):
            agree(result, theirs.found(prompt, 4))


def _fails_at_the_third(logits: torch.Tensor, row: LogitsRow) -> None:
    if len(row.token_ids) == 2:
        raise ValueError("the third")


SETTINGS: list[dict[str, Any]] = [
    {"prefix_cache_mode": "disable", "max_total_sequence_length": 52, "kv_cache_page_size": 1},
    {"attention_backend": "torch", "prefill_mode": "chunked"},
    {"speculative_mode": "ngram", "spec_draft_length": 2},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=[",".join(each) for each in SETTINGS])
async def test_however_the_model_is_served(
    changes: dict[str, Any], checkpoint: Callable[..., Path], llama: Transformers
) -> None:
    async with AsyncEngine(config(checkpoint("llama"), **changes)) as serving:
        repeating = [7, 8, 9] * 6
        asked = [*(serving.generate(prompt, searching(4)) for prompt in PROMPTS)]
        beside = serving.generate(repeating, GenerationConfig(temperature=0, max_tokens=20, ignore_eos=True))
        *results, drafted = await asyncio.gather(*asked, beside)
        for prompt, result in zip(PROMPTS, results, strict=True):
            agree(result, llama.found(prompt, 4))
            assert result.usage.draft_tokens == 0
        assert (drafted.usage.draft_tokens > 0) == ("speculative_mode" in changes)
        beside = serving.generate(repeating, GenerationConfig(temperature=0, max_tokens=20, ignore_eos=True))
        failing = serving.generate(PROMPTS[2], searching(4, logits_processors=[_fails_at_the_third]))
        again, error = await asyncio.gather(beside, failing, return_exceptions=True)
        assert isinstance(again, RequestResult) and again.token_ids == drafted.token_ids
        assert isinstance(error, RequestDroppedError) and "the third" in str(error)
        assert (serving.metrics().counters.preemptions > 0) == ("max_total_sequence_length" in changes)


async def test_a_grammar_holds_for_every_beam() -> None:
    """Each of the texts is one that it allows, and may be spelt in several ways."""
    async with AsyncEngine(EngineConfig("tiny", device="cpu", dtype="float32")) as serving:
        form = Regex("(yes|no|maybe|never)")
        config = GenerationConfig(
            num_beams=6, n=6, max_tokens=12, response_format=form, length_penalty=0.0, logprobs=True
        )
        result = await serving.generate("Is it? ", config)
        assert len({output.text for output in result.outputs}) > 1
        assert {output.text for output in result.outputs} <= {"maybe", "never", "no", "yes"}
        assert {output.finish_reason for output in result.outputs} == {"stop"}
        scores = [output.score for output in result.outputs]
        assert scores == sorted(scores, reverse=True)
        for output in result.outputs:
            assert output.logprobs is not None
            assert output.score == pytest.approx(sum(entry.logprob for entry in output.logprobs), abs=1e-3)


async def test_what_is_read_while_it_comes(served: AsyncEngine) -> None:
    """Each branch is one delta, and deltas are the result."""
    outputs = [output async for output in await served.add_request(PROMPTS[1], searching(4, n=2))]
    assert [output.index for output in outputs] == [0, 1]
    result = await served.generate(PROMPTS[1], searching(4, n=2))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in result.outputs]


async def test_more_likeliest_tokens_may_be_named_than_are_looked_at(served: AsyncEngine) -> None:
    result = await served.generate(PROMPTS[1], searching(2, n=1, stop_token_ids=(), logprobs=True, top_logprobs=20))
    [output] = result.outputs
    assert output.logprobs is not None and {len(entry.top_ids) for entry in output.logprobs} == {20}
    plain = await served.generate(PROMPTS[1], searching(2, n=1, stop_token_ids=()))
    assert plain.outputs[0].token_ids == output.token_ids


async def test_where_nothing_may_be_written_it_is_told(served: AsyncEngine) -> None:
    def forbid(logits: torch.Tensor, row: LogitsRow) -> None:
        logits.fill_(-torch.inf)

    with pytest.raises(RequestDroppedError, match="no token may follow the prompt"):
        await served.generate(PROMPTS[1], searching(4, logits_processors=[forbid]))


async def test_what_there_is_no_room_for_is_refused(served: AsyncEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"num_beams is 13; allowed: 1\.\.max_num_sequence = 12"):
        await served.generate(PROMPTS[0], searching(13, n=1))
    with pytest.raises(InvalidRequestError, match=r"num_beams is 12; behind a prompt of 399 tokens .* no room"):
        await served.generate([50] * 399, GenerationConfig(num_beams=12))
    result = await served.generate([50] * 100, GenerationConfig(num_beams=10, ignore_eos=True, temperature=0))
    assert result.outputs[0].finish_reason == "length" and len(result.token_ids) == (100 - 25) // 10 * 4
