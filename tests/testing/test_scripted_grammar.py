"""Structured output over the scripted model: the script has to keep to the grammar."""

from __future__ import annotations

from typing import Any

import pytest

from asyncengine import AsyncEngine, GenerationConfig, RequestDroppedError
from asyncengine.response_format import Choice, JsonSchema, Regex
from asyncengine.testing import scripted_engine

pytestmark = pytest.mark.loops("either")

POINT = JsonSchema({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]})


async def answered(answer: str, format_: Any, **limits: Any) -> Any:
    async with scripted_engine(answer, **limits) as engine:
        return await engine.generate("?", GenerationConfig(response_format=format_))


async def test_an_answer_that_the_grammar_allows_is_given_and_ends_where_the_grammar_does() -> None:
    result = await answered('{"x": 17} and more', POINT)
    assert result.text == '{"x": 17}'
    assert (result.finish_reason, result.outputs[0].stop_reason) == ("stop", None)


async def test_an_answer_that_it_does_not_allow_ends_its_own_request() -> None:
    async with scripted_engine({"good": '{"x": 1}', "bad": '{"y": "'}) as engine:
        bad = await engine.add_request("bad", GenerationConfig(response_format=Choice(('{"x": 1}',))))
        good = await engine.add_request("good", GenerationConfig(response_format=POINT))
        with pytest.raises(RequestDroppedError, match=r"script's token 121 .* is not allowed by the grammar"):
            await bad
        assert bad.result().text == '{"'
        assert (await good).text == '{"x": 1}'


async def test_an_answer_that_ends_too_early_is_not_allowed() -> None:
    with pytest.raises(RequestDroppedError, match="script's token 256"):
        await answered("ab", Regex("abc"))


async def test_a_preempted_answer_goes_on_where_it_was() -> None:
    async with scripted_engine(
        "abcdefgh" * 8, max_total_sequence_length=128, kv_cache_page_size=4, max_single_sequence_length=100
    ) as engine:
        configs = [GenerationConfig(response_format=Regex("[a-h]{64}"))] * 3
        results = await engine.generate_many(["?"] * 3, configs)
        assert engine.metrics().counters.preemptions > 0
    assert {result.text for result in results} == {"abcdefgh" * 8}
    assert {result.finish_reason for result in results} == {"stop"}


async def test_logits_processors_are_refused() -> None:
    async with scripted_engine("a") as engine:
        await refuses_processors(engine)


async def refuses_processors(engine: AsyncEngine) -> None:
    with pytest.raises(RequestDroppedError, match="no logits that logits_processors could change"):
        await engine.generate("?", GenerationConfig(logits_processors=[lambda logits, row: None]))
