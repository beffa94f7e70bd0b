"""The compiled delivery and the one in Python: the same outputs, the same endings, on every loop."""

from __future__ import annotations

import asyncio
import gc
import inspect
import sysconfig
import weakref
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from harness import Rig, endless, eventually

from asyncengine import (
    AsyncEngine,
    EngineConfig,
    FinishReason,
    GenerationConfig,
    IllegalStateError,
    PendingStream,
    RequestOutput,
    RequestStream,
    StepError,
)
from asyncengine.builds import BuildError
from asyncengine.loop import delivery
from asyncengine.loop.branch import Branch

pytestmark = pytest.mark.timeout(60)
TOKENS = GenerationConfig(max_tokens=200, detokenize=False)


@pytest.fixture(params=["python", "compiled"])
def way(request: pytest.FixtureRequest, compiled_delivery: bool) -> Iterator[str]:
    if request.param == "compiled" and not compiled_delivery:
        pytest.skip("cannot be compiled here")
    (delivery.use_compiled if request.param == "compiled" else delivery.use_python)()
    yield request.param
    delivery.use_python()


async def read(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


@pytest.mark.parametrize(
    "config",
    [
        TOKENS,
        GenerationConfig(max_tokens=200),
        GenerationConfig(max_tokens=50, n=3),
        GenerationConfig(max_tokens=50, logprobs=True, top_logprobs=2, detokenize=False),
        GenerationConfig(max_tokens=200, stop_strs=["xyz"]),
        GenerationConfig(max_tokens=1, detokenize=False),
        GenerationConfig(max_tokens=0, detokenize=False),
    ],
    ids=["tokens", "text", "n", "logprobs", "stop", "one", "none"],
)
async def test_deltas_are_the_result(way: str, config: GenerationConfig) -> None:
    async with Rig(endless) as rig:
        streams = [await rig.engine.add_request("x", config) for _ in range(3)]
        for stream, deltas in zip(streams, await asyncio.gather(*map(read, streams)), strict=True):
            result = stream.result()
            for index, output in enumerate(result.outputs):
                own = [delta for delta in deltas if delta.index == index]
                assert [token for delta in own for token in delta.token_ids] == output.token_ids
                assert "".join(delta.text for delta in own) == output.text
                assert [delta.finish_reason for delta in own if delta.finish_reason] == [output.finish_reason]
                assert all(type(delta) is RequestOutput for delta in own)
            assert stream.usage is not None
            assert stream.usage.completion_tokens == sum(len(output.token_ids) for output in result.outputs)
        await rig.comes_to_rest()


async def test_a_reader_that_lags_gets_one_delta(way: str) -> None:
    async with Rig(endless) as rig:
        before = rig.engine.metrics().merged_deltas
        stream = await rig.engine.add_request("x", TOKENS)
        await eventually(lambda: stream.ended)
        (delta,) = [output async for output in stream]
        assert len(delta.token_ids) == 200
        assert rig.engine.metrics().merged_deltas - before == 199


async def test_cancelling_a_reader_that_waits_aborts(way: str) -> None:
    async with Rig(endless) as rig:
        await rig.engine.pause()
        stream = await rig.engine.add_request("x", TOKENS)
        task = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await rig.engine.resume()
        await rig.comes_to_rest()
        assert (await stream).finish_reason is FinishReason.ABORT


async def test_breaking_aborts(way: str) -> None:
    async with Rig(endless) as rig:
        async for _ in await rig.engine.add_request("x", GenerationConfig(max_tokens=2000, detokenize=False)):
            break
        await rig.comes_to_rest()


async def test_two_readers_of_one_stream_are_told(way: str) -> None:
    async with Rig(endless) as rig:
        await rig.engine.pause()
        stream = await rig.engine.add_request("x", TOKENS)
        first = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        with pytest.raises(IllegalStateError, match="another task is reading"):
            await read(stream)
        await rig.engine.resume()
        assert sum(len(delta.token_ids) for delta in await first) == 200


async def test_one_iterator_in_two_tasks_is_told(way: str) -> None:
    async with Rig(endless) as rig:
        await rig.engine.pause()
        iterator = aiter(await rig.engine.add_request("x", TOKENS))
        first = asyncio.ensure_future(anext(iterator))
        await asyncio.sleep(0)
        with pytest.raises(IllegalStateError, match="another task is reading"):
            await anext(iterator)
        await rig.engine.resume()
        assert (await first).token_ids


async def test_a_task_that_gives_an_iterator_up_does_not_strand_another_that_took_its_delta(way: str) -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("x", TOKENS)
        (branch,) = stream._inbox.branches
        iterator = aiter(stream)
        await anext(iterator)
        first = asyncio.ensure_future(anext(iterator))
        await asyncio.sleep(0)

        async def take_two() -> list[RequestOutput | None]:
            return [await anext(iterator, None), await anext(iterator, None)]

        second = asyncio.create_task(take_two())
        delivery.deliver_tokens([branch], [7])  # wakes `first`, but `second` runs before it
        first.cancel()
        rig.model.release()
        taken = await asyncio.wait_for(second, 5.0)
        assert taken[0] is not None and taken[0].token_ids == [7]
        assert taken[1] is not None
        assert first.cancelled()
        await rig.comes_to_rest()


async def test_dropping_what_waits_for_a_delta_aborts(way: str) -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("x", TOKENS)
        await anext(aiter(stream))
        waits = aiter(stream).__anext__()
        assert asyncio.isfuture(waits.send(None))  # type: ignore[attr-defined]
        del waits
        rig.model.release()
        assert (await stream).finish_reason is FinishReason.ABORT
        await rig.comes_to_rest()


async def test_a_delta_has_no_hash_of_its_own(way: str) -> None:
    async with Rig(endless) as rig:
        async for delta in await rig.engine.add_request("x", TOKENS):
            with pytest.raises(TypeError, match="unhashable type: 'list'"):
                hash(delta)


async def test_the_next_delta_may_be_a_task_and_may_time_out(way: str) -> None:
    async with Rig(endless) as rig:
        stream = await rig.engine.add_request("x", TOKENS)
        iterator = aiter(stream)
        assert (await asyncio.create_task(iterator.__anext__())).token_ids  # type: ignore[arg-type]
        await rig.engine.pause()
        with pytest.raises(TimeoutError):
            while True:
                await asyncio.wait_for(anext(iterator), 0.01)
        await rig.engine.resume()
        await rig.comes_to_rest()  # the reader was cancelled, so the request has ended


async def test_closing_wakes_whoever_waits(way: str) -> None:
    async with Rig(endless) as rig:
        await rig.engine.pause()
        stream = await rig.engine.add_request("x", TOKENS)
        task = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        await stream.aclose()
        assert await task == []
        await rig.engine.resume()
        await rig.comes_to_rest()


async def test_an_iterator_can_be_closed_by_itself(way: str) -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("x", TOKENS)
        async with aclosing(aiter(stream)) as deltas:
            assert (await anext(deltas)).token_ids
            waiting = asyncio.ensure_future(anext(deltas, None))
            await asyncio.sleep(0)
            await deltas.aclose()
            assert await waiting is None
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        rig.model.release()
        await rig.comes_to_rest()


async def test_a_pending_stream_hands_on_what_its_reader_gives(way: str) -> None:
    async with Rig(endless) as rig:
        pending = rig.engine.stream("x", TOKENS)
        ids = list((await anext(pending)).token_ids)
        following = pending.__anext__()
        assert inspect.iscoroutine(following) is (way == "python")
        ids += (await following).token_ids
        ids += [token for delta in [delta async for delta in pending] for token in delta.token_ids]
        assert pending.stream is not None
        assert ids == pending.stream.result().token_ids
        await rig.comes_to_rest()


@pytest.mark.parametrize("how", ["cancelled", "timed out", "closed", "dropped", "body"])
async def test_leaving_a_pending_stream_that_has_begun_ends_its_request(way: str, how: str) -> None:
    async with Rig(endless) as rig:
        rig.model.hold()
        pending = rig.engine.chat([{"role": "user", "content": "x"}], TOKENS)
        reading = asyncio.ensure_future(anext(pending))
        await rig.held()
        rig.model.let()
        assert (await reading).token_ids == [ord("a")]
        await rig.held()
        waiting = asyncio.ensure_future(anext(pending))
        await asyncio.sleep(0)
        if how == "cancelled":
            waiting.cancel()
            await asyncio.wait([waiting])
            assert waiting.cancelled()
        elif how == "timed out":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(waiting, 0.001)
        elif how == "closed":
            await pending.aclose()
            with pytest.raises(StopAsyncIteration):
                await waiting
        else:
            rig.model.let()
            assert (await waiting).token_ids == [ord("b")]
            await rig.held()
        kept = [pending]
        del pending, waiting, reading
        if how == "dropped":
            kept.clear()
        elif how == "body":
            task = asyncio.create_task(_stays_in_the_body(kept))
            rig.model.let()
            await rig.held()
            task.cancel()
            await asyncio.wait([task])
        rig.model.release()
        await rig.comes_to_rest()
        assert rig.model.steps < 10


async def _stays_in_the_body(pending: list[PendingStream]) -> None:
    async for _ in pending.pop():
        await asyncio.sleep(3600)


async def test_two_readers_of_a_pending_stream_are_told(way: str) -> None:
    async with Rig(endless) as rig:
        pending = rig.engine.stream("x", TOKENS)
        await anext(pending)
        await rig.engine.pause()
        assert pending.stream is not None
        pending.stream.take()
        first = asyncio.ensure_future(anext(pending))
        await asyncio.sleep(0)
        with pytest.raises(IllegalStateError, match="another task is reading"):
            await anext(pending)
        await rig.engine.resume()
        assert (await first).token_ids


async def test_an_error_comes_once(way: str) -> None:
    async with Rig(endless) as rig:
        stream = await rig.engine.add_request("x", TOKENS)
        rig.loader.models[-1].fail_next(ZeroDivisionError("the step fails"))
        with pytest.raises(StepError):
            await read(stream)
        assert await read(stream) == []


@pytest.mark.loops("either")
async def test_a_stream_that_was_read_is_let_go(way: str) -> None:
    async with Rig(endless) as rig:
        stream = await rig.engine.add_request("x", TOKENS)
        await read(stream)
        gone = weakref.ref(stream)
        del stream
        gc.collect()
        assert gone() is None


async def test_ways_may_change_while_a_stream_is_read(way: str, compiled_delivery: bool) -> None:
    if not compiled_delivery:
        pytest.skip("cannot be compiled here")
    async with Rig(endless) as rig:
        stream = await rig.engine.add_request("x", TOKENS)
        ids: list[int] = []
        for turn in range(200):
            (delivery.use_python if turn % 2 else delivery.use_compiled)()
            if (output := await anext(aiter(stream), None)) is None:
                break
            ids += output.token_ids
        assert ids == stream.result().outputs[0].token_ids


def test_wrong_arguments_of_compiled_code_are_errors(compiled_delivery: bool) -> None:
    if not compiled_delivery:
        pytest.skip("cannot be compiled here")
    delivery.use_compiled()
    deliver, reader = delivery.deliver_tokens, delivery.reader_type
    delivery.use_python()
    assert reader is not None
    with pytest.raises(ValueError, match="as many"):
        deliver([Branch()], [])
    with pytest.raises(TypeError, match="expected a Branch, not int"):
        deliver([1], [2])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="a list"):
        deliver((), ())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a Branch, not str"):
        reader(None, "branch", None)


@pytest.mark.parametrize("lacking", ["headers", "compiler", "gil"])
def test_without_what_it_takes_python_goes_on(lacking: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(delivery, "_module", None)
    if lacking == "headers":
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    elif lacking == "compiler":
        monkeypatch.setenv("CC", "/nonexistent")
    else:
        monkeypatch.setattr(sysconfig, "get_config_var", lambda name: 1)
    with pytest.raises(BuildError, match={"headers": "Python.h", "compiler": "nonexistent", "gil": "GIL"}[lacking]):
        delivery.use_compiled()
    assert delivery.deliver_tokens is delivery.deliver_tokens_in_python
    assert delivery.reader_type is None


async def test_an_engine_says_when_its_tokens_are_delivered_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BuildError("no compiler today")

    monkeypatch.setattr(delivery, "use_compiled", fail)
    async with AsyncEngine(EngineConfig("tiny", device="cpu")) as engine:
        assert any("no compiler today" in note for note in engine.health().notes)
        assert (await engine.generate("Once", GenerationConfig(max_tokens=3))).usage.completion_tokens > 0
