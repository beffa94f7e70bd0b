"""Transcripts as they come: of scripted models that hear two bytes at once, and are asked for the language."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from asyncengine import (
    AsyncEngine,
    DeadlineExceededError,
    Deadlines,
    EngineClosedError,
    EngineDrainingError,
    FinishReason,
    GenerationConfig,
    IllegalStateError,
    InvalidRequestError,
    RequestOptions,
    StepError,
    TranscriptDelta,
    TranscriptionFallback,
    TranscriptSegment,
    TranscriptWord,
)
from asyncengine.fallback import Verdict
from asyncengine.loop.hearing import Hearing, Reloaded
from asyncengine.loop.in_order import InOrder
from asyncengine.loop.transcript_requests import TranscriptRequests
from asyncengine.testing import media
from asyncengine.testing.media import MARKS, ScriptedTranscription, pieces_of
from asyncengine.transcription import AudioPiece, LanguageQuestion, Quality
from tests.loop.harness import Rig, eventually

pytestmark = pytest.mark.loops("either")

AUDIO = b"aabbccddee"
SAID = {b"aa": " one", b"bb": " two ", b"cc": "three", b"dd": " four", b"ee": " five  "}
WHOLE = "one two three four five"


class Asking(ScriptedTranscription):
    """Asks which language is spoken, hears two bytes at once, and gives each piece one segment, of one word."""

    question = LanguageQuestion(MARKS["audio"], {ord("a"): "en"})

    def pieces(self, audio: bytes) -> Iterator[AudioPiece]:
        return iter([AudioPiece(audio[at : at + 2], at, at + 2) for at in range(0, len(audio), 2)])

    @staticmethod
    def check(asked: Any) -> None:
        pass

    def segments(
        self, token_ids: Any, logprobs: Any, piece: AudioPiece, quality: Quality, alignment: Any = None
    ) -> list[TranscriptSegment]:
        assert piece.end is not None
        text = bytes(token_ids[:-1]).decode()
        words: tuple[TranscriptWord, ...] = ()
        if alignment is not None:
            frames = np.concatenate(alignment.attention, axis=1)[0].argmax(axis=1)  # those of the tokens' positions
            assert frames.tolist() == list(range(frames[0], frames[0] + len(token_ids) - 1))
            words = (TranscriptWord(text, frames[0], frames[-1]),)
        return [TranscriptSegment(piece.start, piece.end, text, tuple(token_ids), words=words)]

    def to_align(self, token_ids: Any, piece: AudioPiece) -> tuple[int, int]:
        return len(token_ids) - 1, 1000


def script(prompt: Any, branch: int) -> list[int]:
    if prompt[0] > 255:  # an audio alone: which language is it?
        return [ord("a")]
    for piece, text in SAID.items():
        heard = pieces_of(piece, "audio")
        if any(list(prompt[at : at + len(heard)]) == heard for at in range(len(prompt))):
            return [*text.encode()]
    return [*prompt]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(media, "ScriptedTranscription", Asking)
    made = Rig(script)
    made.loader.takes_audio = True
    return made


async def read(stream: Any) -> tuple[str, list[TranscriptSegment], int]:
    deltas = [delta async for delta in stream]
    segments = [segment for delta in deltas for segment in delta.segments]
    return "".join(delta.text for delta in deltas), segments, len(deltas)


@pytest.mark.parametrize("language", ["en", None])
async def test_it_comes_in_its_order(rig: Rig, language: str | None) -> None:
    async with rig as made:
        stream = made.engine.transcribe(AUDIO, language=language, timestamps=True)
        text, segments, count = await read(stream)
        whole = await made.engine.transcribe(AUDIO, language=language, timestamps=True)
        assert stream.transcript is not None and await stream is stream.transcript
        assert stream.transcript.text == text == whole.text == WHOLE
        assert stream.transcript.segments == tuple(segments) == whole.segments
        assert [segment.start for segment in segments] == [0, 2, 4, 6, 8] and count > 1
        assert (whole.language, whole.seconds, whole.finish_reason) == ("en", 10, "stop")


def test_in_order() -> None:
    told = list[TranscriptDelta]()
    order = InOrder(told.append)
    segment = TranscriptSegment(0, 1, "x", ())
    order.add(1, "b ")
    order.end(2, [segment])
    order.add(0, "  ")
    assert not told
    order.add(0, " a")
    order.end(1, ())
    order.add(0, " ")
    assert told == [TranscriptDelta("a")]
    order.end(0, [segment])
    assert told[1:] == [TranscriptDelta("", (segment,)), TranscriptDelta(" b"), TranscriptDelta("", (segment,))]
    order.add(3, "  ")
    order.add(3, "c")
    assert order.text == "a b   c" and order.segments == [segment, segment]


async def test_what_comes_is_there_before_the_rest(rig: Rig) -> None:
    async with rig as made:
        made.model.hold()
        stream = made.engine.transcribe(AUDIO, language="en")
        reading = asyncio.ensure_future(anext(stream))
        await made.held()
        while not reading.done():
            await made.let()
            await asyncio.sleep(0)
        delta = await reading
        assert WHOLE.startswith(delta.text) and len(delta.text) < len("one two") and stream.transcript is None
        made.model.release()
        rest, _, _ = await read(stream)
        assert delta.text + rest == WHOLE


async def test_what_may_be_written_anew_comes_when_it_is_taken(rig: Rig) -> None:
    """A scripted model finds all that it says unlikely."""
    fallback = TranscriptionFallback(temperature=(0.0, 0.5, 1.0))
    async with rig as made:
        stream = made.engine.transcribe(AUDIO, language="en", fallback=fallback, timestamps=True)
        text, segments, count = await read(stream)
        assert text == WHOLE and len(segments) == 5 and count <= 10
        transcript = await stream
        assert sum(made.engine.metrics().counters.requests.values()) == 15
        assert transcript.usage.completion_tokens == 3 * sum(len(each) + 1 for each in SAID.values())
        once = TranscriptionFallback(temperature=[0.0, 0.5], logprob_threshold=None)
        assert (await made.engine.transcribe(AUDIO, language="en", fallback=once)).text == WHOLE
        assert sum(made.engine.metrics().counters.requests.values()) == 20


async def test_no_more_pieces_are_read_than_a_few_ahead(rig: Rig) -> None:
    """However long the audio is: what is read of it waits in memory."""
    audio = AUDIO * 20
    async with rig as made:
        config = made.engine.complete_engine_config
        assert config is not None and config.max_num_sequence is not None
        ahead = config.max_num_sequence + 2
        await made.engine.pause()
        going = asyncio.ensure_future(made.engine.transcribe(audio, language="en"))
        await eventually(lambda: made.engine.metrics().num_requests_waiting == ahead)
        for _ in range(20):
            await asyncio.sleep(0)
        assert made.engine.metrics().num_requests_waiting == ahead < len(audio) // 2
        await made.engine.resume()
        assert (await going).text == "   ".join([WHOLE] * 20)


@pytest.mark.parametrize("language", ["en", None])
@pytest.mark.parametrize("audio", [AUDIO, AUDIO[:2]])
async def test_it_is_aborted_by_its_name(audio: bytes, language: str | None, rig: Rig) -> None:
    """Whether the language is being asked for, or its pieces are heard."""
    async with rig as made:
        made.model.hold()
        options = RequestOptions(request_id="mine")
        going = asyncio.ensure_future(made.engine.transcribe(audio, None, options, language=language))
        await made.held()
        with pytest.raises(InvalidRequestError, match="request_id 'mine' is that of a transcript that has not ended"):
            await made.engine.transcribe(audio, None, options, language=language)
        await asyncio.gather(made.engine.abort_request("mine"), let_go(made))
        found = await going
        assert found.finish_reason is FinishReason.ABORT and len(found.text) < len(WHOLE)
        await made.comes_to_rest()
        assert (await made.engine.transcribe(audio, None, options)).finish_reason is FinishReason.STOP
        await made.engine.abort_request("mine")


@pytest.mark.parametrize(("audio", "language"), [(AUDIO, "en"), (AUDIO, None), (b"aa", "en")])
async def test_it_is_aborted_while_it_waits_for_room(
    audio: bytes, language: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "ScriptedTranscription", Asking)
    rig = Rig(script, max_queue_size=1, max_num_sequence=1)
    rig.loader.takes_audio = True
    async with rig as made:
        await made.engine.pause()
        first = await made.engine.add_request("first")
        options = RequestOptions(request_id="mine")
        going = asyncio.ensure_future(made.engine.transcribe(audio, None, options, language=language))
        await eventually(lambda: made.metrics().num_requests_queued == 1)
        await made.engine.abort_request("mine")
        assert made.metrics().num_requests_queued == 0
        found = await going
        assert (found.text, found.finish_reason) == ("", FinishReason.ABORT)
        await made.engine.resume()
        assert (await first).text == "first"
        await made.comes_to_rest()


async def test_it_is_aborted_while_a_piece_is_read_and_none_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    read = threading.Event()

    class Slow(Asking):
        def pieces(self, audio: bytes) -> Iterator[AudioPiece]:
            for index, piece in enumerate(super().pieces(audio)):
                if index == 2:
                    assert read.wait(10)
                yield piece

    monkeypatch.setattr(media, "ScriptedTranscription", Slow)
    rig = Rig(script)
    rig.loader.takes_audio = True
    async with rig as made:
        stream = made.engine.transcribe(AUDIO, None, RequestOptions(request_id="mine"), language="en")
        text = ""
        async for delta in stream:
            text += delta.text
            if text == "one two":
                await made.comes_to_rest()
                await made.engine.abort_request("mine")
                read.set()
        assert stream.transcript is not None
        assert (text, stream.transcript.finish_reason) == ("one two", FinishReason.ABORT)
        await made.comes_to_rest()


async def let_go(made: Rig) -> None:
    await asyncio.sleep(0)
    made.model.release()


async def test_the_first_that_is_aborted_is_the_last_that_is_begun(rig: Rig) -> None:
    async with rig as made:
        await made.engine.pause()
        going = asyncio.ensure_future(made.engine.transcribe(AUDIO * 20, language="en"))
        await eventually(lambda: made.engine.metrics().num_requests_waiting > 2)
        await made.engine.reset()
        await made.engine.resume()
        assert (await going).finish_reason is FinishReason.ABORT
        assert sum(made.engine.metrics().counters.requests.values()) <= 3
        await made.comes_to_rest()


async def test_an_engine_that_shuts_down_refuses_the_pieces_that_were_not_given_to_it(rig: Rig) -> None:
    async with rig as made:
        made.model.hold()
        going = asyncio.ensure_future(made.engine.transcribe(AUDIO * 20, language="en"))
        await made.held()
        ending = asyncio.ensure_future(made.engine.shutdown(drain=10.0))
        await let_go(made)
        with pytest.raises((EngineDrainingError, EngineClosedError)):
            await going
        await ending


LEAVING: dict[str, Callable[[Any], Coroutine[Any, Any, Any]]] = {}


def leaving(way: Callable[[Any], Coroutine[Any, Any, Any]]) -> Callable[[Any], Coroutine[Any, Any, Any]]:
    LEAVING[way.__name__] = way
    return way


@leaving
async def by_async_with(stream: Any) -> None:
    async with stream as entered:
        await anext(entered)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    with pytest.raises(IllegalStateError, match="was left before its end"):
        await stream


@leaving
async def by_aclose_of_another_task(stream: Any) -> None:
    await anext(stream)
    reading = asyncio.ensure_future(read(stream))
    await asyncio.sleep(0)
    await stream.aclose()
    await reading


@leaving
async def by_dropping_it(stream: Any) -> None:
    await anext(stream)


@leaving
async def by_never_using_it(stream: Any) -> None:
    pass


@leaving
async def by_a_cancelled_reader(stream: Any) -> None:
    await anext(stream)
    reading = asyncio.ensure_future(read(stream))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


@leaving
async def by_abort(stream: Any) -> None:
    await anext(stream)
    stream.abort()
    await read(stream)
    assert (await stream).finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("way", LEAVING)
@pytest.mark.in_short("by_async_with", "by_dropping_it", "by_a_cancelled_reader")
async def test_leaving_is_aborting(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "ScriptedTranscription", Asking)
    made = Rig(lambda prompt, branch: [*b"abcde"] * 400)
    made.loader.takes_audio = True
    async with made:
        await LEAVING[way](made.engine.transcribe(AUDIO, GenerationConfig(max_tokens=1500), language="en"))
        gc.collect()
        await made.comes_to_rest()
        assert made.engine.metrics().counters.requests["length"] == 0
        await made.serves()


async def test_a_request_that_nobody_took_because_they_were_cancelled_is_ended() -> None:
    """Whoever waits for it is cancelled after it was added, and before they come to run."""
    stream = Mock(number=1)

    async def add(*given: Any) -> Any:
        asyncio.get_running_loop().call_soon(waiting.cancel)
        return [stream]

    requests = TranscriptRequests(add)
    waiting = asyncio.ensure_future(requests.add("", lambda view: GenerationConfig(), RequestOptions()))
    with pytest.raises(asyncio.CancelledError):
        await waiting
    stream.abort.assert_called_once()
    assert not requests.adding


async def test_one_task_reads_it(rig: Rig) -> None:
    async with rig as made:
        made.model.hold()
        stream, awaited = (made.engine.transcribe(AUDIO, language="en") for _ in range(2))
        tasks = [asyncio.ensure_future(read(stream)), asyncio.ensure_future(awaited)]
        await made.held()
        with pytest.raises(IllegalStateError, match="another task is reading"):
            await anext(stream)
        with pytest.raises(IllegalStateError, match="another task awaits"):
            await anext(awaited)
        with pytest.raises(IllegalStateError, match="another task awaits it"):
            await awaited
        made.model.release()
        await asyncio.gather(*tasks)


async def test_an_error_comes_once_behind_what_was_said(rig: Rig) -> None:
    async with rig as made:
        for wrong in ({"language": "xx"}, {"language": "en", "timestamps": False, "hint": 3}):
            with pytest.raises(InvalidRequestError):
                await read(made.engine.transcribe(AUDIO, **wrong))
        with pytest.raises(InvalidRequestError, match="language is 'xx'"):
            async with made.engine.transcribe(AUDIO, language="xx"):
                raise AssertionError("it has begun")
        stream = made.engine.transcribe(AUDIO, language="xx")
        with pytest.raises(InvalidRequestError, match="language is 'xx'"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_another_model_in_the_middle(rig: Rig) -> None:
    """All is by one model: it begins anew, unless some of it was given out."""
    audio = AUDIO * 20
    async with rig as made:
        await made.engine.pause()
        whole = asyncio.ensure_future(made.engine.transcribe(audio, language="en"))
        stream = made.engine.transcribe(audio, language="en")
        reading = asyncio.ensure_future(read(stream))
        await eventually(lambda: made.engine.metrics().num_requests_waiting > 8)
        await made.engine.resume()
        async for _ in made.engine.transcribe(AUDIO[:2], language="en"):
            pass
        await made.engine.reload(made.config.replace(model="other"), in_flight="wait")
        assert (await whole).text.startswith(WHOLE)
        text, _, _ = await reading
        transcript = await stream
        assert transcript.finish_reason is FinishReason.ABORT and transcript.text == text != (await whole).text
        assert (await whole).finish_reason is FinishReason.STOP
        await made.comes_to_rest()


async def test_what_comes_when_it_begins_anew_is_not_given_out_twice(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece whose text is there when another finds that the model has gone cannot be cancelled before it tells it."""
    add, result = TranscriptRequests.add, TranscriptRequests.result
    both, added = asyncio.Event(), 0

    async def adding(self: Any, *given: Any) -> Any:
        nonlocal added
        added += 1
        if added == 2:
            await both.wait()
            raise Reloaded
        return await add(self, *given)

    async def reading(self: Any, stream: Any, each: Any) -> Any:
        if added == 2:
            asyncio.get_running_loop().call_soon(both.set)
            await both.wait()
            each("one", [])
        return await result(self, stream, each)

    monkeypatch.setattr(TranscriptRequests, "add", adding)
    monkeypatch.setattr(TranscriptRequests, "result", reading)
    async with rig as made:
        text, _, _ = await read(made.engine.transcribe(AUDIO, language="en"))
        assert text == WHOLE and added == 2 + 5
        await made.comes_to_rest()


@pytest.mark.parametrize("chunk", [64, 5])
async def test_words_come_with_their_segments(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "ScriptedTranscription", Asking)
    rig = Rig(script, prefill_chunk_size=chunk)
    rig.loader.takes_audio = True
    async with rig as made:
        bare = await made.engine.transcribe(AUDIO, timestamps=True)
        before = sum(made.engine.metrics().counters.requests.values())
        stream = made.engine.transcribe(AUDIO, timestamps="word")
        text, segments, _ = await read(stream)
        whole = await stream
        assert text == whole.text == bare.text and whole.segments == tuple(segments)
        assert [word.word for word in whole.words] == [*SAID.values()] and not bare.words
        assert sum(made.engine.metrics().counters.requests.values()) - before == 1 + 2 * 5
        assert whole.usage.completion_tokens == bare.usage.completion_tokens
        assert whole.usage.prompt_tokens > bare.usage.prompt_tokens and whole.finish_reason is FinishReason.STOP
        await made.comes_to_rest()


async def test_words_are_sought_of_what_is_taken_alone(rig: Rig) -> None:
    """Of the last attempt, and of nothing that is taken for silence."""
    fallback = TranscriptionFallback(temperature=(0.0, 0.5, 1.0))
    async with rig as made:
        found = await made.engine.transcribe(AUDIO[:4], language="en", fallback=fallback, timestamps="word")
        assert [word.word for word in found.words] == [" one", " two "]
        assert sum(made.engine.metrics().counters.requests.values()) == 2 * (3 + 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TranscriptionFallback, "verdict", lambda *_: Verdict.SILENCE)
            found = await made.engine.transcribe(AUDIO[:4], language="en", fallback=fallback, timestamps="word")
        assert (found.text, found.segments) == ("", ())
        assert sum(made.engine.metrics().counters.requests.values()) == 2 * (3 + 1) + 2


async def words_are_sought(made: Rig) -> None:
    """Returns when all is written down of one piece, and the step in which its words are sought is held."""
    await made.held()
    while not made.engine.metrics().counters.requests["stop"]:
        await made.let()
    await eventually(lambda: made.metrics().num_requests_running == 1)


ENDS: dict[str, Callable[[Rig], Coroutine[Any, Any, Any]]] = {
    "abort": lambda made: made.engine.abort_request("mine"),
    "reset": lambda made: made.engine.reset(),
}


@pytest.mark.parametrize("iterated", [False, True])
@pytest.mark.parametrize("end", ENDS)
async def test_it_is_aborted_while_its_words_are_sought(
    end: str, iterated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first of several steps. What was written down is there, without them."""
    monkeypatch.setattr(media, "ScriptedTranscription", Asking)
    rig = Rig(script, prefill_chunk_size=5)
    rig.loader.takes_audio = True
    async with rig as made:
        made.model.hold()
        options = RequestOptions(request_id="mine")
        stream = made.engine.transcribe(AUDIO[:2], None, options, language="en", timestamps="word")
        going: Any = asyncio.ensure_future(read(stream) if iterated else stream)
        await words_are_sought(made)
        await asyncio.gather(ENDS[end](made), let_go(made))
        await going
        found = await stream
        assert (found.text, found.finish_reason) == ("one", FinishReason.ABORT)
        assert [(segment.text, segment.words) for segment in found.segments] == [(" one", ())]
        await made.comes_to_rest()
        await made.serves()


async def test_leaving_while_words_are_sought(rig: Rig) -> None:
    async with rig as made:
        made.model.hold()
        going = asyncio.ensure_future(made.engine.transcribe(AUDIO[:2], language="en", timestamps="word"))
        await words_are_sought(made)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        made.model.release()
        await made.comes_to_rest()


async def test_a_step_that_fails_while_words_are_sought_ends_it_all(rig: Rig) -> None:
    async with rig as made:
        made.model.hold()
        going = asyncio.ensure_future(made.engine.transcribe(AUDIO[:2], language="en", timestamps="word"))
        await words_are_sought(made)
        made.model.fail_next(RuntimeError("a bad day"))
        made.model.release()
        with pytest.raises(StepError, match="a bad day"):
            await going
        await made.comes_to_rest()
        await made.serves()


@pytest.mark.parametrize("iterated", [False, True])
async def test_another_model_between_the_text_and_its_words(
    iterated: bool, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins anew, unless some of it was given out: then it ends, without them."""
    seek, reloads = Hearing._alignment, 1

    async def then(self: Any, *given: Any) -> Any:
        nonlocal reloads
        if reloads:
            reloads -= 1
            await made.engine.reload(made.config.replace(model="other"))
        return await seek(self, *given)

    monkeypatch.setattr(Hearing, "_alignment", then)
    async with rig as made:
        stream = made.engine.transcribe(AUDIO[:2], language="en", timestamps="word")
        if iterated:
            await read(stream)
        found = await stream
        assert found.text == "one" and len(found.words) == (not iterated)
        assert found.finish_reason is (FinishReason.ABORT if iterated else FinishReason.STOP)
        await made.comes_to_rest()


async def test_a_deadline_ends_it_while_its_words_are_sought(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    seek = Hearing._alignment

    async def paused(self: Any, *given: Any) -> Any:
        await made.engine.pause()
        return await seek(self, *given)

    monkeypatch.setattr(Hearing, "_alignment", paused)
    async with rig as made:
        options = RequestOptions(deadlines=Deadlines(total=0.4, first_token=0.3))
        with pytest.raises(DeadlineExceededError, match="total deadline"):
            await made.engine.transcribe(AUDIO[:2], None, options, language="en", timestamps="word")
        await made.engine.resume()
        await made.comes_to_rest()


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: TranscriptionFallback(temperature=()), r"temperature of the fallback is \(\)"),
    (lambda: TranscriptionFallback(temperature=(0.0, -1.0)), "expected a list of numbers >= 0"),
    (lambda: TranscriptionFallback(temperature=(0.0, float("nan"))), "expected a list of numbers >= 0"),
    (lambda: TranscriptionFallback(temperature="0.2"), "temperature of the fallback is '0.2'"),  # type: ignore[arg-type]
    (lambda: TranscriptionFallback(logprob_threshold="x"), "logprob_threshold is 'x'"),  # type: ignore[arg-type]
    (lambda: TranscriptionFallback(no_speech_threshold=float("nan")), "no_speech_threshold is nan"),
    (lambda: AsyncEngine().transcribe(b"", fallback=3), "fallback is 3; expected TranscriptionFallback"),  # type: ignore[arg-type]
    (
        lambda: AsyncEngine().transcribe(b"", GenerationConfig(temperature=0.1), fallback=TranscriptionFallback()),
        "temperature is 0.1, and the fallback says which",
    ),
    (lambda: AsyncEngine().transcribe(b"", timestamps="words"), "timestamps is 'words'; allowed: True, False, 'word'"),  # type: ignore[arg-type]
    (lambda: AsyncEngine().transcribe(b"", options=3), "options is 3"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_what_is_wrong_is_said_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make()


class _Counted:
    """A coroutine of which each suspension is told."""

    def __init__(self, coroutine: Any, tell: Callable[[], None]) -> None:
        self._coroutine, self._tell = coroutine, tell

    def send(self, value: Any) -> Any:
        found = self._coroutine.send(value)
        self._tell()
        return found

    def throw(self, *given: Any) -> Any:
        found = self._coroutine.throw(*given)
        self._tell()
        return found

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)


Coroutine.register(_Counted)


async def cancelled_at_every_suspension_of_any_task(
    make: Callable[[], Coroutine[Any, Any, Any]], after: Callable[[], Coroutine[Any, Any, Any]]
) -> int:
    """As `cancelled_at_every_await`, of the tasks, too, that `make()` begins."""
    for at in range(300):
        cut = await _cancelled(make(), at)
        await after()
        if not cut:
            return at
    raise AssertionError("it does not come to an end")


async def _cancelled(coroutine: Coroutine[Any, Any, Any], left: int) -> bool:
    """Whether it was cancelled, at so manieth a suspension of any task."""
    loop, cut = asyncio.get_running_loop(), False

    def told() -> None:
        nonlocal left, cut
        left -= 1
        if left < 0 and not cut and not task.done():
            cut = task.cancel()

    def make_task(loop: Any, coroutine: Any, **given: Any) -> Any:
        return asyncio.Task(_Counted(coroutine, told), loop=loop, **given)

    loop.set_task_factory(make_task)
    try:
        task = loop.create_task(coroutine)
        await asyncio.wait([task])
    finally:
        loop.set_task_factory(None)
    assert task.cancelled() == cut, f"it was cancelled: {cut}; {task}"
    if not cut:
        await task
    return cut


@pytest.mark.parametrize("iterated", [False, True])
@pytest.mark.parametrize("fallback", [None, TranscriptionFallback(temperature=(0.0, 0.5))])
@pytest.mark.in_short("None-True", "fallback1-False")
async def test_at_every_await_of_a_transcript(iterated: bool, fallback: Any, rig: Rig) -> None:
    async with rig as made:

        async def transcribe() -> None:
            words = fallback is None
            stream = made.engine.transcribe(AUDIO[:4], fallback=fallback, timestamps="word" if words else False)
            if iterated:
                assert (await read(stream))[0] == "one two"
            assert (await stream).text == "one two" and len((await stream).words) == 2 * words

        async def over() -> None:
            await eventually(lambda: not asyncio.all_tasks() - here, "tasks are left")
            await made.comes_to_rest()

        here = asyncio.all_tasks()
        assert await cancelled_at_every_suspension_of_any_task(transcribe, over) >= 8
