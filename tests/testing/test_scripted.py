"""The scripted model: answers, latency, faults, steps under control, and the cache that checks the engine."""

from __future__ import annotations

import asyncio
import time

import pytest

from asyncengine import (
    AsyncEngine,
    EngineConfig,
    EngineState,
    GenerationConfig,
    ReloadError,
    RequestDroppedError,
    StepError,
)
from asyncengine.testing import MODEL, ByteTokenizer, ScriptedLoader, echo, echo_engine, scripted_engine

pytestmark = pytest.mark.timeout(60)


async def test_one_answer_for_every_prompt() -> None:
    async with scripted_engine("always this") as engine:
        assert [result.text for result in await engine.generate_many(["a", "b"])] == ["always this"] * 2
        config = engine.complete_engine_config
        assert config is not None and config.model == MODEL


async def test_answers_by_a_piece_of_the_prompt() -> None:
    async with scripted_engine({"France": "Paris", "": "I do not know."}) as engine:
        assert (await engine.generate("Capital of France?")).text == "Paris"
        assert (await engine.generate("Capital of Spain?")).text == "I do not know."


async def test_a_prompt_without_an_answer_is_dropped() -> None:
    async with scripted_engine({"France": "Paris"}) as engine:
        with pytest.raises(RequestDroppedError, match="no answer for a prompt that contains 'Spain'"):
            await engine.generate("Spain")
        assert (await engine.generate("France")).text == "Paris"


async def test_a_function_gives_the_answer() -> None:
    async with scripted_engine(lambda prompt, branch: [*reversed(prompt), ord("0") + branch]) as engine:
        result = await engine.generate("abc", GenerationConfig(n=3))
        assert [output.text for output in result.outputs] == ["cba0", "cba1", "cba2"]


async def test_echo() -> None:
    async with echo_engine() as engine:
        assert (await engine.generate("Grüße 🙂")).text == "Grüße 🙂"
        assert (await engine.chat([{"role": "user", "content": "hi"}])).text == "user: hi\nassistant: "


async def test_steps_take_as_long_as_they_should() -> None:
    async with echo_engine(step_seconds=0.01) as engine:
        begun = time.perf_counter()
        await asyncio.gather(*(engine.generate("0123456789") for _ in range(5)))
        assert 0.1 < time.perf_counter() - begun < 1.0


async def test_logprobs_count_down() -> None:
    async with echo_engine() as engine:
        result = await engine.generate("ab", GenerationConfig(logprobs=True, top_logprobs=2))
        logprobs = result.outputs[0].logprobs
        assert logprobs is not None
        assert [entry.logprob for entry in logprobs] == [0.0, -1.0, -2.0]
        assert [entry.top_ids for entry in logprobs] == [(97,), (98,), (256,)]


async def test_faults_come_when_they_are_ordered() -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    async with AsyncEngine(EngineConfig("m"), loader=loader) as engine:
        loader.model.fail_next(ValueError("ordered"))
        with pytest.raises(StepError, match="ordered"):
            await engine.generate("x")
        loader.model.refuse_next(ValueError("refused"))
        with pytest.raises(RequestDroppedError, match="refused"):
            await engine.generate("x")
        loader.check_errors["missing"] = ReloadError("missing")
        loader.load_errors["damaged"] = ReloadError("damaged")
        for name in ("missing", "damaged"):
            with pytest.raises(ReloadError, match=name):
                await engine.reload(EngineConfig(name))
        loader.model.lose_device()
        with pytest.raises(StepError):
            await engine.generate("x")
        assert engine.state is EngineState.FAILED
        await engine.restart()
        assert (await engine.generate("x")).text == "x"


async def test_steps_are_held_and_let() -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    async with AsyncEngine(EngineConfig("m"), loader=loader) as engine:
        model = loader.model
        model.hold()
        assert not model.wait_until_held(0.01)
        task = asyncio.create_task(engine.generate("hello"))
        for steps in range(1, 4):
            assert await asyncio.to_thread(model.wait_until_held)
            assert model.steps == steps
            model.let()
        assert await asyncio.to_thread(model.wait_until_held)
        model.release()
        assert (await task).text == "hello"
        assert model.batches == [(1, 5), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]
        assert (await engine.generate("not held")).text == "not held"


async def test_releasing_is_quick() -> None:
    loader = ScriptedLoader()
    async with AsyncEngine(EngineConfig("m"), loader=loader):
        begun = time.perf_counter()
        for _ in range(100):
            loader.model.hold()
            loader.model.release()
        assert time.perf_counter() - begun < 0.1


async def test_a_mistake_about_blocks_is_noticed() -> None:
    """The model reads every sequence back through its block table."""
    loader = ScriptedLoader(echo, tokenizer=ByteTokenizer())
    async with AsyncEngine(EngineConfig("m"), loader=loader) as engine:
        model = loader.model
        model.hold()
        task = asyncio.create_task(engine.generate("hello"))
        assert await asyncio.to_thread(model.wait_until_held)
        model.let()
        assert await asyncio.to_thread(model.wait_until_held)
        model._cache[:] = 7
        model.release()
        with pytest.raises(StepError, match="the cache of slot"):
            await task
