"""A conversation goes on: what was computed in earlier turns is found again, the last turn's tokens included."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, JsonSchema, RequestResult, RequestStream

QUESTIONS = [
    "What is the capital of France?", "What is 7 + 8?", "Tell me a story.", "And the capital of Italy?",
    "What color is the sky?", "Tell me a story about a dog.", "Thank you!", "What comes after Monday?",
]  # fmt: skip
LETTERS = GenerationConfig(temperature=0, max_tokens=24, ignore_eos=True)


def common(one: list[int], other: list[int]) -> int:
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


class Talk:
    """A conversation over a real engine that counts what each turn computes."""

    def __init__(self, engine: AsyncEngine, known_tokens: bool = False) -> None:
        self.engine = engine
        self.messages: list[dict[str, Any]] = []
        self.known_tokens = known_tokens
        self.known: list[int] = []  # what was computed in earlier turns: all but the last token
        self.prompt: list[int] = []

    async def ask(self, question: str, config: GenerationConfig) -> tuple[RequestResult, int]:
        """The answer, and how many tokens of the prompt were computed although they had been before."""
        self.messages.append({"role": "user", "content": question})
        async with self.engine.chat(self.messages, config) as stream:
            assert isinstance(stream, RequestStream)
            result = await stream
            self.prompt = stream.prompt_token_ids.tolist()
        again = common(self.prompt, self.known) - result.usage.cached_tokens
        self.known = [*self.prompt, *result.token_ids[:-1]]
        answer: dict[str, Any] = {"role": "assistant", "content": result.text}
        self.messages.append(answer | {"token_ids": result.token_ids} if self.known_tokens else answer)
        return result, again


@pytest.mark.parametrize("page_size", [4, 16, 32])
@pytest.mark.parametrize("known_tokens", [False, True])
def test_less_than_a_block_is_computed_again_in_each_turn(page_size: int, known_tokens: bool) -> None:
    async def talk() -> None:
        async with AsyncEngine(EngineConfig("tiny", kv_cache_page_size=page_size)) as engine:
            talk = Talk(engine, known_tokens)
            for turn, question in enumerate(QUESTIONS):
                before = talk.known
                config = GenerationConfig(temperature=0, max_tokens=7 if turn % 3 == 1 else 60)
                result, again = await talk.ask(question, config)
                assert 0 <= again < page_size
                assert common(talk.prompt, before) == len(before), "the template wrote another text"
                assert result.usage.cached_tokens > len(before) - page_size
            assert engine.metrics().kv_blocks_used == 0

    asyncio.run(talk())


def test_tokens_that_were_forced_and_never_computed_are_all_that_a_turn_adds() -> None:
    wanted = JsonSchema({"const": {"answer": "there is nothing to choose about this text"}})

    async def talk() -> None:
        async with AsyncEngine(EngineConfig("tiny", kv_cache_page_size=8)) as engine:
            talk = Talk(engine, known_tokens=True)
            first, _ = await talk.ask(QUESTIONS[0], GenerationConfig(response_format=wanted, max_tokens=60))
            prompt = len(talk.prompt)
            assert engine.metrics().counters.steps < 6 < len(first.token_ids), "nothing was jumped over"
            second, _ = await talk.ask(QUESTIONS[1], GenerationConfig(temperature=0, max_tokens=20))
            assert prompt - 8 < second.usage.cached_tokens < prompt + len(first.token_ids)
            _, again = await talk.ask(QUESTIONS[3], GenerationConfig(temperature=0, max_tokens=20))
            assert 0 <= again < 8

    asyncio.run(talk())


def test_answers_that_encode_to_other_tokens_are_found_by_their_token_ids() -> None:
    async def lost(known_tokens: bool) -> int:
        """Tokens of earlier answers that the last prompt does not have as they were generated."""
        async with AsyncEngine(EngineConfig("tiny", kv_cache_page_size=4)) as engine:
            assert engine.tokenizer is not None
            letters = [token for letter in "horse tail" for token in engine.tokenizer.encode(letter)[1:]]
            talk = Talk(engine, known_tokens)
            missing = 0
            for question in QUESTIONS[:4]:
                before = talk.known
                _, again = await talk.ask(question, LETTERS.replace(allowed_token_ids=letters))
                assert 0 <= again < 4
                missing += len(before) - common(talk.prompt, before)
            return missing

    assert asyncio.run(lost(known_tokens=True)) == 0
    assert asyncio.run(lost(known_tokens=False)) > 24
