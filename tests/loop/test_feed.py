"""Prompts that come in pieces, as the program gives them: the request lives and ends as any other."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import pytest
from harness import Rig, cancelled_at_every_await, eventually, read

from asyncengine import (
    DeadlineExceededError,
    Deadlines,
    EngineOverloadedError,
    EngineState,
    FinishReason,
    GenerationConfig,
    IllegalStateError,
    InvalidRequestError,
    ModelNotLoadedError,
    RequestOptions,
)

pytestmark = pytest.mark.timeout(60)

TEXT = "a prompt that comes in pieces, each of them a few words long, until it is whole"


async def pieces(*given: Any) -> AsyncIterator[Any]:
    for piece in given:
        yield piece
        await asyncio.sleep(0)


class Pieces:
    """An iterator under control: each piece is given when the test says so."""

    def __init__(self, *first: Any) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self.left = 0
        for piece in first:
            self.put(piece)

    def put(self, piece: Any) -> None:
        self._queue.put_nowait(piece)

    def end(self, error: BaseException | None = None) -> None:
        self._queue.put_nowait(StopAsyncIteration() if error is None else error)

    async def read(self) -> AsyncIterator[Any]:
        try:
            while not isinstance(piece := await self._queue.get(), BaseException):
                yield piece
            if not isinstance(piece, StopAsyncIteration):
                raise piece
        finally:
            self.left += 1


def waiting(rig: Rig) -> int:
    return rig.metrics().num_requests_waiting


async def test_generation_is_of_the_whole_prompt(rig: Rig) -> None:
    whole = await rig.engine.generate(TEXT)
    for given in ([TEXT], list(TEXT), [TEXT[:30], "", TEXT[30:]], [*map(ord, TEXT)], [list(TEXT.encode())]):
        result = await rig.engine.generate(pieces(*given))
        assert (result.text, result.token_ids) == (whole.text, whole.token_ids)
        assert result.usage.prompt_tokens == len(TEXT)
    await rig.comes_to_rest()


async def test_by_every_way_in(rig: Rig) -> None:
    stream = await rig.engine.add_request(pieces("he", "llo"))
    assert stream.prompt_token_ids.tolist() == [*b"hello"]
    assert (await stream).text == "hello"
    assert (await rig.engine.stream(pieces("he", "llo"))).text == "hello"
    async with rig.engine.stream(pieces("he", "llo"), GenerationConfig(n=2)) as both:
        assert len(await read(both)) >= 2
    assert [output.text for output in both.result().outputs] == ["hello"] * 2
    await rig.comes_to_rest()


async def test_pieces_are_computed_as_they_arrive(rig: Rig) -> None:
    given = Pieces("x" * 40)
    adding = asyncio.create_task(rig.engine.generate(given.read()))
    await eventually(lambda: rig.model.steps == 1 and rig.metrics().kv_blocks_used == 0)
    given.put("y" * 40)
    await eventually(lambda: rig.model.steps == 2 and rig.metrics().num_requests_running == 0)  # first it counts
    assert waiting(rig) == 1
    given.end()
    assert (await adding).text == "x" * 40 + "y" * 40
    computed = sum(tokens for rows, tokens in rig.model.batches if tokens > rows)
    assert computed <= 80, "something was computed twice"
    await rig.comes_to_rest()


async def test_a_long_prompt_has_its_first_token_after_one_step() -> None:
    async with Rig() as rig:
        text = (TEXT * 9)[:640]  # 64 tokens in a step
        config = GenerationConfig(max_tokens=1)
        await rig.engine.generate(text, config)
        at_once = rig.model.steps
        await rig.engine.reset()
        given = Pieces()
        adding = asyncio.create_task(rig.engine.generate(given.read(), config))
        for start in range(0, len(text), 64):
            given.put([*text[start : start + 64].encode()])
            await eventually(lambda so_far=start + 64: rig.metrics().kv_blocks_cached * 4 == so_far)
        before = rig.model.steps
        given.end()
        await adding
        assert (at_once, rig.model.steps - before) == (10, 1)


async def test_prompt_logprobs_are_of_the_whole_prompt(rig: Rig) -> None:
    config = GenerationConfig(prompt_logprobs=0, max_tokens=2)
    result = await rig.engine.generate(pieces("ab", "cd"), config)
    assert result.prompt_token_ids == [*b"abcd"]
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == 4
    await rig.comes_to_rest()


async def test_many_at_once(rig: Rig) -> None:
    texts = [f"{TEXT} {index}" for index in range(20)]
    results = await asyncio.gather(*(rig.engine.generate(pieces(*text.split(" "))) for text in texts))
    assert [result.text for result in results] == [text.replace(" ", "") for text in texts]
    await rig.comes_to_rest()


# Wrong ones


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "empty"),
        (["", []], "empty"),
        (["text", [1]], "text alone"),
        ([[1], "text"], "token ids alone"),
        ([b"bytes"], "b'bytes'"),
        ([None], "None"),
        ([1.5], "1.5"),
        ([[1, 257]], "257"),
        ([[[1]]], "list of token ids"),
        (["x" * 600, "x" * 600], "1023"),
        ([[1] * 600, [1] * 600, [1]], "1200 tokens; allowed: 1..1023"),
    ],
)
@pytest.mark.loops("either")
async def test_a_wrong_piece_is_refused_and_ends_the_request(rig: Rig, given: Sequence[Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says.replace(".", r"\.")):
        await rig.engine.add_request(pieces(*given))
    await rig.comes_to_rest()


async def test_a_prompt_that_is_too_long_is_refused_before_it_is_whole(rig: Rig) -> None:
    given = Pieces("x" * 1100)
    with pytest.raises(InvalidRequestError, match=r"allowed: 1\.\.1023"):
        await rig.engine.add_request(given.read())
    assert given.left == 1  # the generator was closed, not left to the collector
    await rig.comes_to_rest()


async def test_where_it_is_not_taken(rig: Rig) -> None:
    for refused in (
        rig.engine.generate_many([pieces("a")]),  # type: ignore[list-item]
        rig.engine.score([pieces("a")]),  # type: ignore[list-item]
        rig.engine.pin_prompt(pieces("a")),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidRequestError, match="add_request, stream and generate take one"):
            await refused
    await rig.comes_to_rest()


async def test_what_is_wrong_about_the_request_is_said_before_any_piece_is_read(rig: Rig) -> None:
    given = Pieces("hello")
    with pytest.raises(InvalidRequestError):
        await rig.engine.add_request(given.read(), GenerationConfig(stop_token_ids=[9999]))
    await rig.engine.unload()
    with pytest.raises(ModelNotLoadedError):
        await rig.engine.add_request(given.read())
    assert given.left == 0
    await rig.engine.reload(rig.config)
    await rig.serves()


# Leaving


async def test_an_error_of_the_iterator_is_raised_and_ends_the_request(rig: Rig) -> None:
    given = Pieces("x" * 40)
    adding = asyncio.create_task(rig.engine.add_request(given.read()))
    await eventually(lambda: rig.model.steps == 1)
    given.end(error := LookupError("no more"))
    with pytest.raises(LookupError) as raised:
        await adding
    assert raised.value is error
    await rig.comes_to_rest()
    assert rig.metrics().counters.requests["abort"] == 1


async def test_a_cancellation_while_a_piece_is_awaited(rig: Rig) -> None:
    given = Pieces("x" * 40)
    adding = asyncio.create_task(rig.engine.generate(given.read()))
    await eventually(lambda: rig.model.steps == 1)
    adding.cancel()
    await asyncio.wait([adding])
    assert adding.cancelled()
    assert given.left == 1
    await rig.comes_to_rest()


async def test_a_time_out_of_the_caller(rig: Rig) -> None:
    given = Pieces("x" * 40)
    with anyio.move_on_after(0.02) as scope:
        await rig.engine.generate(given.read())
    assert scope.cancelled_caught
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await rig.engine.generate(given.read())
    await rig.comes_to_rest()


@pytest.mark.parametrize("way", ["add_request", "generate", "stream"])
async def test_at_every_await(rig: Rig, way: str) -> None:
    config = GenerationConfig(max_tokens=10)

    async def use() -> None:
        given = pieces("one piece, ", "another, ", "and the last")
        if way == "add_request":
            await rig.engine.add_request(given, config)
        elif way == "generate":
            await rig.engine.generate(given, config)
        else:
            async with rig.engine.stream(given, config) as stream:
                async for _ in stream:
                    pass

    assert await cancelled_at_every_await(use, rig.comes_to_rest) >= 4
    await rig.serves()


@pytest.mark.parametrize("way", ["iteration", "result", "context"])
async def test_closing_a_stream_while_a_piece_is_awaited(rig: Rig, way: str) -> None:
    given = Pieces("x" * 40)
    pending = rig.engine.stream(given.read())

    async def use() -> object:
        match way:
            case "iteration":
                return [output async for output in pending]
            case "result":
                return await pending
            case _:
                return await pending.__aenter__()

    using = asyncio.create_task(use())
    await eventually(lambda: rig.model.steps == 1)
    await pending.aclose()
    if way == "iteration":
        assert await asyncio.wait_for(using, 5.0) == []
    else:
        with pytest.raises(IllegalStateError, match="closed before it began"):
            await asyncio.wait_for(using, 5.0)
    assert given.left == 1
    await rig.comes_to_rest()


@pytest.mark.parametrize("how", ["abort", "reset", "deadline", "close"])
async def test_an_iterator_whose_request_ends_may_await_while_it_cleans_up(rig: Rig, how: str) -> None:
    cleaned = []

    async def spoken() -> AsyncIterator[str]:
        try:
            yield "x" * 40
            await asyncio.sleep(3600)
        finally:
            for _ in range(5):
                await asyncio.sleep(0.001)
            cleaned.append(True)

    deadlines = Deadlines(total=0.05 if how == "deadline" else None)
    pending = rig.engine.stream(spoken(), options=RequestOptions(request_id="mine", deadlines=deadlines))
    reading = asyncio.create_task(read(aiter(pending)))  # type: ignore[arg-type]
    await eventually(lambda: rig.model.steps == 1)
    match how:
        case "abort":
            await rig.engine.abort_request("mine")
        case "reset":
            await rig.engine.reset()
        case "close":
            await pending.aclose()
    await asyncio.wait([reading], timeout=10.0)
    assert isinstance(reading.exception(), DeadlineExceededError if how == "deadline" else type(None))
    assert cleaned == [True]
    await rig.comes_to_rest()


@pytest.mark.loops("either")
async def test_a_stream_of_pieces_that_was_never_used(rig: Rig) -> None:
    given = Pieces("hello")
    rig.engine.stream(given.read())
    gc.collect()
    await rig.comes_to_rest()
    assert rig.model.steps == 0


# What ends it from elsewhere


async def ended(rig: Rig, how: str) -> tuple[Any, Pieces]:
    """Ends a request whose next piece is awaited; returns the outcome of its `generate`."""
    given = Pieces("x" * 40)
    options = RequestOptions(request_id="held")
    generating = asyncio.create_task(rig.engine.generate(given.read(), options=options))
    await eventually(lambda: rig.model.steps == 1)
    match how:
        case "abort":
            await rig.engine.abort_request("held")
        case "reload":
            await rig.engine.reload(rig.config)
        case _:
            await getattr(rig.engine, how)()
    await asyncio.wait([generating], timeout=5.0)
    return generating.result(), given


@pytest.mark.parametrize("how", ["abort", "unload", "reload", "reset", "shutdown"])
async def test_an_end_from_elsewhere_is_the_end_of_the_call(rig: Rig, how: str) -> None:
    result, given = await ended(rig, how)
    assert result.finish_reason is FinishReason.ABORT
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (32, 0)  # of the text, what was certain
    assert given.left == 1
    await rig.comes_to_rest()
    if how == "unload":
        await rig.engine.reload(rig.config)
    if how != "shutdown":
        await rig.serves()


@pytest.mark.parametrize("kind", ["queue", "first_token", "total"])
async def test_a_deadline_passes_while_a_piece_is_awaited(rig: Rig, kind: str) -> None:
    options = RequestOptions(deadlines=Deadlines(**{kind: 0.02}))
    with pytest.raises(DeadlineExceededError, match=kind):
        await rig.engine.generate(Pieces("ab").read(), options=options)
    await rig.comes_to_rest()


async def test_an_iterator_that_does_not_mind_its_cancellation_is_not_asked_again(rig: Rig) -> None:
    class Stubborn:
        asked = 0

        def __aiter__(self) -> Stubborn:
            return self

        async def __anext__(self) -> str:
            self.asked += 1
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                pass
            return "never mind"

    stubborn = Stubborn()
    options = RequestOptions(deadlines=Deadlines(total=0.02))
    with pytest.raises(DeadlineExceededError):
        await rig.engine.generate(stubborn, options=options)
    assert stubborn.asked == 1
    await rig.comes_to_rest()


@pytest.mark.parametrize("fits_beside", [True, False])
async def test_it_goes_on_with_the_next_model(fits_beside: bool) -> None:
    async with Rig(fits_beside=fits_beside) as rig:
        given = Pieces("x" * 40)
        generating = asyncio.create_task(rig.engine.generate(given.read()))
        await eventually(lambda: rig.model.steps == 1)
        reloading = asyncio.create_task(rig.engine.reload(rig.config, "carry"))
        given.put("y" * 40)
        await reloading
        await eventually(lambda: rig.model.steps >= 1)
        given.put("!")
        given.end()
        assert (await generating).text == "x" * 40 + "y" * 40 + "!"
        await rig.comes_to_rest()


async def test_a_reload_and_a_drain_wait_for_its_rest(rig: Rig) -> None:
    for wait in (lambda: rig.engine.reload(rig.config, "wait"), rig.engine.drain):
        given = Pieces("hello")
        generating = asyncio.create_task(rig.engine.generate(given.read()))
        await eventually(lambda: waiting(rig) == 1)
        waits = asyncio.create_task(wait())  # type: ignore[arg-type]
        await eventually(lambda: rig.engine.state is not EngineState.READY)
        given.put(" world")
        given.end()
        assert (await generating).text == "hello world"
        await waits
    await rig.comes_to_rest()


async def test_a_shutdown_that_drains_waits_for_its_rest(rig: Rig) -> None:
    given = Pieces("hello")
    generating = asyncio.create_task(rig.engine.generate(given.read()))
    await eventually(lambda: waiting(rig) == 1)
    ending = asyncio.create_task(rig.engine.shutdown(drain=60.0))
    await eventually(lambda: rig.engine.state is not EngineState.READY)
    given.put(" world")
    given.end()
    assert (await generating).text == "hello world"
    assert await ending == ()


async def test_a_shutdown_that_drains_ends_it_when_its_time_is_up(rig: Rig) -> None:
    options = RequestOptions(request_id="mine")
    generating = asyncio.create_task(rig.engine.generate(Pieces("hello").read(), options=options))
    await eventually(lambda: waiting(rig) == 1)
    begun = time.monotonic()
    assert await rig.engine.shutdown(drain=0.1) == ("mine",)
    assert time.monotonic() - begun >= 0.1
    assert (await generating).finish_reason is FinishReason.ABORT


async def test_it_has_a_place_in_the_queue_until_its_first_step() -> None:
    async with Rig(max_queue_size=1) as rig:
        given = Pieces("ab")
        generating = asyncio.create_task(rig.engine.generate(given.read()))
        await eventually(lambda: waiting(rig) == 1)
        with pytest.raises(EngineOverloadedError):
            await rig.engine.generate("other", options=RequestOptions(when_full="raise"))
        given.put("x" * 40)
        await eventually(lambda: rig.model.steps == 1)
        assert (await rig.engine.generate("other", options=RequestOptions(when_full="raise"))).text == "other"
        given.end()
        await generating
        await rig.comes_to_rest()


def test_from_several_loops() -> None:
    rig = Rig()
    texts: list[str] = []

    async def use(text: str) -> None:
        texts.append((await rig.engine.generate(pieces(*text), GenerationConfig(max_tokens=100))).text)

    async def main() -> None:
        await rig.engine.reload(rig.config)
        await asyncio.gather(*(asyncio.to_thread(asyncio.run, use(f"{TEXT}{i}")) for i in range(4)))
        await rig.engine.shutdown()

    asyncio.run(main())
    assert sorted(texts) == [f"{TEXT}{i}" for i in range(4)]
