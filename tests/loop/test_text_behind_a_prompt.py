"""The text of an answer is what it adds to the prompt's, whatever a decoder does at the beginning of a text."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from asyncengine import AsyncEngine, EngineConfig, FinishReason, GenerationConfig
from asyncengine.testing import ScriptedLoader
from tests.model.sentencepiece import sentencepiece

TOKENIZER = sentencepiece()
ANSWER = [token for token in TOKENIZER.encode("hello Paris is true") if token not in TOKENIZER.encode("hello Paris")]


def engine() -> AsyncEngine:
    loader = ScriptedLoader(lambda prompt, branch: ANSWER, tokenizer=TOKENIZER, vocab_size=1000)
    return AsyncEngine(EngineConfig("scripted"), loader=loader)


async def pieces() -> AsyncIterator[str]:
    for word in ("hel", "lo ", "Paris"):
        yield word


@pytest.mark.parametrize("prompt", ["hello Paris", TOKENIZER.encode("hello Paris")], ids=["text", "tokens"])
async def test_a_space_between_prompt_and_answer_is_the_answer_s(prompt: str | list[int]) -> None:
    settings = GenerationConfig(max_tokens=len(ANSWER), n=2)
    async with engine() as serving:
        assert [branch.text for branch in (await serving.generate(prompt, settings)).outputs] == [" is true"] * 2
        deltas = [output.text async for output in await serving.add_request(prompt, settings.replace(n=1))]
        assert "".join(deltas) == " is true"
        text = await serving.generate(pieces(), settings.replace(n=1))
        assert text.text == " is true", "a prompt that comes in pieces has an end, too"
        stopped = await serving.generate(prompt, settings.replace(n=1, stop_strs=[" is"]))
        assert (stopped.text, stopped.finish_reason) == ("", FinishReason.STOP)
        stopped = await serving.generate(pieces(), settings.replace(n=1, stop_strs=[" is"]))
        assert (stopped.text, stopped.finish_reason) == ("", FinishReason.STOP)
