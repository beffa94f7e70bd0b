"""Whisper: what it says of an audio is what it says in transformers, token for token."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncengine import (
    AsyncEngine,
    AudioPrompt,
    CheckpointError,
    ConfigError,
    ContextLengthExceededError,
    EngineConfig,
    EngineOverloadedError,
    FinishReason,
    GenerationConfig,
    InvalidRequestError,
    RequestOptions,
    StepError,
    UnsupportedModelError,
)
from asyncengine.logits_processor import LogitsRow
from asyncengine.loop.encoding import media_readers, transcribing_of
from asyncengine.loop.hearing import Hearing
from asyncengine.model.attention import select
from asyncengine.model.attention.protocol import BackendUnavailableError
from asyncengine.model.encoder_decoder.model import SourceEncoder
from asyncengine.model.speech.transcription import WhisperTranscription
from asyncengine.transcription import AudioPiece, Quality, TranscriptionPrompt
from tests.loop.harness import eventually
from tests.model.speech import checkpoints
from tests.model.speech.checkpoints import END, FIRST_TIME, IDS, RATE, ROOM, sound

pytestmark = pytest.mark.loops("either")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random checkpoint once and returns its directory."""
    found: dict[object, Path] = {}

    def get(seed: int = 0, **changes: Any) -> Path:
        key = seed, repr(changes)
        if key not in found:
            found[key] = checkpoints.write(tmp_path_factory.mktemp("whisper"), seed, **changes)
        return found[key]

    return get


def engine(path: Path, **changes: Any) -> AsyncEngine:
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_page_size": 8, "max_num_sequence": 4}
    return AsyncEngine(EngineConfig(str(path), **(values | changes)))


def heard(seed: int, seconds: float = 1.3) -> tuple[Any, int]:
    return sound(seed, seconds), RATE


async def answer(serving: AsyncEngine, asked: TranscriptionPrompt, **changes: Any) -> list[int]:
    """The tokens that come of a request, as `transcribe` makes it, but for the one that ends them."""
    transcribing = transcribing_of(await serving._view())
    config = transcribing.settings(GenerationConfig(**changes), asked)
    result = await serving.generate(AudioPrompt(transcribing.request(asked), [asked.audio]), config)
    return [token for token in result.token_ids if token != END]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"prefill_chunk_size": 24, "kv_cache_page_size": 4},
    {"max_total_sequence_length": 272, "prefix_cache_mode": "disable"},
    {"attention_backend": "torch", "prefill_mode": "chunked", "max_num_sequence": 2},
]
LANGUAGES = ["de", "en", "fr", "de"]


@pytest.fixture(scope="module")
def expected(written: Callable[..., Path]) -> list[list[int]]:
    """What transformers hears, of as many sounds as there are languages."""
    found = [checkpoints.reference(written(), sound(seed, 1.3), language=code) for seed, code in enumerate(LANGUAGES)]
    assert len({tuple(each) for each in found}) == len(found)
    return found


@pytest.mark.parametrize("changes", SETTINGS, ids=[",".join(each) or "plain" for each in SETTINGS])
@pytest.mark.in_short("plain", "max_total_sequence_length,prefix_cache_mode")
async def test_transcripts_equal_transformers(
    changes: dict[str, Any], written: Callable[..., Path], expected: list[list[int]]
) -> None:
    """Several audio at once, all of them twice; in chunks, with preemptions, over two back ends."""
    async with engine(written(), **changes) as serving:
        assert serving.takes_audio and not serving.takes_images
        asked = [TranscriptionPrompt(heard(seed), code) for seed, code in enumerate(LANGUAGES)]
        found = await asyncio.gather(*[answer(serving, each) for each in (*asked, *asked)])
        assert found == [*expected, *expected]
        preempted = serving.metrics().counters.preemptions
        assert preempted > 0 if "max_total_sequence_length" in changes else preempted == 0
        assert await answer(serving, asked[0]) == expected[0]


async def test_another_checkpoint(written: Callable[..., Path]) -> None:
    path = written(1)
    async with engine(path) as serving:
        found = await answer(serving, TranscriptionPrompt(heard(7, 2.0), "fr", task="translate"))
    assert found == checkpoints.reference(path, sound(7, 2.0), language="fr", task="translate")


async def test_times_are_held_to_transformers_rules(written: Callable[..., Path]) -> None:
    path = written(7, times=True)
    begin = [IDS["<|startoftranscript|>"], IDS["<|de|>"], IDS["<|transcribe|>"]]
    expected = [checkpoints.with_times(path, sound(seed, 1.7), begin) for seed in range(3)]
    assert any(len(each) < ROOM - len(begin) for each in expected)
    async with engine(path) as serving:
        asked = [TranscriptionPrompt(heard(seed, 1.7), "de", timestamps=True) for seed in range(3)]
        assert await asyncio.gather(*[answer(serving, each) for each in asked]) == expected


async def test_a_hint_stands_before(written: Callable[..., Path]) -> None:
    path = written()
    hint = torch.tensor(checkpoints.tokenizer().get_prompt_ids("of Foo"))
    expected = checkpoints.reference(path, sound(3, 1.3), language="en", prompt_ids=hint)
    async with engine(path) as serving:
        assert await answer(serving, TranscriptionPrompt(heard(3), "en", " of Foo ")) == expected
        assert await answer(serving, TranscriptionPrompt(heard(3), "en", "  ")) != expected


async def test_the_language_is_found_out(written: Callable[..., Path]) -> None:
    path = written(6)
    languages = [checkpoints.language_of(path, sound(seed, 1.3)) for seed in range(6)]
    assert len(set(languages)) > 1
    async with engine(path, max_num_sequence=12) as serving:
        found = await asyncio.gather(*[serving.transcribe(heard(seed)) for seed in range(6)])
        told = await asyncio.gather(*[serving.transcribe(heard(seed), language=languages[seed]) for seed in range(6)])
    assert [each.language for each in found] == languages
    assert [each.text for each in found] == [each.text for each in told]
    assert all(each.usage.cached_tokens >= 100 for each in found)  # what was heard for it is not heard again


async def test_a_model_of_english_alone(written: Callable[..., Path]) -> None:
    path = written(2, multilingual=False)
    async with engine(path) as serving:
        found = await answer(serving, TranscriptionPrompt(heard(1)))
        transcript = await serving.transcribe(heard(1), language="English")
        for wrong, message in (({"language": "de"}, "knows English alone"), ({"task": "translate"}, "English alone")):
            with pytest.raises(InvalidRequestError, match=message):
                await serving.transcribe(heard(1), **wrong)
    assert found == checkpoints.reference(path, sound(1, 1.3))
    assert transcript.text == text_of(found)


def text_of(token_ids: list[int]) -> str:
    said = [token for token in token_ids if token < END]
    return str(checkpoints.tokenizer().decode(said)).strip()


async def test_what_is_longer_is_heard_in_pieces(written: Callable[..., Path]) -> None:
    """Cut where it is quiet; each piece says what it says alone."""
    path, samples = written(), sound(9, 4.7)
    samples[int(1.6 * RATE) : int(1.75 * RATE)] = 0
    samples[int(3.1 * RATE) : int(3.2 * RATE)] = 0
    async with engine(path) as serving:
        pieces = list(transcribing_of(await serving._view()).pieces((samples, RATE)))
        assert [piece.start for piece in pieces] == pytest.approx([0, 1.675, 3.15], abs=0.06)
        assert pieces[-1].end == 4.7 and [piece.end for piece in pieces[:-1]] == [piece.start for piece in pieces[1:]]
        assert np.array_equal(np.concatenate([piece.audio[0] for piece in pieces]), samples)
        alone = [await serving.transcribe(piece.audio, language="de") for piece in pieces]
        whole = await serving.transcribe((samples, RATE), language="de")
        short = GenerationConfig(max_tokens=1)
        twice = await serving.transcribe((np.repeat(samples, 2), 2 * RATE), short, language="de")
    assert whole.seconds == 4.7 and whole.language == "de"
    assert whole.usage.prompt_tokens == 3 * 104 and whole.usage.audio_tokens == 3 * 100
    assert whole.usage.completion_tokens == sum(each.usage.completion_tokens for each in alone)
    said = [said_of(path, piece, "de") for piece in pieces]
    assert whole.text == "".join(said).strip()
    assert twice.seconds == 4.7


def said_of(path: Path, piece: AudioPiece, code: str) -> str:
    ids = checkpoints.reference(path, piece.audio[0], language=code)
    return str(checkpoints.tokenizer().decode([token for token in ids if token < END]))


async def test_segments(written: Callable[..., Path]) -> None:
    path = written(times=True)
    begin = [IDS["<|startoftranscript|>"], IDS["<|de|>"], IDS["<|transcribe|>"]]
    async with engine(path) as serving:
        one = await serving.transcribe(heard(2, 1.7), language="de", timestamps=True)
        assert not (await serving.transcribe(heard(2, 1.7), language="de")).segments
        long = sound(5, 3.5)
        several = await serving.transcribe((long, RATE), language="de", timestamps=True)
        pieces = list(transcribing_of(await serving._view()).pieces((long, RATE)))
    said = checkpoints.with_times(path, sound(2, 1.7), begin)
    assert [token for segment in one.segments for token in segment.token_ids] == said
    for transcript, seconds in ((one, 1.7), (several, 3.5)):
        assert transcript.segments
        ends = [number for segment in transcript.segments for number in (segment.start, segment.end)]
        assert ends == sorted(ends) and ends[-1] <= seconds and ends[0] >= 0
    assert any(segment.start >= pieces[1].start for segment in several.segments)


@pytest.fixture(scope="module")
def transcribing(written: Callable[..., Path]) -> Any:
    async def read() -> Any:
        async with engine(written()) as serving:
            return transcribing_of(await serving._view())

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([65, END], [(10.0, 11.5, "A")]),
        ([FIRST_TIME + 5, 65, FIRST_TIME + 20, END], [(10.1, 10.4, "A")]),
        (
            [FIRST_TIME, 65, 66, FIRST_TIME + 20, FIRST_TIME + 20, 67, FIRST_TIME + 50],
            [(10.0, 10.4, "AB"), (10.4, 11.0, "C")],
        ),
        ([FIRST_TIME + 5, 65, FIRST_TIME + 20, FIRST_TIME + 30, 66], [(10.1, 10.4, "A"), (10.6, 11.5, "B")]),
        ([FIRST_TIME + 5, 32, FIRST_TIME + 20], []),
        ([FIRST_TIME + 5, 65, FIRST_TIME + 100], [(10.1, 11.5, "A")]),
        # Said in the silence behind the end.
        ([FIRST_TIME + 80, 65, FIRST_TIME + 90], [(10.0, 11.5, "A")]),
        (
            [FIRST_TIME, 65, FIRST_TIME + 20, FIRST_TIME + 75, 66, FIRST_TIME + 90],
            [(10.0, 10.4, "A"), (10.4, 11.5, "B")],
        ),
        ([FIRST_TIME, 65, FIRST_TIME + 76, FIRST_TIME + 78, 66, FIRST_TIME + 90, END], [(10.0, 11.5, "A B")]),
    ],
)
def test_segments_of_tokens(tokens: list[int], expected: list[tuple[float, float, str]], transcribing: Any) -> None:
    found = transcribing.segments(tokens, None, AudioPiece(None, 10.0, 11.5), Quality())
    assert [(segment.start, segment.end, segment.text) for segment in found] == [
        (pytest.approx(start), pytest.approx(end), text) for start, end, text in expected
    ]


async def test_branches_and_draws(written: Callable[..., Path]) -> None:
    path = written()
    asked = TranscriptionPrompt(heard(4), "en")
    async with engine(path) as serving:
        transcribing = transcribing_of(await serving._view())
        prompt = AudioPrompt(transcribing.request(asked), [asked.audio])
        config = transcribing.settings(GenerationConfig(n=3, temperature=1.0, seed=7, max_tokens=12), asked)
        first, second = [await serving.generate(prompt, config) for _ in range(2)]
        drawn = [list(branch.token_ids) for branch in first.outputs]
        assert drawn == [list(branch.token_ids) for branch in second.outputs]
        assert len({tuple(each) for each in drawn}) == 3
        together = await serving.generate(prompt, transcribing.settings(GenerationConfig(n=2), asked))
    expected = checkpoints.reference(path, sound(4, 1.3), language="en")
    assert [list(branch.token_ids) for branch in together.outputs] == [expected] * 2


async def test_log_probabilities(written: Callable[..., Path]) -> None:
    path = written()
    async with engine(path) as serving:
        asked = TranscriptionPrompt(heard(4), "en")
        prompt = AudioPrompt(transcribing_of(await serving._view()).request(asked), [asked.audio])
        result = await serving.generate(prompt, GenerationConfig(temperature=0.0, max_tokens=3, logprobs=True))
    model = checkpoints.loaded(path)
    begin = [IDS[mark] for mark in ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")]
    with torch.no_grad():
        logits = model(
            checkpoints.features(path, sound(4, 1.3)),
            decoder_input_ids=torch.tensor([[*begin, *result.token_ids[:2]]]),
        ).logits[0, 3:]
    expected = logits.log_softmax(-1).max(-1)
    assert list(result.token_ids) == expected.indices.tolist()
    assert [each.logprob for each in result.outputs[0].logprobs or ()] == pytest.approx(
        expected.values.tolist(), abs=1e-3
    )


async def test_sleep_wake_and_new_weights(written: Callable[..., Path]) -> None:
    path, other = written(), written(1)
    asked = TranscriptionPrompt(heard(1), "de")
    async with engine(path) as serving:
        before = await answer(serving, asked)
        await serving.sleep()
        await serving.wake()
        assert await answer(serving, asked) == before
        state = dict(checkpoints.loaded(other).state_dict())
        state.pop("proj_out.weight")
        await serving.update_weights(state)
        assert await answer(serving, asked) == checkpoints.reference(other, sound(1, 1.3), language="de") != before


async def test_it_comes_and_goes(written: Callable[..., Path]) -> None:
    """In the place of another model, and another in its place; nothing of it is left."""
    async with AsyncEngine(EngineConfig("tiny", device="cpu")) as serving:
        text = await serving.generate("Once", GenerationConfig(temperature=0.0, max_tokens=4))
        await serving.reload(engine_config(written()))
        loaded = serving._thread.core.loaded
        assert loaded is not None
        model = weakref.ref(loaded.model._text._model)  # type: ignore[attr-defined]
        del loaded
        assert (await serving.transcribe(heard(1), language="de")).language == "de"
        with pytest.raises(InvalidRequestError, match="the prompt has no audio"):
            await serving.generate("Once")
        await serving.reload(EngineConfig("tiny", device="cpu"))
        gc.collect()
        assert model() is None
        again = await serving.generate("Once", GenerationConfig(temperature=0.0, max_tokens=4))
        assert again.text == text.text
        with pytest.raises(InvalidRequestError, match="the model takes none"):
            await serving.transcribe(heard(1), language="de")


async def test_a_request_without_audio_does_not_go_over_to_it(written: Callable[..., Path]) -> None:
    """It would be taken for one whose first tokens stand for an audio."""
    async with AsyncEngine(EngineConfig("tiny", device="cpu")) as serving:
        await serving.pause()
        vocabulary = list(range(100))
        stream = await serving.add_request([5, 6, 7], GenerationConfig(max_tokens=9, allowed_token_ids=vocabulary))
        await serving.reload(engine_config(written()).replace(tokenizer="tiny"), in_flight="carry")
        with pytest.raises(InvalidRequestError, match="the new model writes what it hears; it has no audio"):
            await stream


async def test_another_model_between_the_language_and_the_text(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a transcript is by one model: the language that it found, and the tokens that are its own."""
    path, other = written(6), written(1)
    seed = next(
        seed
        for seed in range(9)
        if checkpoints.language_of(path, sound(seed, 1.3)) != checkpoints.language_of(other, sound(seed, 1.3))
    )
    ask, reloads = Hearing._know_language, [EngineConfig(str(other), device="cpu", dtype="float32")]

    async def then_reload(self: Any, piece: Any) -> bool:
        found = await ask(self, piece)
        if reloads:
            await serving.reload(reloads.pop())
        return found

    monkeypatch.setattr(Hearing, "_know_language", then_reload)
    async with engine(path) as serving:
        found = await serving.transcribe(heard(seed))
        assert not reloads
        alone = await serving.transcribe(heard(seed))
    assert (found.language, found.text) == (alone.language, alone.text)
    assert found.language == checkpoints.language_of(other, sound(seed, 1.3))


def engine_config(path: Path) -> EngineConfig:
    return EngineConfig(str(path), device="cpu", dtype="float32", max_num_sequence=4)


async def test_cancelling_leaves_the_others(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """At a time when its audio was encoded, and when nothing was."""
    path, begun = written(), threading.Event()
    encode = SourceEncoder._made

    def tell(self: Any, given: Any, item: Any) -> Any:
        begun.set()
        return encode(self, given, item)

    monkeypatch.setattr(SourceEncoder, "_made", tell)
    async with engine(path) as serving:
        for wait in (False, True):
            begun.clear()
            going = asyncio.ensure_future(serving.transcribe(heard(2 + wait), language="de"))
            if wait:
                await asyncio.to_thread(begun.wait)
            going.cancel()
            with pytest.raises(asyncio.CancelledError):
                await going
            other = await answer(serving, TranscriptionPrompt(heard(1), "de"))
            assert other == checkpoints.reference(path, sound(1, 1.3), language="de")
        await serving.reset()
        metrics = serving.metrics()
        assert metrics.kv_blocks_free == metrics.kv_blocks_total


async def test_one_that_cannot_be_encoded_ends_its_own_requests(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = SourceEncoder._made
    broken: set[bytes] = set()

    def fail(self: Any, given: Any, item: Any) -> Any:
        if not broken:
            broken.add(item.digest)
        if item.digest in broken:
            raise RuntimeError("a bad day")
        return encode(self, given, item)

    monkeypatch.setattr(SourceEncoder, "_made", fail)
    async with engine(written()) as serving:
        found = await asyncio.gather(
            serving.transcribe(heard(1), language="de"),
            serving.transcribe(heard(2), language="de"),
            return_exceptions=True,
        )
        failed = [each for each in found if isinstance(each, Exception)]
        assert len(failed) == 1 and isinstance(failed[0], StepError) and "a bad day" in str(failed[0])


async def test_a_piece_that_fails_ends_the_others(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encoded = SourceEncoder._made, list[bytes]()

    def fail(self: Any, given: Any, item: Any) -> Any:
        encoded.append(item.digest)
        if len(encoded) == 1:
            raise RuntimeError("a bad day")
        return encode(self, given, item)

    monkeypatch.setattr(SourceEncoder, "_made", fail)
    async with engine(written(), max_num_sequence=1) as serving:
        await serving.pause()
        going = asyncio.ensure_future(serving.transcribe(heard(9, 7.5), language="de"))
        await eventually(lambda: serving.metrics().num_requests_waiting == 3)
        await serving.resume()
        with pytest.raises(StepError, match="a bad day"):
            await going
        await serving.drain()
        ended = serving.metrics().counters.requests
    assert ended["error"] == 1 and ended["abort"] >= 2


async def test_pieces_that_were_aborted_are_not_just_cut_off(written: Callable[..., Path]) -> None:
    async with engine(written(), max_num_sequence=1) as serving:
        await serving.pause()
        options = RequestOptions(request_id="long")
        going = asyncio.ensure_future(
            serving.transcribe(heard(9, 4.5), GenerationConfig(max_tokens=2), options, language="de")
        )
        await eventually(lambda: serving.metrics().num_requests_waiting == 3)
        await serving.abort_request("long-1")
        await serving.resume()
        found = await going
    assert found.finish_reason is FinishReason.ABORT and found.text


async def test_more_pieces_than_the_queue_has_places(written: Callable[..., Path]) -> None:
    at_once = RequestOptions(when_full="raise")
    async with engine(written(), max_queue_size=2, max_num_sequence=1) as serving:
        short = GenerationConfig(max_tokens=3)
        expected = await serving.transcribe(heard(9, 7.5), short, language="de")
        assert (await serving.transcribe(heard(9, 7.5), short, at_once, language="de")).text == expected.text
        await serving.pause()
        prompt = AudioPrompt("<|startoftranscript|>", [heard(1)])
        before = [await serving.add_request(prompt, short) for _ in range(2)]
        with pytest.raises(EngineOverloadedError, match="2 requests wait; max_queue_size is 2"):
            await serving.transcribe(heard(9, 7.5), short, at_once, language="de")
        # One that has begun is not given up for others: it waits.
        await serving.abort_request(before.pop().request_id)
        going = asyncio.ensure_future(serving.transcribe(heard(9, 7.5), short, at_once, language="de"))
        await eventually(lambda: serving.metrics().num_requests_waiting == 2)
        await serving.resume()
        assert (await going).text == expected.text
        await before[0]


async def test_the_loop_goes_on_while_an_audio_is_read(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hints, which may be long, are read on threads, and audio on few: many at once would take a lot of memory."""
    request, pieces = WhisperTranscription.request, WhisperTranscription.pieces
    threads, at_once = list[threading.Thread](), list[int]()

    def requested(self: Any, asked: Any) -> str:
        threads.append(threading.current_thread())
        return request(self, asked)

    def cut(self: Any, audio: Any) -> Any:
        at_once.append(readers.borrowed_tokens)
        yield from pieces(self, audio)

    monkeypatch.setattr(WhisperTranscription, "request", requested)
    monkeypatch.setattr(WhisperTranscription, "pieces", cut)
    async with engine(written()) as serving:
        readers = media_readers()
        await serving.transcribe(heard(1), GenerationConfig(max_tokens=1), language="de", hint="x " * 5)
    assert threading.current_thread() not in threads and at_once == [1]


@pytest.mark.parametrize("seconds", [1.5, 16.0])
async def test_samples_are_let_go_once_they_are_read(
    seconds: float, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none are decoded before there is room for their piece: those of an hour are a quarter of a gigabyte."""
    pieces, samples = WhisperTranscription.pieces, list[Any]()

    def noted(piece: AudioPiece) -> AudioPiece:
        samples.append(weakref.ref(piece.audio[0]))  # type: ignore[index]
        return piece

    def cut(self: Any, audio: Any) -> Any:
        return map(noted, pieces(self, audio))

    monkeypatch.setattr(WhisperTranscription, "pieces", cut)
    async with engine(written()) as serving:
        await serving.pause()
        twice = (np.repeat(sound(1, seconds), 2), 2 * RATE)  # which is resampled
        going = asyncio.ensure_future(serving.transcribe(twice, GenerationConfig(max_tokens=2), language="de"))
        read = 1 if seconds < 2 else 4 + 2
        await eventually(lambda: serving.metrics().num_requests_waiting == read)
        await eventually(lambda: all(each() is None for each in samples))
        assert len(samples) == read
        await serving.resume()
        assert (await going).text and (await going).seconds == seconds
        assert len(samples) >= seconds / 2


async def test_an_audio_that_is_damaged_in_its_middle(written: Callable[..., Path]) -> None:
    samples = sound(1, 25.0)
    samples[-5] = np.nan
    async with engine(written()) as serving:
        stream = serving.transcribe((samples, RATE), GenerationConfig(max_tokens=2), language="de")
        said = ""
        with pytest.raises(InvalidRequestError, match=r"audio\[0\]: an audio has samples that are not finite"):
            async for delta in stream:
                said += delta.text
        whole = await serving.transcribe((samples[:-5], RATE), GenerationConfig(max_tokens=2), language="de")
        assert said and whole.text.startswith(said)
        await serving.reset()
        assert serving.metrics().kv_blocks_free == serving.metrics().kv_blocks_total


async def test_a_transcript_ends_before_a_stop_string(written: Callable[..., Path]) -> None:
    async with engine(written()) as serving:
        whole = await serving.transcribe(heard(0), language="de")
        stop = whole.text[6:8]
        cut = await serving.transcribe(heard(0), GenerationConfig(stop_strs=stop), language="de")
    assert (cut.text, cut.finish_reason) == (whole.text.partition(stop)[0], FinishReason.STOP) and cut.text


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"language": "xx"}, "language is 'xx'; the model knows de, en, fr"),
    ({"language": 3}, "language is 3"),
    ({"task": "sing"}, "task is 'sing'"),
    ({"timestamps": 1}, "timestamps is 1"),
    ({"hint": "<|endoftext|> x", "language": "de"}, "which has marks of the model's"),
    ({"hint": "x" * ROOM, "language": "de"}, "hint has 41 tokens; allowed: up to 19"),
]


async def test_wrong_prompts(written: Callable[..., Path]) -> None:
    async with engine(written()) as serving:
        for asked, message in WRONG:
            with pytest.raises(InvalidRequestError, match=message.replace("|", r"\|")):
                await serving.transcribe(heard(1), **asked)
        text = "<|startoftranscript|>"
        with pytest.raises(InvalidRequestError, match="the prompt has no audio"):
            await serving.generate([257, 258])
        with pytest.raises(InvalidRequestError, match="the prompt has no audio"):
            await serving.pin_prompt("hear")
        with pytest.raises(InvalidRequestError, match="the model hears one"):
            await serving.generate(AudioPrompt(text, [heard(1), heard(2)]))
        with pytest.raises(InvalidRequestError, match=r"2\.50 s is longer than the model hears at once, 2 s"):
            await serving.generate(AudioPrompt(text, [heard(1, 2.5)]))
        with pytest.raises(InvalidRequestError, match="prompt_logprobs is 0"):
            await serving.generate(AudioPrompt(text, [heard(1)]), GenerationConfig(prompt_logprobs=0))
        with pytest.raises(InvalidRequestError, match=r"audio\[0\]: an audio has no samples"):
            await serving.transcribe((np.zeros(0, np.float32), RATE))
        with pytest.raises(InvalidRequestError, match=r"audio\[0\]: an audio is 3"):
            await serving.transcribe(3)
        with pytest.raises(InvalidRequestError, match="options is 3"):
            await serving.transcribe(heard(1), None, 3)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError):
            await serving.chat([{"role": "user", "content": [{"type": "audio", "audio": heard(1)}]}])
        with pytest.raises(InvalidRequestError):
            await serving.embed(["hear"])
        with pytest.raises(ContextLengthExceededError):
            await serving.generate(AudioPrompt(text * ROOM, [heard(1)]))
        result = await serving.transcribe(heard(1), GenerationConfig(max_tokens=2), language="de")
        assert result.finish_reason is FinishReason.LENGTH


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"speculative_mode": "ngram"}, ConfigError, "speculative_mode is 'ngram'"),
    ({"quantization": "int8"}, ConfigError, "quantization is 'int8'"),
    ({"decoder_backend": "compiled"}, ConfigError, "decoder_backend is 'compiled'"),
    ({"kv_cache_dtype": "fp8_e4m3"}, ConfigError, "kv_cache_dtype is"),
    ({"images": True}, UnsupportedModelError, "images is True"),
    ({"audio": False}, ConfigError, "audio is False"),
    ({"mla": True}, UnsupportedModelError, "mla is True"),
    ({"max_single_sequence_length": 100}, ConfigError, r"allow 40 behind it: 106\.\.144"),
    ({"max_single_sequence_length": 145}, ConfigError, r"allow 40 behind it: 106\.\.144"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED)
async def test_settings_that_are_refused(
    changes: dict[str, Any], kind: type[Exception], message: str, written: Callable[..., Path]
) -> None:
    with pytest.raises(kind, match=message):
        async with engine(written(), **changes):
            pass


def without(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def changed(name: str, **values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        stated = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(stated | values))

    return change


DAMAGED: list[tuple[Callable[[Path], None], str]] = [
    (without("preprocessor_config.json"), "has no preprocessor_config.json"),
    (without("tokenizer.json"), "there are no tokenizer files"),
    (changed("preprocessor_config.json", feature_size=20), "makes 200 frames of 20 mel bins; its encoder takes 200 of"),
    (changed("config.json", decoder_layers=3), "weights are missing"),
    (changed("config.json", d_model=36), "weights are of another shape"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
async def test_damaged_checkpoints(
    damage: Callable[[Path], None], message: str, written: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(written(), path)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        async with engine(path):
            pass


async def test_classifiers_of_audio(written: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "classifier"
    shutil.copytree(written(), path)
    changed("config.json", architectures=["WhisperForAudioClassification"])(path)
    with pytest.raises(UnsupportedModelError, match="is a classifier of audio"):
        async with engine(path):
            pass


async def test_a_finetuned_one_of_other_languages_and_more_words(written: Callable[..., Path], tmp_path: Path) -> None:
    """Which languages it knows, its checkpoint says; the tokens of its words are behind those of times."""
    path = tmp_path / "finetuned"
    shutil.copytree(written(vocab_size=checkpoints.VOCABULARY + 1), path)
    own = checkpoints.tokenizer()
    own.add_tokens(["zebra"])
    own.save_pretrained(path)
    zebra = checkpoints.VOCABULARY
    changed("generation_config.json", lang_to_id={"<|de|>": IDS["<|de|>"]}, suppress_tokens=[-1, 65])(path)
    async with engine(path) as serving:
        transcribing = transcribing_of(await serving._view())
        with pytest.raises(InvalidRequestError, match="the model knows de"):
            await serving.transcribe(heard(1), language="en")
        assert (await serving.transcribe(heard(1), GenerationConfig(max_tokens=1))).language == "de"
    hinted = transcribing.request(TranscriptionPrompt(None, "de", "a zebra"))
    assert hinted.startswith("<|startofprev|> a zebra<|startoftranscript|>")
    tokens = [FIRST_TIME + 5, 66, zebra, FIRST_TIME + 20, END]
    [segment] = transcribing.segments(tokens, None, AudioPiece(None, 10.0, 11.5), Quality())
    reader = transcribing.reader(())
    assert segment.text == reader.push("", tokens) + reader.flush() == "Bzebra"
    assert (segment.start, segment.end) == (pytest.approx(10.1), pytest.approx(10.4))
    [processor] = transcribing.settings(GenerationConfig(), TranscriptionPrompt(None, "de")).logits_processors
    logits = torch.zeros(zebra + 1)
    processor(logits, LogitsRow(np.array([5], np.int32), np.empty(0, np.int32), 0))
    assert torch.isinf(logits).nonzero()[:, 0].tolist() == [32, 65, END]


async def test_without_settings_of_generation(written: Callable[..., Path], tmp_path: Path) -> None:
    """Whether it knows languages is told by its vocabulary then, as of the published ones: this one does not."""
    path = tmp_path / "bare"
    shutil.copytree(written(), path)
    (path / "generation_config.json").unlink()
    async with engine(path) as serving:
        with pytest.raises(InvalidRequestError, match="English alone"):
            await serving.transcribe(heard(1), language="de")
        assert (await serving.transcribe(heard(1))).usage.audio_tokens == 100


async def test_it_says_that_a_faster_back_end_cannot_be_had(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise BackendUnavailableError("there is no compiler")

    monkeypatch.setattr(select, "CpuAttention", refuse)
    async with engine(written()) as serving:
        assert "attention: there is no compiler" in serving.health().notes
        assert (await serving.transcribe(heard(1), GenerationConfig(max_tokens=2), language="de")).text


async def test_a_tokenizer_of_another_kind(written: Callable[..., Path]) -> None:
    async with engine(written(), tokenizer="tiny") as serving:
        assert any("transcripts: refused" in note for note in serving.health().notes)
        with pytest.raises(InvalidRequestError, match="does not say how it is asked"):
            await serving.transcribe(heard(1))
        reader = (await serving._view()).media_reader
        assert reader is not None
        with pytest.raises(InvalidRequestError, match="comes to no tokens"):  # as of some tokenizer's space
            reader.read({"audio": [heard(1)]}, lambda encode: [], lambda text: [], 100)
        raw = AudioPrompt("x", [heard(1)])
        assert (await serving.generate(raw, GenerationConfig(max_tokens=2, detokenize=False))).token_ids
