"""`AsyncEngine`: states and their transitions, the life of a model, requests that are wrong, and watching it all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from harness import LIMITS, Rig, endless, eventually, is_whole, read

from asyncengine import (
    AsyncEngine,
    AsyncEngineError,
    CheckpointError,
    ConfigError,
    ContextLengthExceededError,
    Deadlines,
    EngineClosedError,
    EngineConfig,
    EngineDrainingError,
    EngineFailedError,
    EngineOverloadedError,
    EngineState,
    FinishReason,
    GenerationConfig,
    IllegalStateError,
    InvalidRequestError,
    ModelNotLoadedError,
    ReloadError,
    RequestDroppedError,
    RequestOptions,
    StepError,
)
from asyncengine.loop.embedding import ClassificationOptions
from asyncengine.testing import ByteTokenizer, ScriptedLoader, echo

pytestmark = pytest.mark.timeout(15)

S = EngineState


# States


async def bring_to(rig: Rig, state: EngineState) -> None:
    engine = rig.engine
    if state is S.UNLOADED:
        await engine.unload()
    elif state is S.PAUSED:
        await engine.pause()
    elif state is S.SLEEPING:
        await engine.sleep()
    elif state is S.FAILED:
        rig.model.lose_device()
        with pytest.raises(StepError):
            await engine.generate("x")
    elif state is S.CLOSED:
        await engine.shutdown()
    assert engine.state is state


CALLS: dict[str, Callable[[AsyncEngine], Awaitable[Any]]] = {
    "add": lambda engine: engine.add_request("x"),
    "unload": lambda engine: engine.unload(),
    "reset": lambda engine: engine.reset(),
    "pause": lambda engine: engine.pause(),
    "resume": lambda engine: engine.resume(),
    "sleep": lambda engine: engine.sleep(),
    "wake": lambda engine: engine.wake(),
    "update": lambda engine: engine.update_weights({"w": 1}),
    "debug": lambda engine: engine.debug_call_func_on_all_workers("device_lost", None),
    "drain": lambda engine: engine.drain(),
    "restart": lambda engine: engine.restart(),
    "reload": lambda engine: engine.reload(EngineConfig("scripted", **LIMITS)),
    "abort": lambda engine: engine.abort_request("x"),
    "unpin": lambda engine: engine.unpin_prompt("x"),
    "pin": lambda engine: engine.pin_prompt("prompt"),
}

# What each call does in each state: the state after it, or what it raises. A pin waits for a step where there is none.
AFTER: dict[EngineState, dict[str, EngineState | type[Exception]]] = {
    S.UNLOADED: {
        "add": ModelNotLoadedError, "unload": S.UNLOADED, "reset": S.UNLOADED, "pause": ModelNotLoadedError,
        "resume": ModelNotLoadedError, "sleep": ModelNotLoadedError, "wake": ModelNotLoadedError,
        "update": ModelNotLoadedError, "debug": ModelNotLoadedError, "drain": ModelNotLoadedError,
        "restart": ModelNotLoadedError, "reload": S.READY, "abort": S.UNLOADED, "unpin": S.UNLOADED,
        "pin": ModelNotLoadedError,
    },
    S.READY: {
        "add": S.READY, "unload": S.UNLOADED, "reset": S.READY, "pause": S.PAUSED, "resume": S.READY,
        "sleep": S.SLEEPING, "wake": S.READY, "update": S.READY, "debug": S.READY, "drain": S.READY,
        "restart": IllegalStateError, "reload": S.READY, "abort": S.READY, "unpin": S.READY, "pin": S.READY,
    },
    S.PAUSED: {
        "add": S.PAUSED, "unload": S.UNLOADED, "reset": S.PAUSED, "pause": S.PAUSED, "resume": S.READY,
        "sleep": S.SLEEPING, "wake": IllegalStateError, "update": S.PAUSED, "debug": S.PAUSED,
        "drain": IllegalStateError, "restart": IllegalStateError, "reload": S.READY, "abort": S.PAUSED,
        "unpin": S.PAUSED,
    },
    S.SLEEPING: {
        "add": S.SLEEPING, "unload": S.UNLOADED, "reset": S.SLEEPING, "pause": IllegalStateError,
        "resume": IllegalStateError, "sleep": S.SLEEPING, "wake": S.READY, "update": IllegalStateError,
        "debug": S.SLEEPING, "drain": IllegalStateError, "restart": IllegalStateError, "reload": S.READY,
        "abort": S.SLEEPING, "unpin": S.SLEEPING,
    },
    S.FAILED: {
        "add": EngineFailedError, "unload": S.UNLOADED, "reset": EngineFailedError, "pause": EngineFailedError,
        "resume": EngineFailedError, "sleep": EngineFailedError, "wake": EngineFailedError,
        "update": EngineFailedError, "debug": EngineFailedError, "drain": EngineFailedError, "restart": S.READY,
        "reload": S.READY, "abort": S.FAILED, "unpin": S.FAILED, "pin": EngineFailedError,
    },
    S.CLOSED: {
        "add": EngineClosedError, "unload": EngineClosedError, "reset": EngineClosedError, "pause": EngineClosedError,
        "resume": EngineClosedError, "sleep": EngineClosedError, "wake": EngineClosedError,
        "update": EngineClosedError, "debug": EngineClosedError, "drain": EngineClosedError,
        "restart": EngineClosedError, "reload": EngineClosedError, "abort": EngineClosedError,
        "unpin": EngineClosedError, "pin": EngineClosedError,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("state", "call"), [(state, call) for state, calls in AFTER.items() for call in calls], ids=lambda x: str(x)
)
async def test_every_call_in_every_state(rig: Rig, state: EngineState, call: str) -> None:
    await bring_to(rig, state)
    expected = AFTER[state][call]
    if isinstance(expected, EngineState):
        await CALLS[call](rig.engine)
        assert rig.engine.state is expected
    else:
        with pytest.raises(expected) as caught:
            await CALLS[call](rig.engine)
        assert isinstance(caught.value, AsyncEngineError)
        assert rig.engine.state is state
    if state is not S.CLOSED:
        await rig.engine.reload(rig.config)  # from wherever it is
        await rig.serves()
        await rig.comes_to_rest()
    assert await rig.engine.shutdown() == ()
    assert rig.engine.state is S.CLOSED
    await eventually(lambda: rig.router.idle)


async def test_an_engine_begins_unloaded_and_without_a_thread() -> None:
    engine = AsyncEngine(loader=ScriptedLoader())
    assert engine.state is S.UNLOADED
    assert not engine._thread.alive
    assert engine.complete_engine_config is None
    with pytest.raises(ModelNotLoadedError):
        _ = engine.default_generation_config
    assert engine.metrics().kv_blocks_total == 0
    assert engine.health().ok


async def test_async_with_without_a_configuration_loads_nothing() -> None:
    async with AsyncEngine(loader=ScriptedLoader()) as engine:
        assert engine.state is S.UNLOADED
    assert engine.state is S.CLOSED


async def test_async_with_loads_and_leaves_nothing() -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    async with AsyncEngine(EngineConfig("m"), loader=loader) as engine:
        assert engine.state is S.READY
        assert (await engine.generate("hello")).text == "hello"
        stream = await engine.add_request("left running " * 10)
    assert engine.state is S.CLOSED
    assert loader.model.closed
    assert not engine._thread.alive
    await read(stream)
    assert stream.usage is not None
    with pytest.raises(EngineClosedError):
        await engine.generate("hello")
    assert engine._router().idle


async def test_a_load_that_fails_leaves_async_with() -> None:
    loader = ScriptedLoader()
    loader.load_errors["m"] = CheckpointError("no such file")
    engine = AsyncEngine(EngineConfig("m"), loader=loader)
    with pytest.raises(CheckpointError, match="no such file"):
        async with engine:
            raise AssertionError("it was entered")
    await eventually(lambda: engine.state is S.CLOSED)


async def test_while_draining_requests_finish_and_new_ones_are_refused() -> None:
    async with Rig(endless, step_seconds=0.0015) as rig:
        stream = await rig.engine.add_request("hello", GenerationConfig(max_tokens=300))
        draining = asyncio.create_task(rig.engine.drain())
        await eventually(lambda: rig.engine.state is S.DRAINING)
        with pytest.raises(EngineDrainingError) as caught:
            await rig.engine.add_request("no")
        assert caught.value.retryable
        for call in ("pause", "sleep", "drain", "reload", "update", "debug"):
            assert isinstance(await _outcome(CALLS[call](rig.engine)), IllegalStateError), call
            assert rig.engine.state is S.DRAINING
        assert not draining.done()
        await draining
        assert rig.engine.state is S.READY
        result = await stream
        assert (len(result.token_ids), result.finish_reason) == (300, FinishReason.LENGTH)
        await rig.serves()


async def test_unload_ends_a_drain() -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("hello")
        draining = asyncio.create_task(rig.engine.drain())
        await asyncio.sleep(0)
        unloading = asyncio.create_task(rig.engine.unload())
        await asyncio.sleep(0)
        rig.model.release()
        await asyncio.gather(draining, unloading)
        assert rig.engine.state is S.UNLOADED
        assert (await stream).finish_reason is FinishReason.ABORT


async def test_a_device_lost_while_draining_ends_the_drain() -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("hello")
        draining = asyncio.create_task(rig.engine.drain())
        await asyncio.sleep(0)
        rig.model.lose_device()
        rig.model.release()
        with pytest.raises(EngineFailedError):
            await draining
        with pytest.raises(StepError):
            await stream
        assert rig.engine.state is S.FAILED
        await rig.engine.restart()
        await rig.serves()


async def test_a_drain_notices_that_the_last_request_lost_its_loop() -> None:
    """The request belongs to a loop that is closed while it runs: nobody but the step thread can notice."""
    async with Rig(endless) as rig:
        rig.model.hold()
        leave = threading.Event()

        async def add() -> None:
            rig.kept = await rig.engine.add_request("hello")  # type: ignore[attr-defined]
            await asyncio.to_thread(leave.wait)

        elsewhere = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(add())))
        await rig.held()
        draining = asyncio.create_task(rig.engine.drain())
        await asyncio.sleep(0)
        await rig.let()
        assert rig.engine.state is S.DRAINING
        leave.set()
        await elsewhere
        rig.model.release()
        await asyncio.wait_for(draining, 5.0)
        assert rig.engine.state is S.READY
        await rig.comes_to_rest()


# The life of a model


async def test_reload_takes_a_configuration_or_its_json(rig: Rig) -> None:
    complete = await rig.engine.reload(rig.config.replace(max_num_sequence=3))
    assert complete.max_num_sequence == 3
    assert complete == rig.engine.complete_engine_config
    complete = await rig.engine.reload(rig.config.replace(max_num_sequence=5).to_json())
    assert complete.max_num_sequence == 5
    assert rig.engine.default_generation_config == GenerationConfig()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model": "m", "max_num_sequences": 3}', "did you mean 'max_num_sequence'"),
        ('{"model": 3}', "model is 3"),
        ('{"max_num_sequence": 3}', "no 'model'"),
        ("[]", "expected an object"),
        ("m", "EngineConfig"),
        ("", "not JSON"),
        ('{"model": "m", "additional_models": 5}', "additional_models"),
        (None, "expected EngineConfig"),
        ({"model": "m"}, "expected EngineConfig"),
        (5, "expected EngineConfig"),
    ],
)
@pytest.mark.loops("either")
async def test_a_wrong_configuration_changes_nothing(rig: Rig, config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await rig.engine.reload(config)
    assert rig.engine.state is S.READY
    assert len(rig.loader.models) == 1
    await rig.serves()
    if config is not None:
        with pytest.raises(ConfigError, match=message):
            AsyncEngine(config)


async def test_an_unknown_treatment_of_requests_changes_nothing(rig: Rig) -> None:
    for wrong in ("drop", None, [], 3):
        with pytest.raises(ConfigError, match="in_flight"):
            await rig.engine.reload(rig.config, wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"new_requests is .*; allowed: 'wait', 'serve'"):
            await rig.engine.reload(rig.config, new_requests=wrong)  # type: ignore[arg-type]
    await rig.serves()


async def test_concurrent_reloads_each_get_their_own_configuration(rig: Rig) -> None:
    configs = [rig.config.replace(max_num_sequence=n) for n in (2, 3, 4)]
    loaded = await asyncio.gather(*(rig.engine.reload(config) for config in configs))
    assert [config.max_num_sequence for config in loaded] == [2, 3, 4]
    assert rig.engine.complete_engine_config == loaded[-1]
    assert [model.closed for model in rig.loader.models] == [True, True, True, False]


async def test_concurrent_reloads_of_which_one_fails_each_get_their_own_outcome(rig: Rig) -> None:
    rig.loader.load_errors["broken"] = CheckpointError("a file is missing")
    outcomes = await asyncio.gather(
        rig.engine.reload(rig.config.replace(max_num_sequence=2)),
        rig.engine.reload(rig.config.replace(model="broken")),
        rig.engine.reload(rig.config.replace(max_num_sequence=4)),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], EngineConfig) and outcomes[0].max_num_sequence == 2
    assert isinstance(outcomes[1], CheckpointError)
    assert isinstance(outcomes[2], EngineConfig) and outcomes[2].max_num_sequence == 4


async def test_an_unload_beside_a_reload_is_not_taken_for_it(rig: Rig) -> None:
    reloaded, unloaded = await asyncio.gather(rig.engine.reload(rig.config), rig.engine.unload())
    assert isinstance(reloaded, EngineConfig)
    assert unloaded is None
    assert rig.engine.state is S.UNLOADED
    unloaded, reloaded = await asyncio.gather(rig.engine.unload(), rig.engine.reload(rig.config))
    assert isinstance(reloaded, EngineConfig)
    assert rig.engine.state is S.READY
    await rig.serves()


async def test_instructions_given_after_a_reload_wait_for_the_new_model(rig: Rig) -> None:
    rig.loader.gate = threading.Event()
    rig.loader.script = lambda prompt, branch: b"new"
    reloading = asyncio.create_task(rig.engine.reload(rig.config))
    await asyncio.sleep(0)
    adding = asyncio.create_task(rig.engine.generate("old"))
    many = asyncio.ensure_future(_results(rig.engine.generate_many(["a", "b"])))
    pausing = asyncio.create_task(rig.engine.pause())
    await eventually(lambda: (rig.engine.health().loading or "").startswith("loading"))
    assert not any(task.done() for task in (reloading, adding, many, pausing))
    rig.loader.gate.set()
    await asyncio.gather(reloading, pausing)
    assert rig.engine.state is S.PAUSED
    await rig.engine.resume()
    assert (await adding).text == "new"
    assert [result.text for result in await many] == ["new", "new"]
    await rig.comes_to_rest()


async def test_new_requests_may_be_served_while_the_new_model_is_loaded(rig: Rig) -> None:
    rig.loader.gate = threading.Event()
    rig.loader.script = lambda prompt, branch: b"new"
    reloading = asyncio.create_task(rig.engine.reload(rig.config, "wait", "serve"))
    await asyncio.sleep(0)
    assert (await rig.engine.generate("old")).text == "old"
    assert rig.engine.state is S.LOADING and rig.engine.health().admits
    rig.loader.gate.set()
    await reloading
    assert (await rig.engine.generate("old")).text == "new"
    await rig.comes_to_rest()


async def test_requests_in_flight_go_on_while_the_new_model_is_loaded(rig: Rig) -> None:
    rig.loader.gate = threading.Event()
    stream = await rig.add_held("before")
    reloading = asyncio.create_task(rig.engine.reload(rig.config))
    await asyncio.sleep(0)
    rig.model.release()
    assert (await stream).text == "before"  # on the old model
    rig.loader.gate.set()
    await reloading
    await rig.serves()


@pytest.mark.parametrize("fits_beside", [True, False])
@pytest.mark.parametrize(
    ("in_flight", "reason", "text"), [("abort", "abort", "a"), ("wait", "stop", "hello"), ("carry", "stop", "hello")]
)
async def test_requests_in_flight_at_a_reload(fits_beside: bool, in_flight: Any, reason: str, text: str) -> None:
    async with Rig(endless if in_flight == "abort" else echo, fits_beside=fits_beside, step_seconds=0.005) as rig:
        stream = await rig.add_held("hello")
        old = rig.model
        reloading = asyncio.create_task(rig.engine.reload(rig.config, in_flight))
        await asyncio.sleep(0)
        old.release()
        config = await reloading
        assert config.model == "scripted"
        assert rig.model is not old
        result = await stream
        assert result.finish_reason == reason
        if in_flight == "abort":
            assert result.text.startswith(text)
        else:
            assert result.text == text
        assert result.usage.completion_tokens == len(result.token_ids)
        await rig.comes_to_rest()
        if in_flight != "abort":
            await rig.serves()


async def test_a_failed_check_leaves_the_old_model_serving(rig: Rig) -> None:
    stream = await rig.add_held("hello")
    rig.loader.check_errors["broken"] = CheckpointError("config.json is missing")
    reloading = asyncio.create_task(rig.engine.reload(rig.config.replace(model="broken")))
    await asyncio.sleep(0)
    rig.model.release()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        await reloading
    assert rig.engine.state is S.READY
    assert (await stream).text == "hello"
    assert not rig.model.closed
    await rig.serves()


async def test_a_failed_load_beside_leaves_the_old_model_serving(rig: Rig) -> None:
    rig.loader.load_errors["broken"] = OSError("read error")
    with pytest.raises(ReloadError, match="read error") as caught:
        await rig.engine.reload(rig.config.replace(model="broken"))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.__traceback__ is not None
    assert rig.engine.state is S.READY
    await rig.serves()


async def test_a_failed_load_alone_leaves_the_engine_unloaded_and_usable() -> None:
    async with Rig(fits_beside=False) as rig:
        rig.loader.load_errors["broken"] = OSError("read error")
        reloading = asyncio.create_task(rig.engine.reload(rig.config.replace(model="broken")))
        await asyncio.sleep(0)
        adding = asyncio.create_task(rig.engine.add_request("x"))
        with pytest.raises(ReloadError, match="read error"):
            await reloading
        with pytest.raises(ModelNotLoadedError):
            await adding
        assert rig.engine.state is S.UNLOADED
        assert rig.engine.complete_engine_config is None
        await rig.comes_to_rest()
        await rig.engine.reload(rig.config)
        await rig.serves()


async def test_a_failed_load_alone_tells_the_requests_that_were_carried() -> None:
    async with Rig(fits_beside=False) as rig:
        stream = await rig.add_held("hello")
        rig.loader.load_errors["broken"] = OSError("read error")
        reloading = asyncio.create_task(rig.engine.reload(rig.config.replace(model="broken"), "carry"))
        await asyncio.sleep(0)
        rig.model.release()
        assert isinstance(await _outcome(reloading), ReloadError)
        outcome = await _outcome(stream)
        if not isinstance(outcome, ReloadError):  # it may have been through before
            assert outcome.text == "hello"
        await rig.comes_to_rest()


async def test_an_abort_reaches_a_request_behind_a_reload(rig: Rig) -> None:
    rig.loader.gate = threading.Event()
    reloading = asyncio.create_task(rig.engine.reload(rig.config))
    await asyncio.sleep(0)
    adding = asyncio.create_task(rig.engine.add_request("x", None, RequestOptions(request_id="mine")))
    await eventually(lambda: (rig.engine.health().loading or "").startswith("loading"))
    await rig.engine.abort_request("mine")
    adding.cancel()
    await asyncio.wait([adding])
    rig.loader.gate.set()
    await reloading
    await rig.comes_to_rest()
    assert rig.model.steps == 0


async def test_requests_behind_a_reload_are_served_by_the_new_model_though_it_needs_another_encoding(rig: Rig) -> None:
    class Shifted(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [byte + 1 for byte in super().encode(text)]

    rig.loader.tokenizer = Shifted()
    reloading = asyncio.create_task(rig.engine.reload(rig.config))
    await asyncio.sleep(0)
    adding = asyncio.create_task(rig.engine.generate("abc"))
    await reloading
    assert (await adding).text == "bcd"


async def test_unload_ends_streams_before_it_returns() -> None:
    async with Rig(endless) as rig:
        streams = [await rig.engine.add_request(f"request {i}") for i in range(3)]
        await rig.engine.unload()
        assert all(stream.ended for stream in streams)
        assert all(stream.usage is not None for stream in streams)
        assert rig.model.closed
        for stream in streams:
            assert (await stream).finish_reason is FinishReason.ABORT
        assert rig.engine.metrics().kv_blocks_total == 0
        with pytest.raises(ModelNotLoadedError):
            await rig.engine.add_request("x")


async def test_reset_ends_requests_and_zeroes_the_metrics() -> None:
    async with Rig(endless) as rig:
        await rig.engine.pin_prompt("a pinned prompt")
        stream = await rig.engine.add_request("hello")
        await anext(stream)
        await rig.engine.reset()
        assert stream.ended
        assert (await stream).finish_reason is FinishReason.ABORT
        metrics = rig.metrics()
        assert metrics.kv_blocks_free == metrics.kv_blocks_total
        assert metrics.counters.generation_tokens == metrics.counters.steps == 0
        await rig.serves()


async def test_pause_and_resume(rig: Rig) -> None:
    stream = await rig.add_held("hello")
    pausing = asyncio.create_task(rig.engine.pause())
    await asyncio.sleep(0)
    rig.model.release()
    await pausing
    steps = rig.model.steps
    waiting = await rig.engine.add_request("waits")
    await asyncio.sleep(0.02)
    assert rig.model.steps == steps
    assert not stream.ended
    await rig.engine.resume()
    assert (await stream).text == "hello"
    assert (await waiting).text == "waits"


async def test_sleep_and_wake(rig: Rig) -> None:
    stream = await rig.add_held("hello")
    sleeping = asyncio.create_task(rig.engine.sleep())
    await asyncio.sleep(0)
    rig.model.release()
    await sleeping
    assert rig.model.asleep
    waiting = await rig.engine.add_request("waits")
    steps = rig.model.steps
    await asyncio.sleep(0.02)
    assert rig.model.steps == steps
    await rig.engine.wake()
    assert (await stream).text == "hello"
    assert (await waiting).text == "waits"
    await rig.comes_to_rest()


async def test_restart_serves_those_that_waited() -> None:
    async with Rig(max_num_sequence=1) as rig:
        running = await rig.add_held("running")
        adding = asyncio.create_task(rig.engine.add_request("waiting"))
        await asyncio.sleep(0)
        await rig.let(2)
        waiting = await adding
        rig.model.lose_device()
        rig.model.release()
        with pytest.raises(StepError):
            await running
        await eventually(lambda: rig.engine.state is S.FAILED)
        health = rig.engine.health()
        assert not health.ok
        assert "device is lost" in health.problems[0]
        with pytest.raises(EngineFailedError):
            await rig.engine.add_request("x")
        assert (await rig.engine.restart()).model == "scripted"
        assert rig.engine.health().ok
        assert (await waiting).text == "waiting"


async def test_update_weights_keeps_the_requests(rig: Rig) -> None:
    stream = await rig.add_held("hello")
    updating = asyncio.create_task(rig.engine.update_weights({"w": 1}))
    await asyncio.sleep(0)
    rig.model.release()
    assert await updating == 1
    assert rig.model.weights == {"w": 1}
    assert (await stream).text == "hello"
    with pytest.raises(ReloadError, match="'v' is None"):
        await rig.engine.update_weights({"v": None})
    assert rig.model.weights == {"w": 1}
    assert await rig.engine.update_weights({}) == 2
    await rig.comes_to_rest()


async def test_a_debug_call_returns_or_raises_what_the_function_does(rig: Rig) -> None:
    model = rig.model
    model.where = lambda: threading.current_thread().name  # type: ignore[attr-defined]
    assert await rig.engine.debug_call_func_on_all_workers("where") == ["asyncengine-step"]

    def fail(error: BaseException) -> None:
        raise error

    model.fail = fail  # type: ignore[attr-defined]
    with pytest.raises(KeyError, match="mine"):
        await rig.engine.debug_call_func_on_all_workers("fail", KeyError("mine"))
    with pytest.raises(AttributeError):
        await rig.engine.debug_call_func_on_all_workers("no such function")
    with pytest.raises(TypeError):
        await rig.engine.debug_call_func_on_all_workers(None)  # type: ignore[arg-type]
    await rig.serves()


@pytest.mark.parametrize(
    "error", [StopIteration(3), StopAsyncIteration(), SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
async def test_a_debug_call_that_raises_something_odd_neither_hangs_nor_ends_anything(
    rig: Rig, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    rig.model.fail = fail  # type: ignore[attr-defined]
    calling = asyncio.create_task(_outcome(rig.engine.debug_call_func_on_all_workers("fail")))
    outcome = await asyncio.wait_for(calling, 5.0)
    assert isinstance(outcome, (RuntimeError, StopAsyncIteration))
    await rig.serves()


async def test_a_pinned_prompt_stays_until_it_is_unpinned() -> None:
    async with Rig(max_total_sequence_length=64, max_num_sequence=2) as rig:
        name = await rig.engine.pin_prompt("sixteen letters!")
        assert rig.metrics().kv_blocks_used == 4
        for i in range(5):
            await rig.engine.generate(f"other prompt {i}")
        result = await rig.engine.generate("sixteen letters! more")
        assert result.usage.cached_tokens == 16
        assert await rig.engine.unpin_prompt(name) is True
        assert await rig.engine.unpin_prompt(name) is False
        assert rig.metrics().kv_blocks_used == 0
        assert await rig.engine.pin_prompt("sixteen letters!", "mine") == "mine"
        assert await rig.engine.pin_prompt("another pinned one", "mine") == "mine"
        assert rig.metrics().kv_blocks_used == 4
        await rig.engine.unpin_prompt("mine")
        await rig.comes_to_rest()


@pytest.mark.parametrize("name", [[], {}, 3, b"pin"])
async def test_a_wrong_name_of_a_pin_harms_nobody(rig: Rig, name: Any) -> None:
    stream = await rig.add_held("hello")
    with pytest.raises(InvalidRequestError, match="expected a string"):
        await rig.engine.pin_prompt("prompt", name)
    with pytest.raises(InvalidRequestError, match="expected a string"):
        await rig.engine.unpin_prompt(name)
    rig.model.release()
    assert (await stream).text == "hello"


# Ends


async def test_shutdown_returns_what_was_left() -> None:
    async with Rig(endless) as rig:
        ids = ["first", "second"]
        streams = [await rig.engine.add_request("x", None, RequestOptions(request_id=name)) for name in ids]
        assert await rig.engine.shutdown() == ("first", "second")
        for stream in streams:
            result = await stream
            assert result.finish_reason is FinishReason.ABORT
            assert result.usage.completion_tokens == len(result.token_ids)
        assert await rig.engine.shutdown() == ()


async def test_shutdown_lets_requests_finish(rig: Rig) -> None:
    stream = await rig.add_held("hello")
    closing = asyncio.create_task(rig.engine.shutdown(30.0))
    await asyncio.sleep(0)
    adding = asyncio.create_task(rig.engine.add_request("x"))
    await asyncio.sleep(0)
    rig.model.release()
    assert await closing == ()
    with pytest.raises(EngineClosedError):
        await adding
    assert (await stream).text == "hello"


async def test_shutdown_ends_what_does_not_finish_in_time() -> None:
    async with Rig(endless, step_seconds=0.002) as rig:
        stream = await rig.engine.add_request("x", None, RequestOptions(request_id="slow"))
        begun = time.perf_counter()
        assert await rig.engine.shutdown(0.1) == ("slow",)
        assert 0.09 < time.perf_counter() - begun < 2.0
        result = await stream
        assert result.finish_reason is FinishReason.ABORT
        assert result.usage.completion_tokens > 1


async def test_shutdown_may_wait_without_limit(rig: Rig) -> None:
    stream = await rig.add_held("hello")
    closing = asyncio.create_task(rig.engine.shutdown(float("inf")))
    await asyncio.sleep(0)
    rig.model.release()
    assert await closing == ()
    assert (await stream).text == "hello"


@pytest.mark.parametrize("drain", [-1, float("nan"), "1", None, True, [1]])
async def test_a_wrong_drain_changes_nothing(rig: Rig, drain: Any) -> None:
    with pytest.raises(ConfigError, match="drain"):
        await rig.engine.shutdown(drain)
    await rig.serves()


async def test_shutdown_during_a_prefill() -> None:
    async with Rig(endless, prefill_chunk_size=4) as rig:
        rig.model.hold()
        adding = asyncio.create_task(rig.engine.add_request("a prompt of several chunks"))
        await rig.held()
        rig.model.let()
        stream = await adding
        await rig.held()
        closing = asyncio.create_task(rig.engine.shutdown())
        await asyncio.sleep(0)
        rig.model.release()
        assert await closing == (stream.request_id,)
        result = await stream
        assert (result.token_ids, result.finish_reason) == ([], FinishReason.ABORT)
        assert rig.model.closed


@pytest.mark.parametrize("loaded", [True, False])
async def test_shutdown_during_a_load(loaded: bool) -> None:
    rig = Rig()
    if loaded:
        await rig.engine.reload(rig.config)
    rig.loader.gate = threading.Event()
    loading = asyncio.create_task(rig.engine.reload(rig.config))
    behind = asyncio.create_task(rig.engine.add_request("x"))
    await eventually(lambda: (rig.engine.health().loading or "").startswith("loading"))
    assert await rig.engine.shutdown() == ()
    for task in (loading, behind):
        with pytest.raises(EngineClosedError):
            await task
    rig.loader.gate.set()
    await eventually(lambda: all(model.closed for model in rig.loader.models))
    await eventually(lambda: len(rig.loader.models) == 1 + loaded)


async def test_shutdown_twice_at_once(rig: Rig) -> None:
    stream = await rig.add_held("hello")
    closing = [asyncio.create_task(rig.engine.shutdown(drain)) for drain in (30.0, 20.0, 10.0)]
    await asyncio.sleep(0)
    rig.model.release()
    assert await asyncio.gather(*closing) == [(), (), ()]
    assert (await stream).text == "hello"
    assert await rig.engine.shutdown() == ()


async def test_a_second_shutdown_may_shorten_the_first() -> None:
    async with Rig(endless, step_seconds=0.001) as rig:
        await rig.engine.add_request("x", None, RequestOptions(request_id="long"))
        stream = await rig.engine.add_request("x", None, RequestOptions(request_id="too long"))
        closing = asyncio.create_task(rig.engine.shutdown(3600.0))
        await asyncio.sleep(0.01)
        assert await rig.engine.shutdown() == ("too long",)
        assert await closing == ("too long",)
        await stream


async def test_shutdown_without_a_loop() -> None:
    rig = Rig()
    rig.engine.reload_nowait()
    await rig.serves()
    await asyncio.to_thread(rig.engine.shutdown_nowait)
    assert rig.engine.state is S.CLOSED
    never_used = AsyncEngine(loader=ScriptedLoader())
    never_used.shutdown_nowait()
    assert never_used.state is S.CLOSED


async def test_a_stream_outlives_its_engine() -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("x")
    stream.abort()
    outputs = await read(stream)
    assert outputs[-1].finish_reason is FinishReason.ABORT
    assert is_whole(outputs, stream.result())


async def test_what_is_wrong_with_a_request_is_known_without_its_prompt(rig: Rig) -> None:
    check = rig.engine.check_request
    await check()
    await check(GenerationConfig(max_tokens=5), RequestOptions(deadlines=Deadlines(total=9)))
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "text"}}}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"config": GenerationConfig(logit_bias={5000: 1.0})}, "5000"),
        ({"config": GenerationConfig(response_format=schema)}, "response_format"),
        ({"config": 5}, "config is 5"),
        ({"options": 5}, "options is 5"),
        ({"options": RequestOptions(adapter="nobody")}, "nobody"),
        ({"kinds": ["image"]}, "the prompt has images; the model takes none"),
        ({"reading": ClassificationOptions()}, "cannot classify"),
    ]
    for arguments, says in wrong:
        with pytest.raises(InvalidRequestError, match=says):
            await check(**arguments)
    with pytest.raises(InvalidRequestError, match="the prompt has audio; the model takes none"):
        await rig.engine.check_media(["audio"])
    assert rig.model.steps == 0
    await rig.comes_to_rest()
    await rig.engine.unload()
    for checking in (check(), rig.engine.check_media([])):
        with pytest.raises(ModelNotLoadedError):
            await checking


# Admission


async def test_a_full_queue_refuses_or_lets_wait() -> None:
    async with Rig(max_queue_size=2, max_num_sequence=1) as rig:
        await rig.engine.pause()
        admitted = [await rig.engine.add_request(f"admitted {i}") for i in range(2)]
        with pytest.raises(EngineOverloadedError, match="max_queue_size is 2") as caught:
            await rig.engine.add_request("refused", None, RequestOptions(when_full="raise"))
        assert caught.value.retryable
        waiting = [asyncio.create_task(rig.engine.add_request(f"waits {i}")) for i in range(4)]
        await eventually(lambda: rig.metrics().num_requests_queued == 4)
        assert not any(task.done() for task in waiting)
        assert rig.metrics().counters.admission_rejections == 1
        waiting[1].cancel()  # a waiter that leaves loses nothing for the others
        await eventually(lambda: rig.metrics().num_requests_queued == 3)
        await rig.engine.resume()
        order = []
        for task in (waiting[0], waiting[2], waiting[3]):
            stream = await task
            order.append((await stream).text)
        assert order == ["waits 0", "waits 2", "waits 3"]
        assert [(await stream).text for stream in admitted] == ["admitted 0", "admitted 1"]
        await rig.comes_to_rest()


async def test_those_who_wait_for_room_are_admitted_in_order() -> None:
    order: list[str] = []

    def script(prompt: Any, branch: int) -> bytes:
        order.append(bytes(prompt).decode())
        return b"x"

    async with Rig(script, max_queue_size=1, max_num_sequence=1) as rig:
        await rig.engine.pause()
        tasks = [asyncio.create_task(rig.engine.generate(f"{i}")) for i in range(8)]
        await eventually(lambda: rig.metrics().num_requests_queued == 7)
        await rig.engine.resume()
        await asyncio.gather(*tasks)
        assert order == [f"{i}" for i in range(8)]


async def test_a_request_that_waits_for_room_can_be_aborted_by_its_id() -> None:
    async with Rig(max_queue_size=1, max_num_sequence=1) as rig:
        await rig.engine.pause()
        first = await rig.engine.add_request("first")
        waiting = asyncio.create_task(rig.engine.add_request("x", None, RequestOptions(request_id="mine")))
        await eventually(lambda: rig.metrics().num_requests_queued == 1)
        await rig.engine.abort_request("mine")
        result = await (await waiting)
        assert (result.token_ids, result.finish_reason) == ([], FinishReason.ABORT)
        assert result.usage.prompt_tokens == 1
        await rig.engine.resume()
        assert (await first).text == "first"
        await rig.comes_to_rest()


async def test_unload_ends_those_who_wait_for_room() -> None:
    async with Rig(max_queue_size=1, max_num_sequence=1) as rig:
        await rig.engine.pause()
        first = await rig.engine.add_request("first")
        waiting = asyncio.create_task(rig.engine.generate("second"))
        await eventually(lambda: rig.metrics().num_requests_queued == 1)
        await rig.engine.unload()
        assert (await waiting).finish_reason is FinishReason.ABORT
        assert (await first).finish_reason is FinishReason.ABORT
        await rig.comes_to_rest()


async def test_urgent_requests_go_first() -> None:
    order: list[str] = []

    def script(prompt: Any, branch: int) -> bytes:
        order.append(bytes(prompt).decode())
        return b"x"

    async with Rig(script, max_num_sequence=1) as rig:
        await rig.engine.pause()
        names = [("later", 5), ("normal", 0), ("normal too", 0), ("urgent", -10), ("huge", 10**30)]
        streams = [await rig.engine.add_request(name, None, RequestOptions(priority=p)) for name, p in names]
        await rig.engine.resume()
        for stream in streams:
            await stream
        assert order == ["urgent", "normal", "normal too", "later", "huge"]


# Request ids


async def test_a_duplicate_id_is_refused_and_the_first_is_untouched(rig: Rig) -> None:
    options = RequestOptions(request_id="twice")
    first = await rig.add_held("hello", None, options)
    second = asyncio.create_task(rig.engine.add_request("other", None, options))
    await asyncio.sleep(0)
    rig.model.release()
    with pytest.raises(InvalidRequestError, match="'twice'"):
        await second
    assert (await first).text == "hello"
    assert (await rig.engine.generate("again", None, options)).request_id == "twice"  # once it has ended
    await rig.comes_to_rest()


async def test_an_id_like_those_of_the_engine_takes_nobodys_place(rig: Rig) -> None:
    await rig.engine.pause()
    streams = [
        await rig.engine.add_request("x", None, RequestOptions(request_id=f"request-{number}"))
        for number in range(1, 20)
    ]
    streams += [await rig.engine.add_request("x") for _ in range(20)]
    assert len({stream.request_id for stream in streams}) == len(streams)
    await rig.engine.resume()
    for stream in streams:
        assert (await stream).text == "x"


async def test_abort_by_id_hits_exactly_one() -> None:
    async with Rig(endless) as rig:
        names = ["a", "ab", "abc", "b"]
        streams = {name: await rig.engine.add_request("x", None, RequestOptions(request_id=name)) for name in names}
        await rig.engine.abort_request("ab")
        assert streams["ab"].ended
        for unknown in ("ab", "", "abcd", "A"):
            await rig.engine.abort_request(unknown)
        assert {name for name in names if streams[name].ended} == {"ab"}
        for stream in streams.values():
            stream.abort()
        await rig.comes_to_rest()


@pytest.mark.parametrize("request_id", [None, 3, ["a"], {"a"}, {"a": 1}, b"a"])
@pytest.mark.loops("either")
async def test_aborting_something_that_is_no_id_harms_nobody(rig: Rig, request_id: Any) -> None:
    stream = await rig.add_held("hello")
    with pytest.raises(InvalidRequestError, match="request_id"):
        await rig.engine.abort_request(request_id)
    rig.model.release()
    assert (await stream).text == "hello"


@pytest.mark.parametrize("how", ["reset", "unload"])
async def test_a_score_and_a_pin_that_are_aborted_do_not_look_as_if_they_were_not(rig: Rig, how: str) -> None:
    rig.model.hold()
    calls = [
        asyncio.create_task(rig.engine.score(["x" * 200])),
        asyncio.create_task(rig.engine.pin_prompt("y" * 200, "mine")),
    ]
    await rig.held()
    await rig.let()
    ending = asyncio.create_task(getattr(rig.engine, how)())
    await asyncio.sleep(0)
    rig.model.release()
    await ending
    for call in calls:
        with pytest.raises(RequestDroppedError, match="it was aborted"):
            await call
    assert await rig.engine.unpin_prompt("mine") is False
    await rig.comes_to_rest()


async def test_abort_returns_once_the_blocks_are_free() -> None:
    async with Rig(endless) as rig:
        stream = await rig.engine.add_request("hello")
        await anext(stream)
        assert rig.metrics().kv_blocks_used > 0
        await rig.engine.abort_request(stream.request_id)
        assert rig.metrics().kv_blocks_used == 0
        assert stream.ended


# What a caller can get wrong


def _raising() -> Iterator[int]:
    yield 1
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is ''"),
        ([], "empty"),
        ((), "empty"),
        (iter([]), "empty"),
        (None, "expected a string or token ids"),
        (5, "expected a string or token ids"),
        (5.0, "expected a string or token ids"),
        (b"bytes", "expected a string or token ids"),
        (bytearray(b"bytes"), "expected a string or token ids"),
        ({1: 2}, "expected a string or token ids"),
        (object(), "expected a string or token ids"),
        (["a", "b"], "not a list of token ids"),
        ([1.0, 2.0], "not a list of token ids"),
        ([1, None], "not a list of token ids"),
        ([[1, 2], [3]], "not a list of token ids"),
        ([1, -1], "token id -1"),
        ([1, 257], r"token id 257; allowed: 0\.\.256"),
        ([10**30], "token id 1000"),
        ([1] * 1024, r"1024 tokens; allowed: 1\.\.1023"),
        ("x" * 5000, "5000 tokens"),
        ("\ud800", "cannot be encoded"),
        ("\ud800" * 2000, "cannot be encoded"),
    ],
    ids=lambda value: f"{value!r:.20}" if not isinstance(value, str) else "",
)
@pytest.mark.loops("either")
async def test_a_wrong_prompt_reaches_the_caller_only(rig: Rig, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        await rig.engine.add_request(prompt)
    assert isinstance(caught.value, ValueError)
    assert not caught.value.retryable
    assert rig.model.steps == 0
    assert rig.router.idle
    await rig.serves()


@pytest.mark.parametrize(
    "messages",
    [
        [], (), "hello", None, 5, {"role": "user"}, [{}], [{"content": "x"}], ["hello"], [{"role": 5, "content": "x"}],
        [None],
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.loops("either")
async def test_wrong_messages_reach_the_caller_only(rig: Rig, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="messages"):
        await rig.engine.chat(messages)
    assert rig.model.steps == 0
    await rig.serves()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GenerationConfig(stop_token_ids=[257]), "stop_token_ids has token id 257"),
        (GenerationConfig(logit_bias={257: 1.0}), "logit_bias has token id 257"),
        ({"max_tokens": 3}, "expected GenerationConfig"),
        ("greedy", "expected GenerationConfig"),
        (5, "expected GenerationConfig"),
    ],
)
async def test_a_wrong_configuration_of_a_request_reaches_the_caller_only(rig: Rig, config: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await rig.engine.add_request("hello", config)
    assert rig.model.steps == 0
    await rig.serves()


@pytest.mark.parametrize("options", [None, {}, "x", GenerationConfig()])
async def test_wrong_options_reach_the_caller_only(rig: Rig, options: Any) -> None:
    with pytest.raises(InvalidRequestError, match="expected RequestOptions"):
        await rig.engine.add_request("hello", None, options)
    await rig.serves()


@pytest.mark.parametrize(
    "values",
    [
        {"request_id": ""}, {"request_id": 5}, {"priority": 1.5}, {"priority": True}, {"priority": "high"},
        {"deadlines": 5}, {"when_full": "drop"}, {"when_full": []},
    ],
    ids=repr,
)  # fmt: skip
def test_options_check_their_values(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(values))):
        RequestOptions(**values)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "1", True, 10**400, [1]])
def test_deadlines_check_their_values(seconds: Any) -> None:
    for name in ("queue", "first_token", "total"):
        with pytest.raises(InvalidRequestError, match=name):
            Deadlines(**{name: seconds})


async def test_an_iterator_that_raises_reaches_the_caller_only(rig: Rig) -> None:
    with pytest.raises(ZeroDivisionError):
        await rig.engine.add_request(_raising())
    await rig.serves()


async def test_prompts_may_be_anything_that_yields_token_ids(rig: Rig) -> None:
    class Index:
        def __index__(self) -> int:
            return ord("c")

    ids = [*b"ab", ord("c")]
    for prompt in (ids, tuple(ids), iter(ids), (i for i in ids), {i: 0 for i in ids}.keys(), [*b"ab", Index()]):
        result = await rig.engine.generate(prompt)  # type: ignore[arg-type]
        assert result.text == "abc"


async def test_an_iterator_is_read_once_though_the_request_is_prepared_twice(rig: Rig) -> None:
    rig.loader.gate = threading.Event()
    reloading = asyncio.create_task(rig.engine.reload(rig.config))
    await asyncio.sleep(0)
    adding = asyncio.create_task(rig.engine.generate(iter(b"abc")))
    await asyncio.sleep(0)
    rig.loader.gate.set()
    await reloading
    assert (await adding).text == "abc"


async def test_a_prompt_just_below_the_limits_is_served() -> None:
    async with Rig(endless, max_total_sequence_length=64, max_single_sequence_length=1024) as rig:
        result = await rig.engine.generate([1] * 63)
        assert (result.finish_reason, len(result.token_ids)) == (FinishReason.LENGTH, 1)
        with pytest.raises(InvalidRequestError, match="KV cache capacity = 16 blocks x 4 tokens = 64"):
            await rig.engine.generate([1] * 64)
        await rig.comes_to_rest()


class Panic(BaseException):
    """As of a library in another language."""


@pytest.mark.parametrize("error", [ValueError, Panic])
async def test_parameters_that_the_model_refuses_end_that_request_only(rig: Rig, error: type[BaseException]) -> None:
    stream = await rig.add_held("hello")
    rig.model.refuse_next(error("cannot do that"))
    adding = asyncio.create_task(rig.engine.generate("refused"))
    await asyncio.sleep(0)
    rig.model.release()
    with pytest.raises(RequestDroppedError, match="cannot do that") as caught:
        await adding
    assert isinstance(caught.value.__cause__, error)
    assert (await stream).text == "hello"
    await rig.comes_to_rest()


@pytest.mark.parametrize("error", [Panic, SystemExit, asyncio.CancelledError])
async def test_a_tokenizer_that_panics_on_the_step_thread_ends_that_request_only(
    rig: Rig, error: type[BaseException]
) -> None:
    class Failing(ByteTokenizer):
        def decode(self, token_ids: Any, skip_special_tokens: bool = True) -> str:
            if ord("!") in token_ids:
                raise error("cannot decode")
            return super().decode(token_ids, skip_special_tokens)

    rig.loader.tokenizer = Failing()
    await rig.engine.reload(rig.config)
    other = await rig.add_held("hello")
    ids_alone = GenerationConfig(stop_strs="zz", detokenize=False)  # so that the loop does not decode
    failing = asyncio.create_task(rig.engine.generate([*b"ab!"], ids_alone))
    await asyncio.sleep(0)
    rig.model.release()
    with pytest.raises(RequestDroppedError, match="cannot decode"):
        await failing
    assert (await other).text == "hello"
    await rig.comes_to_rest()


async def test_a_tokenizer_that_fails_ends_that_request_only(rig: Rig) -> None:
    class Failing(ByteTokenizer):
        def decode(self, token_ids: Any, skip_special_tokens: bool = True) -> str:
            if ord("!") in token_ids:
                raise ZeroDivisionError("cannot decode")
            return super().decode(token_ids, skip_special_tokens)

    rig.loader.tokenizer = Failing()
    await rig.engine.reload(rig.config)
    other = await rig.add_held("hello")
    on_the_loop = asyncio.create_task(_outcome(rig.engine.generate("ab!")))
    on_the_step_thread = asyncio.create_task(_outcome(rig.engine.generate("ab!", GenerationConfig(stop_strs="zz"))))
    await asyncio.sleep(0)
    rig.model.release()
    assert isinstance(await on_the_loop, ZeroDivisionError)
    assert isinstance(await on_the_step_thread, RequestDroppedError | ZeroDivisionError)
    assert (await other).text == "hello"
    await rig.comes_to_rest()


async def test_a_failed_step_ends_its_batch_and_the_engine_goes_on() -> None:
    async with Rig(max_num_sequence=2) as rig:
        running = [await rig.add_held("the first"), await _add_beside(rig, "the second")]
        adding = asyncio.create_task(rig.engine.add_request("three"))
        await asyncio.sleep(0)
        await rig.let()
        waiting = await adding
        rig.model.fail_next(ValueError("broken"))
        rig.model.release()
        outcomes = [await _outcome(stream) for stream in running]
        assert all(isinstance(outcome, StepError) for outcome in outcomes)
        assert (await waiting).text == "three"
        assert rig.metrics().counters.failed_steps == 1
        await rig.comes_to_rest()
        await rig.serves()


# Many at once


async def test_many_requests_are_one_instruction(rig: Rig) -> None:
    given: list[Any] = []
    put = rig.engine._thread.put
    rig.engine._thread.put = lambda instruction: (given.append(instruction), put(instruction))[1]  # type: ignore
    results = await rig.engine.generate_many(["one", "two", [*b"three"]])
    assert [result.text for result in results] == ["one", "two", "three"]
    assert len(given) == 1
    assert len(given[0].requests) == 3


async def test_many_requests_read_as_one_stream(rig: Rig) -> None:
    many = rig.engine.generate_many(["one", "two", "three"], GenerationConfig(n=2, logprobs=True))
    outputs: list[list[Any]] = [[], [], []]
    async for index, output in many:
        outputs[index].append(output)
    for own, stream in zip(outputs, many.streams, strict=True):
        assert is_whole(own, stream.result())
    assert [stream.result().text for stream in many.streams] == ["one", "two", "three"]
    with pytest.raises(StopAsyncIteration):
        await anext(many)


async def test_many_requests_have_their_turn() -> None:
    """With something pending for all, none is served twice before another is served once."""
    async with Rig(endless) as rig:
        many = rig.engine.generate_many(["x"] * 3, GenerationConfig(max_tokens=20, n=2))
        async with many:
            await eventually(lambda: all(stream.ended for stream in many.streams))
            order = [index async for index, _ in many]
        assert order == [0, 1, 2, 0, 1, 2]


async def test_many_requests_of_several_branches_are_read_as_they_come() -> None:
    async with Rig(endless) as rig:
        results = await rig.engine.generate_many(["x", "y"], GenerationConfig(max_tokens=40, n=3))
        assert [len(branch.token_ids) for result in results for branch in result.outputs] == [40] * 6


async def test_many_requests_may_have_their_own_configurations() -> None:
    async with Rig(endless) as rig:
        configs = [GenerationConfig(max_tokens=2), None, GenerationConfig(max_tokens=4)]
        many = rig.engine.generate_many(["x"] * 3, configs)
        lengths = []
        async with many:
            async for index, output in many:
                if index == 1:
                    many.streams[1].abort()
                if output.finish_reason is not None and index != 1:
                    lengths.append(output.finish_reason)
        assert lengths == ["length", "length"]
        assert [len(many.streams[i].result().token_ids) for i in (0, 2)] == [2, 4]
        await rig.comes_to_rest()


async def test_one_of_many_that_fails_does_not_disturb_the_others(rig: Rig) -> None:
    await rig.engine.pause()
    many = rig.engine.generate_many(["one", "two", "three"])
    reading = asyncio.create_task(_deltas(many))
    await eventually(lambda: len(many.streams) == 3)
    rig.model.refuse_next(ValueError("not this one"))
    await rig.engine.resume()
    reasons = {index: output.finish_reason for index, output in await reading}
    assert reasons == {0: "error", 1: "stop", 2: "stop"}
    assert isinstance(many.streams[0].error, RequestDroppedError)
    with pytest.raises(RequestDroppedError, match="not this one"):
        await many
    await rig.comes_to_rest()


async def test_one_wrong_prompt_among_many_admits_none(rig: Rig) -> None:
    with pytest.raises(InvalidRequestError, match="token id 999"):
        await rig.engine.generate_many(["one", [999]])
    await rig.comes_to_rest()
    assert rig.model.steps == 0


@pytest.mark.parametrize("prompts", ["one prompt", b"bytes", {"a": 1}, 5, None])
async def test_many_prompts_must_be_a_list(rig: Rig, prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match="expected a list of prompts"):
        rig.engine.generate_many(prompts)


async def test_as_many_configurations_as_prompts(rig: Rig) -> None:
    with pytest.raises(InvalidRequestError, match="2 entries; expected one per prompt, 3"):
        rig.engine.generate_many(["a", "b", "c"], [None, None])


async def test_no_prompts_give_no_results(rig: Rig) -> None:
    assert await rig.engine.generate_many([]) == []
    assert [item async for item in rig.engine.generate_many(iter(()))] == []  # type: ignore[arg-type]


async def test_ids_of_many_are_numbered(rig: Rig) -> None:
    many = rig.engine.generate_many(["a", "b"], None, RequestOptions(request_id="mine", label="L"))
    await many
    assert [stream.request_id for stream in many.streams] == ["mine-0", "mine-1"]
    assert [stream.label for stream in many.streams] == ["L", "L"]


async def test_leaving_many_aborts_all() -> None:
    async with Rig(endless) as rig:
        async with rig.engine.generate_many(["a", "b", "c"]) as many:
            await anext(many)
        await rig.comes_to_rest()
        assert all(stream.ended for stream in many.streams)


async def test_closing_many_ends_the_reader() -> None:
    async with Rig(endless) as rig:
        await rig.engine.pause()
        many = rig.engine.generate_many(["a", "b"])
        reading = asyncio.create_task(_deltas(many))
        await eventually(lambda: len(many.streams) == 2)
        await asyncio.sleep(0)
        await many.aclose()
        assert await asyncio.wait_for(reading, 5.0) == []
        await rig.comes_to_rest()


async def test_two_readers_of_many_are_refused_without_harm() -> None:
    async with Rig(endless) as rig:
        await rig.engine.pause()
        many = rig.engine.generate_many(["a", "b"], GenerationConfig(max_tokens=5))
        reading = asyncio.create_task(_deltas(many))
        await asyncio.sleep(0)
        with pytest.raises(IllegalStateError, match="another task"):
            await anext(many)
        await eventually(lambda: len(many.streams) == 2)
        await asyncio.sleep(0)
        with pytest.raises(IllegalStateError, match="another task"):
            await anext(many)
        with pytest.raises(IllegalStateError, match="another task"):
            await anext(many.streams[0])
        await rig.engine.resume()
        assert {index for index, _ in await reading} == {0, 1}
        assert [len(result.token_ids) for result in await many] == [5, 5]


async def test_a_pending_stream_is_begun_once(rig: Rig) -> None:
    pending = rig.engine.stream("hello")
    first = asyncio.create_task(_outcome(pending))
    second = asyncio.create_task(_outcome(pending))
    outcomes = await asyncio.gather(first, second)
    assert outcomes[0].text == "hello"
    assert isinstance(outcomes[1], IllegalStateError)
    assert rig.metrics().counters.requests["stop"] == 1
    assert (await pending).text == "hello"


async def test_a_pending_stream_that_was_closed_does_not_begin(rig: Rig) -> None:
    pending = rig.engine.stream("hello")
    await pending.aclose()
    assert [output async for output in pending] == []
    with pytest.raises(IllegalStateError):
        await pending
    many = rig.engine.generate_many(["hello"])
    await many.aclose()
    assert [item async for item in many] == []
    assert rig.model.steps == 0


async def test_chat_streams_or_returns_whole(rig: Rig) -> None:
    messages = [{"role": "user", "content": "hi"}]
    whole = await rig.engine.chat(messages)
    assert whole.text == "user: hi\nassistant: "
    text = "".join([output.text async for output in rig.engine.chat(messages)])
    assert text == whole.text


async def test_without_a_tokenizer_only_token_ids_are_taken() -> None:
    async with AsyncEngine(EngineConfig("m"), loader=ScriptedLoader(echo)) as engine:
        result = await engine.generate([1, 2, 3])
        assert (result.text, result.token_ids) == ("", [1, 2, 3, 256])
        for attempt in (
            engine.generate("text"),
            engine.generate("text " * 1000),
            engine.generate([1], GenerationConfig(stop_strs="x")),
            engine.chat([{"role": "user", "content": "x"}]),
        ):
            with pytest.raises(InvalidRequestError, match="tokenizer"):
                await attempt


# Watching it


async def test_metrics_and_health_do_not_wait_for_a_step(rig: Rig) -> None:
    await rig.engine.reload(rig.config.replace(step_timeout=0.01))
    stream = await rig.add_held("hello")
    await asyncio.sleep(0.05)
    begun = time.perf_counter()
    metrics, health = rig.engine.metrics(), rig.engine.health()
    assert time.perf_counter() - begun < 0.02
    assert metrics.num_requests_running == 1
    assert metrics.step_running_seconds > 0.04
    assert not health.ok
    assert "step_timeout is 0.01" in health.problems[0]
    assert health.step_running_seconds > 0.04
    rig.model.release()
    await stream
    assert rig.engine.health().ok
    assert rig.metrics().step_running_seconds == 0.0


@pytest.mark.loops("either")
async def test_metrics_can_be_read_while_steps_change_everything() -> None:
    async with Rig(endless, max_num_sequence=32) as rig:
        stop = threading.Event()
        wrong: list[object] = []

        def look() -> None:
            while not stop.is_set():
                try:
                    metrics, health = rig.engine.metrics(), rig.engine.health()
                    if not health.ok or metrics.num_requests_waiting < 0:
                        wrong.append((metrics, health))
                except Exception as error:
                    wrong.append(error)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            for i in range(4):
                await rig.engine.generate_many(["x"] * 20, GenerationConfig(max_tokens=5, n=1 + i % 2))
                await rig.engine.reload(rig.config)
        finally:
            stop.set()
            thread.join()
        assert wrong == []


async def test_metrics_count_what_happened(rig: Rig) -> None:
    await rig.engine.generate_many(["ab", "cd", "ef"])
    counters = rig.metrics().counters
    assert counters.prompt_tokens == 6
    assert counters.generation_tokens == 9
    assert counters.requests == {"stop": 3, "length": 0, "abort": 0, "error": 0}
    assert counters.e2e_request_latency_seconds.count == 3
    assert counters.time_to_first_token_seconds.count == 3
    assert rig.metrics().loop_wakeups > 0
    assert rig.metrics().handoff_max_seconds >= rig.metrics().handoff_seconds > 0


async def test_the_trace_tells_of_every_request(rig: Rig) -> None:
    rig.engine.trace.start()
    result = await rig.engine.generate("hello")
    events = rig.engine.trace.events()
    own = [event for event in events if event.get("cat") == "request"]
    assert [event["ph"] for event in own if event["ph"] in "be"] == ["b", "e"]
    assert own[0]["args"]["id"] == result.request_id


# Helpers


async def _add_beside(rig: Rig, prompt: str) -> Any:
    adding = asyncio.create_task(rig.engine.add_request(prompt))
    await asyncio.sleep(0)
    await rig.let(2)
    return await adding


async def _outcome(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except Exception as error:
        return error


async def _results(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def _deltas(many: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in many]


async def test_whoever_forgets_to_enter_the_engine_is_told_so() -> None:
    rig = Rig()
    engine = AsyncEngine(rig.config, loader=rig.loader)
    with pytest.raises(ModelNotLoadedError, match="there is no model yet: 'async with engine' loads"):
        await engine.generate("x")
    async with engine:
        await engine.generate("x", GenerationConfig(max_tokens=1))
        await engine.unload()
        with pytest.raises(ModelNotLoadedError, match="there is no model; call reload first"):
            await engine.generate("x")
    with pytest.raises(EngineClosedError):
        await engine.generate("x")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("", r"prompts\[1\]: the prompt is ''"),
        ([999], r"prompts\[1\]: the prompt has token id 999; allowed: 0\.\.256"),
        ([1, True], r"prompts\[1\]: the prompt is not a list of token ids: it has True"),
        ("x" * 5000, r"prompts\[1\]: the prompt has 5000 tokens; allowed: 1\.\."),
    ],
)
async def test_of_many_prompts_the_wrong_one_is_named(rig: Rig, wrong: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        await rig.engine.generate_many(["one", wrong, "three"])
    assert isinstance(refused.value, ContextLengthExceededError) == (len(wrong) == 5000)
    assert rig.router.idle
