"""Adapters of a running engine, over scripted models: who is served by which, and what becomes of requests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncengine import (
    AdapterError,
    AsyncEngine,
    EngineClosedError,
    EngineConfig,
    EngineFailedError,
    EngineState,
    FinishReason,
    GenerationConfig,
    IllegalStateError,
    InvalidRequestError,
    ModelNotLoadedError,
    RequestOptions,
)
from asyncengine.testing import MODEL, ByteTokenizer, ScriptedLoader, scripted_engine

pytestmark = pytest.mark.loops("either")

SHOUT = RequestOptions(adapter="shout")
LONG = "a long answer that goes on and on " * 8


def loader_of(**changes: Any) -> ScriptedLoader:
    adapters = {"shout": lambda prompt, branch: LONG.upper().encode(), "hum": lambda prompt, branch: b"hm"}
    return ScriptedLoader(lambda prompt, branch: LONG.encode(), tokenizer=ByteTokenizer(), adapters=adapters, **changes)


def shouting(loader: ScriptedLoader, **config: Any) -> AsyncEngine:
    return AsyncEngine(EngineConfig(MODEL, adapters={"shout": "shout"}, **config), loader=loader)


async def test_each_request_has_the_adapter_that_it_names() -> None:
    async with scripted_engine("Paris.", adapters={"shout": "PARIS!", "by": {"France": "Paris"}}) as engine:
        assert engine.adapters == ("shout", "by")
        asked = [engine.generate("France", options=RequestOptions(adapter=name)) for name in (None, "shout", "by")]
        assert [result.text for result in await asyncio.gather(*asked)] == ["Paris.", "PARIS!", "Paris"]
        chat = await engine.chat([{"role": "user", "content": "?"}], options=SHOUT)
        assert chat.text == "PARIS!"
        many = await engine.generate_many(["1", "2"], options=SHOUT)
        assert [result.text for result in many] == ["PARIS!", "PARIS!"]


async def test_an_unknown_adapter_is_refused_and_the_message_names_those_that_there_are() -> None:
    async with scripted_engine("yes", adapters={"shout": "YES"}) as engine:
        with pytest.raises(InvalidRequestError, match="adapter is 'whisper'; loaded: 'shout'"):
            await engine.add_request("?", options=RequestOptions(adapter="whisper"))
        with pytest.raises(InvalidRequestError, match="expected the name of one, or None"):
            RequestOptions(adapter=5)  # type: ignore[arg-type]
        assert (await engine.generate("?")).text == "yes"


async def test_one_that_is_unloaded_while_a_request_is_given_refuses_it() -> None:
    async with shouting(loader_of()) as engine:
        going = asyncio.ensure_future(engine.unload_adapter("shout"))
        await asyncio.sleep(0)  # the instruction is given, and not answered
        with pytest.raises(InvalidRequestError, match="adapter is 'shout'; loaded: none"):
            await engine.generate("?", options=SHOUT)
        assert await going


async def test_unloading_ends_the_requests_that_use_it_and_no_others() -> None:
    loader = loader_of()
    async with shouting(loader, max_num_sequence=2, max_queue_size=1) as engine:
        loader.model.hold()
        # Two that run, one that waits, and one for which there is no room in the waiting queue.
        options = (SHOUT, RequestOptions(), SHOUT, SHOUT)
        adding = [asyncio.ensure_future(engine.add_request("?", options=own)) for own in options]
        for _ in range(5):  # by then all have been given
            await asyncio.to_thread(loader.model.wait_until_held)
            loader.model.let()
        await asyncio.to_thread(loader.model.wait_until_held)
        assert [task.done() for task in adding] == [True, True, True, False]
        going = asyncio.ensure_future(engine.unload_adapter("shout"))
        await asyncio.sleep(0)
        loader.model.release()
        assert await going
        assert engine.adapters == ()
        results = [await task.result() for task in adding[:3]] + [await (await adding[3])]
        reasons = [result.finish_reason for result in results]
        assert reasons == [FinishReason.ABORT, FinishReason.STOP, FinishReason.ABORT, FinishReason.ABORT]
        assert LONG.upper().startswith(results[0].text)
        assert results[1].text == LONG
        assert not await engine.unload_adapter("shout")
        assert engine.metrics().kv_blocks_used == 0


async def test_requests_go_on_with_one_that_is_loaded_anew() -> None:
    loader = loader_of()
    async with shouting(loader) as engine:
        loader.model.hold()
        stream = await engine.add_request("?", options=SHOUT)
        await asyncio.to_thread(loader.model.wait_until_held)
        going = asyncio.ensure_future(engine.load_adapter("shout", "hum"))
        for _ in range(3):
            loader.model.let()
            await asyncio.to_thread(loader.model.wait_until_held)
            if going.done():
                break
        loader.model.release()
        await going
        assert engine.adapters == ("shout",)
        result = await stream
        assert result.finish_reason is FinishReason.STOP  # the new script is over by now
        assert 0 < len(result.text) < len(LONG)
        assert (await engine.generate("?", options=SHOUT)).text == "hm"


async def test_what_was_computed_with_an_adapter_is_found_again_with_that_one_alone() -> None:
    """The scripted model raises if it reads what another one computed."""
    prompt, one = list(range(40)), GenerationConfig(max_tokens=1)
    async with shouting(loader_of(), kv_cache_page_size=4) as engine:

        async def cached(adapter: str | None) -> int:
            return (await engine.generate(prompt, one, RequestOptions(adapter=adapter))).usage.cached_tokens

        await engine.load_adapter("hum", "hum")
        assert [await cached(name) for name in (None, "shout", "hum")] == [0, 0, 0]
        assert [await cached(name) for name in (None, "shout", "hum")] == [36, 36, 36]
        await engine.load_adapter("hum", "hum")
        assert [await cached(name) for name in (None, "shout", "hum")] == [36, 36, 0]
        await engine.unload_adapter("shout")
        await engine.load_adapter("shout", "shout")
        assert [await cached(name) for name in (None, "shout", "hum")] == [36, 0, 36]
        assert engine.metrics().kv_blocks_cached == 30


async def test_one_that_is_not_there_is_said_so_and_changes_nothing() -> None:
    async with shouting(loader_of()) as engine:
        with pytest.raises(AdapterError, match="there is no scripted adapter 'whisper'"):
            await engine.load_adapter("shout", "whisper")
        for name in ("", 5, None):
            with pytest.raises(InvalidRequestError, match="expected a non-empty string"):
                await engine.load_adapter(name, "shout")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="expected a string"):
            await engine.unload_adapter(5)  # type: ignore[arg-type]
        assert (await engine.generate("?", options=SHOUT)).text == LONG.upper()


async def test_it_is_loaded_in_the_states_that_the_table_says() -> None:
    loader = loader_of()
    engine = shouting(loader)
    with pytest.raises(ModelNotLoadedError):
        await engine.load_adapter("hum", "hum")
    with pytest.raises(ModelNotLoadedError):
        await engine.unload_adapter("hum")
    async with engine:
        await engine.pause()
        await engine.load_adapter("hum", "hum")
        await engine.resume()
        await engine.sleep()
        with pytest.raises(IllegalStateError, match="cannot load_adapter while the engine is sleeping"):
            await engine.load_adapter("shout", "hum")
        with pytest.raises(IllegalStateError):
            await engine.unload_adapter("hum")
        await engine.wake()
        assert (await engine.generate("?", options=SHOUT)).text == LONG.upper()
    with pytest.raises(EngineClosedError):
        await engine.load_adapter("hum", "hum")
    with pytest.raises(EngineClosedError):
        await engine.unload_adapter("hum")


async def test_a_reload_brings_its_own_adapters() -> None:
    loader = loader_of()
    async with shouting(loader) as engine:
        await engine.load_adapter("hum", "hum")
        await engine.reload(EngineConfig(MODEL, adapters={"other": "hum"}))
        assert engine.adapters == ("other",)
        with pytest.raises(AdapterError, match="there is no scripted adapter 'whisper'"):
            await engine.reload(EngineConfig(MODEL, adapters={"x": "whisper"}))


async def test_an_adapter_that_was_read_for_a_model_that_went_is_read_again() -> None:
    loader = loader_of()
    async with shouting(loader) as engine:
        reload = asyncio.ensure_future(engine.reload(EngineConfig(MODEL)))
        load = asyncio.ensure_future(engine.load_adapter("hum", "hum"))
        await asyncio.gather(reload, load)
        assert engine.adapters == ("hum",)
        assert (await engine.generate("?", options=RequestOptions(adapter="hum"))).text == "hm"


@pytest.mark.parametrize("has_it", [True, False])
async def test_a_request_is_carried_over_a_reload_if_the_new_model_has_its_adapter(has_it: bool) -> None:
    loader = loader_of()
    loader.fits_beside = False  # or else the request might end before the new model is there
    async with shouting(loader) as engine:
        loader.model.hold()
        stream = await engine.add_request("?", options=SHOUT)
        await asyncio.to_thread(loader.model.wait_until_held)
        adapters = {"hum": "hum"} | ({"shout": "shout"} if has_it else {})
        reload = asyncio.ensure_future(engine.reload(EngineConfig(MODEL, adapters=adapters), in_flight="carry"))
        await asyncio.sleep(0)
        loader.model.release()
        await reload
        if has_it:
            assert (await stream).text == LONG.upper()
        else:
            with pytest.raises(InvalidRequestError, match="not have its adapter: adapter is 'shout'; loaded: 'hum'"):
                await stream
        assert engine.metrics().num_requests_running == 0


async def test_a_restart_brings_back_all_adapters_with_the_requests_that_wait() -> None:
    loader = loader_of()
    async with shouting(loader, max_num_sequence=1) as engine:
        await engine.load_adapter("hum", "hum")
        await engine.load_adapter("shout", "hum")
        await engine.pause()
        names = ("shout", "hum")
        lost, waits = [await engine.add_request("?", options=RequestOptions(adapter=name)) for name in names]
        loader.model.lose_device()
        await engine.resume()
        with pytest.raises(Exception, match="lost"):
            await lost
        assert engine.state is EngineState.FAILED
        with pytest.raises(EngineFailedError):
            await engine.load_adapter("hum", "hum")
        loader.adapters.clear()  # they need not be read again
        await engine.restart()
        assert engine.adapters == ("shout", "hum")
        assert engine.complete_engine_config.adapters == {"shout": "shout"}  # type: ignore[union-attr]
        assert (await waits).text == "hm"
        assert (await engine.generate("?", options=SHOUT)).text == "hm"


async def test_a_restart_brings_back_none_that_was_let_go() -> None:
    loader = loader_of()
    async with shouting(loader) as engine:
        await engine.load_adapter("hum", "hum")
        assert await engine.unload_adapter("shout")
        loader.model.lose_device()
        with pytest.raises(Exception, match="lost"):
            await engine.generate("?")
        await engine.restart()
        assert engine.adapters == ("hum",)
        assert (await engine.generate("?", options=RequestOptions(adapter="hum"))).text == "hm"
        await engine.load_adapter("shout", "shout")
        assert (await engine.generate("?", options=SHOUT)).text == LONG.upper()


async def test_adapters_stay_when_a_step_breaks_and_after_a_reset() -> None:
    loader = loader_of()
    async with shouting(loader) as engine:
        await engine.load_adapter("hum", "hum")
        loader.model.fail_next(ValueError("a fault"))
        with pytest.raises(Exception, match="a fault"):
            await engine.generate("?", options=SHOUT)
        await engine.reset()
        assert engine.adapters == ("shout", "hum")
        assert (await engine.generate("?", options=RequestOptions(adapter="hum"))).text == "hm"


async def test_a_cancelled_load_leaves_the_engine_with_it_or_without() -> None:
    loader = loader_of()
    async with shouting(loader) as engine:
        for steps in range(6):
            task = asyncio.ensure_future(engine.load_adapter("hum", "hum"))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await engine.resume()  # what was given before has been carried out
            assert set(engine.adapters) <= {"shout", "hum"}
        await engine.load_adapter("hum", "hum")
        assert (await engine.generate("?", options=RequestOptions(adapter="hum"))).text == "hm"


async def test_a_prompt_in_pieces_and_branches_have_it_too() -> None:
    async def pieces() -> Any:
        yield "one "
        await asyncio.sleep(0)
        yield "two"

    async with shouting(loader_of(), kv_cache_page_size=4) as engine:
        result = await engine.generate(pieces(), GenerationConfig(n=3), SHOUT)
        assert [branch.text for branch in result.outputs] == [LONG.upper()] * 3


async def test_a_model_without_a_format_takes_none() -> None:
    loader = loader_of()
    load = loader.load

    def plain(plan: Any) -> Any:
        import dataclasses

        return dataclasses.replace(load(plan), adapter_format=None, adapting=None)

    loader.load = plain  # type: ignore[method-assign]
    async with AsyncEngine(EngineConfig(MODEL), loader=loader) as engine:
        with pytest.raises(AdapterError, match="'scripted' takes no adapters"):
            await engine.load_adapter("hum", "hum")


async def test_the_trace_says_which_adapter_a_request_has() -> None:
    async with shouting(loader_of()) as engine:
        engine.trace.start()
        await engine.generate("?", options=SHOUT)
        await engine.generate("?")
        begun = [event["args"] for event in engine.trace.events() if (event["ph"], event["name"]) == ("b", "request")]
        assert [arguments.get("adapter") for arguments in begun] == ["shout", None]
