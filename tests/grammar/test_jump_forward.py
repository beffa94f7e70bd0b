"""Tokens without a choice are taken together: fewer steps, the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, RequestDroppedError
from asyncengine.response_format import Choice, JsonSchema, Regex
from tests.grammar.conftest import CONFIG
from tests.grammar.fakes import FakeBackend
from tests.grammar.schemas import SCHEMAS, obj

pytestmark = pytest.mark.loops("either")

FIXED = obj(
    {
        "first_measurement": {"type": "boolean"},
        "second_measurement": {"enum": ["low", "high"]},
        "third_measurement": {"type": "integer", "minimum": 0, "maximum": 9},
        "approved_by_reviewer": {"const": "automatically approved"},
    }
)


def config(format_: Any, seed: int = 0, **changes: Any) -> GenerationConfig:
    values = {"temperature": 1.0, "seed": seed, "max_tokens": 150, "response_format": format_}
    return GenerationConfig(**(values | changes))


def outcome(result: Any) -> list[Any]:
    return [(b.token_ids, b.text, b.finish_reason, b.stop_reason) for b in result.outputs]


async def both(engine: AsyncEngine, configs: list[GenerationConfig]) -> tuple[list[Any], list[Any]]:
    """Outcomes with and without jumps."""
    jumped = await engine.generate_many(["x"] * len(configs), configs)
    walked = await engine.generate_many(["x"] * len(configs), [c.replace(jump_forward=False) for c in configs])
    scheduler = engine._thread.core.scheduler
    assert scheduler is not None
    await engine.abort_request("nobody")  # the step thread is idle then
    scheduler.check()
    assert engine.metrics().kv_blocks_used == 0
    return [outcome(result) for result in jumped], [outcome(result) for result in walked]


async def steps_of(engine: AsyncEngine, wanted: GenerationConfig) -> int:
    before = engine.metrics().counters.steps
    await engine.generate("x", wanted)
    await engine.abort_request("nobody")
    return engine.metrics().counters.steps - before


async def test_a_fixed_shape_takes_less_than_half_the_steps(engine: AsyncEngine) -> None:
    wanted = config(JsonSchema(FIXED, "none"))
    walked = await steps_of(engine, wanted.replace(jump_forward=False))
    jumped = await steps_of(engine, wanted)
    assert walked >= 2 * jumped, (walked, jumped)


async def test_the_tokens_are_the_same_for_every_schema(engine: AsyncEngine) -> None:
    names = list(SCHEMAS)[::3]
    configs = [config(JsonSchema(SCHEMAS[name], "none"), seed) for seed, name in enumerate(names)]
    jumped, walked = await both(engine, configs)
    assert jumped == walked


async def test_with_branches_penalties_and_least_lengths(engine: AsyncEngine) -> None:
    configs = [
        config(JsonSchema(FIXED), seed, n=3, frequency_penalty=0.7, repetition_penalty=1.2, min_tokens=5 * seed)
        for seed in range(6)
    ]
    jumped, walked = await both(engine, configs)
    assert jumped == walked


async def test_max_tokens_is_exact_wherever_it_cuts(engine: AsyncEngine) -> None:
    configs = [
        config(Choice(("quick brown foxes jump over zebras", "jolly wizards vex my liquid quartz")), max_tokens=most)
        for most in range(1, 16)
    ]
    jumped, walked = await both(engine, configs)
    assert jumped == walked
    assert [len(result[0][0]) for result in jumped[:5]] == [1, 2, 3, 4, 5]
    assert jumped[0][0][2] == "length"


async def test_stop_strings_and_stop_tokens_end_a_branch_within_a_jump(engine: AsyncEngine) -> None:
    format_ = Choice(("once a STOP was here", "twice a STOP was here"))
    tokens = (await engine.generate("x", config(format_))).token_ids
    configs = [config(format_, stop_strs=["STOP"]), config(format_, stop_strs=["was", "here"])]
    configs += [config(format_, stop_token_ids=[token]) for token in tokens[1:]]
    jumped, walked = await both(engine, configs)
    assert jumped == walked
    assert jumped[0][0][1].endswith(" a ")
    assert jumped[0][0][3] == "STOP"


async def test_a_stop_token_that_min_tokens_forbids_ends_a_jump_where_it_ends_decoding(engine: AsyncEngine) -> None:
    format_ = Choice(("once a STOP was here",))
    tokens = (await engine.generate("x", config(format_))).token_ids
    at = 3
    assert tokens[at] not in tokens[:at]
    for jump_forward in (True, False):
        wanted = config(format_, stop_token_ids=[tokens[at]], jump_forward=jump_forward)
        assert (await engine.generate("x", wanted.replace(min_tokens=at))).token_ids == tokens[: at + 1]
        stream = await engine.add_request("x", wanted.replace(min_tokens=at + 2))
        with pytest.raises(RequestDroppedError, match="left by the request's other masks"):
            await stream
        assert stream.result().token_ids == tokens[:at]


@pytest.mark.loops("each")
async def test_deltas_add_up_and_usage_counts_every_token(engine: AsyncEngine) -> None:
    stream = await engine.add_request("x", config(JsonSchema(FIXED), n=2))
    texts, ids = ["", ""], [[], []]  # type: ignore[var-annotated]
    async for output in stream:
        texts[output.index] += output.text
        ids[output.index] += output.token_ids
    result = stream.result()
    assert [branch.text for branch in result.outputs] == texts
    assert [branch.token_ids for branch in result.outputs] == ids
    assert result.usage.completion_tokens == sum(map(len, ids))


async def test_a_jump_goes_on_from_what_was_delivered_however_the_tokenizer_would_spell_the_whole(
    engine: AsyncEngine,
) -> None:
    """A drawn token may end where the tokenizer would not cut: what is forced begins there."""
    texts = ("Once upon a time", "Once there was", "Only one horse")
    assert engine.tokenizer is not None
    own = {tuple(engine.tokenizer.encode(text)[1:]) for text in texts}
    other = 0
    for seed in range(24):
        wanted = config(Choice(texts), seed)
        stream = await engine.add_request("x", wanted)
        text, ids = "", []
        async for output in stream:
            text += output.text
            ids += output.token_ids
            assert any(whole.startswith(text) for whole in texts)
        assert text == engine.tokenizer.decode(ids, True) == stream.result().text
        assert text in texts
        assert ids == (await engine.generate("x", wanted.replace(jump_forward=False))).token_ids
        other += tuple(ids) not in own
    assert other > 4, "every text was spelled as the tokenizer would"


@pytest.mark.parametrize(
    "limits", [{"max_total_sequence_length": 256, "max_single_sequence_length": 256}, {"prefill_mode": "chunked"}]
)
@pytest.mark.in_short("limits0")
async def test_with_preemption_and_separate_prefill_steps(random_model: Path, limits: dict[str, Any]) -> None:
    changed = CONFIG | {"kv_cache_page_size": 4, "prefill_chunk_size": 8} | limits
    configs = [config(JsonSchema(FIXED), seed, n=2) for seed in range(6)]
    async with AsyncEngine(EngineConfig(str(random_model), **changed)) as engine:
        jumped, walked = await both(engine, configs)
        assert (engine.metrics().counters.preemptions > 0) == ("max_total_sequence_length" in limits)
    assert jumped == walked


async def test_requests_with_logprobs_do_not_jump(engine: AsyncEngine) -> None:
    wanted = config(JsonSchema(FIXED, "none"), logprobs=True, top_logprobs=1)
    result = await engine.generate("x", wanted)
    assert result.outputs[0].logprobs is not None
    assert len(result.outputs[0].logprobs) == len(result.token_ids)
    assert await steps_of(engine, wanted) == len(result.token_ids)


async def test_a_text_that_can_only_end_ends_within_the_jump(engine: AsyncEngine) -> None:
    result = await engine.generate("x", config(Regex("(only this text)")))
    assert (result.text, result.finish_reason) == ("only this text", "stop")
    assert await steps_of(engine, config(Regex("(only this text)"))) == 1


async def test_a_grammar_without_an_end_jumps_no_further_than_max_tokens(engine: AsyncEngine) -> None:
    FakeBackend(token_id=9).put_into(engine)
    result = await engine.generate("x", config(Regex("x"), max_tokens=37))
    assert (result.token_ids, result.finish_reason) == ([9] * 37, "length")
    assert await steps_of(engine, config(Regex("x"), max_tokens=37)) == 1
