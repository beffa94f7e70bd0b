"""`RequestStream`: deltas, merging, ends, and who may read."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from harness import Rig, endless, eventually, is_whole, joined, read

from asyncengine import (
    DeadlineExceededError,
    Deadlines,
    EngineState,
    FinishReason,
    GenerationConfig,
    IllegalStateError,
    RequestOptions,
    RequestStream,
    StepError,
)

pytestmark = pytest.mark.timeout(60)


async def test_deltas_are_the_result(rig: Rig) -> None:
    stream = await rig.engine.add_request("Grüße, 世界 🙂", GenerationConfig(logprobs=True, top_logprobs=1))
    outputs = await read(stream)
    result = stream.result()
    assert is_whole(outputs, result)
    assert result.text == "Grüße, 世界 🙂"
    assert result.outputs[0].logprobs is not None
    assert len(result.outputs[0].logprobs) == len(result.token_ids) == result.usage.completion_tokens


async def test_a_slow_reader_gets_fewer_and_larger_deltas() -> None:
    async with Rig(endless) as rig:
        stream = await rig.engine.add_request("x", GenerationConfig(max_tokens=300, logprobs=True))
        outputs = [await anext(stream)]
        await eventually(lambda: stream.ended)
        outputs += await read(stream)
        assert len(outputs) == 2
        assert len(outputs[1].token_ids) + len(outputs[0].token_ids) == 300
        assert is_whole(outputs, stream.result())
        assert rig.metrics().merged_deltas >= 298


async def test_a_slow_reader_never_sees_a_broken_character() -> None:
    answer = "äöü€🙂" * 20
    async with Rig(lambda prompt, branch: answer.encode()) as rig:
        rig.model.hold()
        adding = asyncio.create_task(rig.engine.add_request("x"))
        await rig.held()
        await rig.let()
        stream = await adding
        outputs = []
        for steps in [1, 2, 1, 3, 5, 1, 1, 4, 7]:
            await rig.let(steps)
            if (output := stream.take()) is not None:
                outputs.append(output)
        rig.model.release()
        outputs += await read(stream)
        assert "�" not in "".join(output.text for output in outputs)
        assert joined(outputs)[0] == answer
        assert is_whole(outputs, stream.result())


async def test_an_unread_stream_holds_one_delta_per_branch() -> None:
    async with Rig(endless) as rig:
        stream = await rig.engine.add_request("x", GenerationConfig(max_tokens=200, n=3))
        await eventually(lambda: stream.ended)
        outputs = await read(stream)
        assert sorted((output.index, len(output.token_ids)) for output in outputs) == [(0, 200), (1, 200), (2, 200)]


async def test_three_branches_each_are_whole() -> None:
    async with Rig(lambda prompt, branch: [*prompt, ord("0") + branch] * (branch + 1)) as rig:
        stream = await rig.engine.add_request("ab", GenerationConfig(n=3, logprobs=True))
        outputs = await read(stream)
        result = stream.result()
        assert [branch.text for branch in result.outputs] == ["ab0", "ab1ab1", "ab2ab2ab2"]
        assert [branch.index for branch in result.outputs] == [0, 1, 2]
        assert is_whole(outputs, result)
        assert result.usage.prompt_tokens == 2
        assert result.usage.completion_tokens == sum(len(branch.token_ids) for branch in result.outputs)


async def test_branches_have_their_turn() -> None:
    """A reader that takes one delta per step does not see the first branch only."""
    async with Rig(endless) as rig:
        stream = await rig.add_held("x", GenerationConfig(n=3))
        order = []
        for _ in range(6):
            await rig.let()
            order.append((await anext(stream)).index)
        assert order == [0, 1, 2, 0, 1, 2]
        stream.abort()


@pytest.mark.loops("either")
@pytest.mark.loops("either")
async def test_many_branches_are_read_in_linear_time() -> None:
    async with Rig(
        lambda prompt, branch: endless(prompt, 0),
        max_num_sequence=1024,
        max_total_sequence_length=65536,
        max_single_sequence_length=64,
    ) as rig:
        stream = await rig.engine.add_request("x", GenerationConfig(max_tokens=5, n=1024))
        outputs = await read(stream)
        assert is_whole(outputs, stream.result())


async def test_await_reads_to_the_end(rig: Rig) -> None:
    result = await (await rig.engine.add_request("hello"))
    assert result.text == "hello"
    assert result.finish_reason is FinishReason.STOP
    assert result.outputs[0].stop_reason == 256
    assert result.token_ids == [*b"hello", 256]


async def test_await_after_some_deltas_gives_the_whole_result(rig: Rig) -> None:
    stream = await rig.add_held("hello")
    first = await anext(stream)
    rig.model.release()
    result = await stream
    assert first.text == "h"
    assert result.text == "hello"


async def test_await_twice_gives_the_same(rig: Rig) -> None:
    stream = await rig.engine.add_request("hello")
    assert await stream == await stream


async def test_result_before_the_end_is_refused(rig: Rig) -> None:
    stream = await rig.add_held("hello")
    with pytest.raises(IllegalStateError, match="not been read to its end"):
        stream.result()
    assert stream.usage is None
    assert not stream.ended
    rig.model.release()
    await stream


async def test_an_ended_stream_stays_ended(rig: Rig) -> None:
    stream = await rig.engine.add_request("hello")
    await stream
    for _ in range(3):
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert [output async for output in stream] == []


async def test_two_readers_are_refused_without_harm(rig: Rig) -> None:
    stream = await rig.add_held("hello")
    await anext(stream)
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    with pytest.raises(IllegalStateError, match="another task"):
        await anext(stream)
    rig.model.release()
    assert "".join(output.text for output in await reader) == "ello"
    assert stream.result().text == "hello"
    assert stream.result().finish_reason is FinishReason.STOP


async def test_what_came_before_an_abort_can_be_read_after_it() -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("x", GenerationConfig(logprobs=True))
        await rig.let(4)
        stream.abort()
        rig.model.release()
        outputs = await read(stream)
        result = stream.result()
        assert is_whole(outputs, result)
        assert result.finish_reason is FinishReason.ABORT
        assert result.text == "abcde"
        assert result.usage.completion_tokens == 5
        await rig.comes_to_rest()


async def test_abort_is_idempotent_and_harmless_after_the_end(rig: Rig) -> None:
    stream = await rig.engine.add_request("hello")
    result = await stream
    for _ in range(3):
        stream.abort()
    await stream.aclose()
    await rig.comes_to_rest()
    assert stream.result() == result


async def test_finished_branches_keep_their_reason_on_abort() -> None:
    async with Rig(lambda prompt, branch: b"ab" if branch == 1 else endless(prompt, branch)) as rig:
        stream = await rig.add_held("x", GenerationConfig(n=3))
        await rig.let(5)
        stream.abort()
        rig.model.release()
        await read(stream)
        result = stream.result()
        assert [branch.finish_reason for branch in result.outputs] == ["abort", "stop", "abort"]
        assert result.outputs[1].text == "ab"
        assert result.usage.completion_tokens == sum(len(branch.token_ids) for branch in result.outputs)
        await rig.comes_to_rest()


async def test_aclose_from_another_task_ends_the_reader() -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("x")
        await anext(stream)
        reader = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        await stream.aclose()
        assert await asyncio.wait_for(reader, 5.0) == []  # although the step is still held
        rig.model.release()
        await eventually(lambda: stream.ended)
        assert stream.usage is not None
        assert stream.usage.completion_tokens == 1
        await rig.comes_to_rest()


async def test_await_after_aclose_is_refused() -> None:
    async with Rig(endless) as rig:
        stream = await rig.engine.add_request("x")
        await stream.aclose()
        with pytest.raises(IllegalStateError):
            await stream
        await rig.comes_to_rest()


async def test_a_step_failure_is_told_once_after_what_was_generated() -> None:
    async with Rig(endless) as rig:
        stream = await rig.add_held("x")
        await rig.let(2)
        rig.model.fail_next(ValueError("the model is on fire"))
        rig.model.release()
        outputs = []
        with pytest.raises(StepError, match="on fire") as caught:
            async for output in stream:
                outputs.append(output)
        assert isinstance(caught.value.__cause__, ValueError)
        assert caught.value.__cause__.__traceback__ is not None
        assert joined(outputs)[0] == "abc"
        assert outputs[-1].finish_reason is FinishReason.ERROR
        assert stream.error is caught.value
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert is_whole(outputs, stream.result())
        assert stream.usage is not None
        assert stream.usage.completion_tokens == 3
        await rig.comes_to_rest()
        await rig.serves()


async def test_await_raises_the_error(rig: Rig) -> None:
    rig.model.fail_next(ValueError("no"))
    with pytest.raises(StepError) as caught:
        await rig.engine.generate("hello")
    assert caught.value.retryable
    await rig.serves()


async def test_a_deadline_in_total_ends_with_what_there_was() -> None:
    async with Rig(endless, step_seconds=0.001) as rig:
        stream = await rig.engine.add_request("x", None, RequestOptions(deadlines=Deadlines(total=0.05)))
        outputs = []
        with pytest.raises(DeadlineExceededError, match=r"total deadline of 0\.05 s"):
            async for output in stream:
                outputs.append(output)
        assert isinstance(stream.error, TimeoutError)
        assert outputs[-1].finish_reason is FinishReason.ABORT
        assert is_whole(outputs, stream.result())
        assert stream.usage is not None
        assert stream.usage.completion_tokens == len(joined(outputs)[1]) > 0
        await rig.comes_to_rest()


@pytest.mark.parametrize("kind", ["queue", "first_token", "total"])
async def test_a_deadline_ends_a_request_that_waits(rig: Rig, kind: str) -> None:
    await rig.engine.pause()
    called = time.perf_counter()
    stream = await rig.engine.add_request("x", None, RequestOptions(deadlines=Deadlines(**{kind: 0.02})))
    with pytest.raises(DeadlineExceededError, match=kind):
        await stream
    assert time.perf_counter() - called >= 0.02
    assert stream.result().finish_reason is FinishReason.ABORT
    assert stream.usage is not None
    assert stream.usage.completion_tokens == 0
    assert stream.usage.queue_seconds == stream.usage.total_seconds > 0
    assert stream.usage.first_token_seconds is None
    await rig.comes_to_rest()


async def test_a_deadline_that_was_met_does_nothing(rig: Rig) -> None:
    options = RequestOptions(deadlines=Deadlines(queue=0.5, first_token=0.5, total=30.0))
    stream = await rig.add_held("hello", None, options)
    await asyncio.sleep(0.6)
    rig.model.release()
    assert (await stream).text == "hello"


async def test_deadlines_may_be_very_far(rig: Rig) -> None:
    await rig.engine.pause()
    stream = await rig.engine.add_request("hello", None, RequestOptions(deadlines=Deadlines(total=1e300)))
    await asyncio.sleep(0.02)  # the step thread sleeps with the deadline as its time-out
    await rig.engine.resume()
    assert (await stream).text == "hello"


@pytest.mark.parametrize("kind", ["queue", "first_token", "total"])
async def test_a_deadline_ends_a_request_that_waits_for_room(kind: str) -> None:
    async with Rig(max_queue_size=1) as rig:
        await rig.engine.pause()
        first = await rig.engine.add_request("first")
        stream = await rig.engine.add_request("x", None, RequestOptions(deadlines=Deadlines(**{kind: 0.02})))
        with pytest.raises(DeadlineExceededError, match=kind):
            await stream
        assert (stream.result().finish_reason, stream.result().token_ids) == (FinishReason.ABORT, [])
        await rig.engine.resume()
        assert (await first).text == "first"
        await rig.comes_to_rest()


async def test_a_deadline_passes_while_a_model_is_loaded(rig: Rig) -> None:
    rig.loader.gate = threading.Event()
    await rig.engine.unload()
    reloading = asyncio.create_task(rig.engine.reload(rig.config))
    await eventually(lambda: rig.engine.state is EngineState.LOADING)
    with pytest.raises(DeadlineExceededError, match=r"not admitted yet: the queue deadline of 0\.02 s passed"):
        await rig.engine.add_request("x", None, RequestOptions(deadlines=Deadlines(total=60, queue=0.02)))
    rig.loader.gate.set()
    await reloading
    await rig.comes_to_rest()
    await rig.serves()


async def test_deadlines_may_have_begun_before_the_call(rig: Rig) -> None:
    await rig.engine.pause()
    now = time.perf_counter()
    limits = [Deadlines(total=60, since=since) for since in (now - 60, now)]
    ended, going = [await rig.engine.add_request("x", None, RequestOptions(deadlines=each)) for each in limits]
    with pytest.raises(DeadlineExceededError, match=r"total deadline of 60 s"):
        await ended
    await rig.engine.resume()
    assert (await going).text == "x"
    await rig.comes_to_rest()


async def test_usage_counts_what_was_delivered() -> None:
    async with Rig(endless) as rig:
        result = await rig.engine.generate("hello", GenerationConfig(max_tokens=7, n=2))
        usage = result.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 14, 19)
        assert usage.first_token_seconds is not None
        assert 0 <= usage.queue_seconds <= usage.first_token_seconds <= usage.total_seconds
        again = await rig.engine.generate("hello", GenerationConfig(max_tokens=7))
        assert again.usage.cached_tokens == 4


async def test_no_tokens_were_asked_for(rig: Rig) -> None:
    stream = await rig.engine.add_request("hello", GenerationConfig(max_tokens=0))
    outputs = await read(stream)
    assert [(output.text, output.token_ids, output.finish_reason) for output in outputs] == [("", [], "length")]
    assert (await stream).usage.completion_tokens == 0


async def test_no_text_was_asked_for(rig: Rig) -> None:
    result = await rig.engine.generate("hello", GenerationConfig(detokenize=False))
    assert result.text == ""
    assert result.token_ids == [*b"hello", 256]


async def test_a_stop_string_inside_merged_deltas() -> None:
    async with Rig(lambda prompt, branch: b"one two STOP three") as rig:
        stream = await rig.engine.add_request("x", GenerationConfig(stop_strs=["STOP", "never"]))
        await eventually(lambda: stream.ended)
        outputs = await read(stream)
        assert joined(outputs)[0] == "one two "
        assert outputs[-1].stop_reason == "STOP"
        assert outputs[-1].finish_reason is FinishReason.STOP
        assert joined(outputs)[1] == list(b"one two STOP")


async def test_the_label_comes_back(rig: Rig) -> None:
    label = object()
    streams = [await rig.engine.add_request("hello", None, RequestOptions(label=label)) for _ in range(2)]
    assert [stream.label for stream in streams] == [label, label]
    assert streams[0].request_id != streams[1].request_id
    for stream in streams:
        await stream


async def test_a_stream_is_read_on_the_loop_where_it_was_added(rig: Rig) -> None:
    stream = await rig.add_held("hello")
    await anext(stream)

    def elsewhere() -> None:
        with pytest.raises(IllegalStateError, match="another event loop"):
            asyncio.run(_anext(stream))

    await asyncio.to_thread(elsewhere)
    rig.model.release()
    assert (await stream).text == "hello"


async def test_abort_from_another_thread_wakes_the_reader() -> None:
    async with Rig(endless) as rig:
        stream = await rig.engine.add_request("x")
        await anext(stream)
        await asyncio.to_thread(stream.abort)
        await read(stream)
        assert stream.result().finish_reason is FinishReason.ABORT
        await rig.comes_to_rest()


async def _anext(stream: RequestStream) -> object:
    return await anext(stream)
