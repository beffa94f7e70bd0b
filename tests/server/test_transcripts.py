"""Whisper behind the server: transcripts and translations in all their forms, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import io
import json
import re
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import soundfile

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.outputs import Transcript, TranscriptSegment
from asyncengine.server import create_app
from asyncengine.subtitles import srt, vtt
from tests.model.speech import checkpoints
from tests.server.serving import client_of, error, listening, settled, until

pytestmark = pytest.mark.loops("either")

ROUTE, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("listening") / "whisper", times=True)


@pytest.fixture
async def serving(whisper: Path) -> AsyncIterator[AsyncEngine]:
    config = EngineConfig(str(whisper), device="cpu", dtype="float32", max_num_sequence=4)
    async with AsyncEngine(config) as engine:
        yield engine


def file_of(seed: int, seconds: float) -> bytes:
    """A file of 16 bits, as clients send it."""
    written = io.BytesIO()
    soundfile.write(written, checkpoints.sound(seed, seconds), checkpoints.RATE, format="WAV")
    return written.getvalue()


async def test_forms_of_a_transcript(serving: AsyncEngine) -> None:
    data = file_of(1, 3.1)
    own: Transcript = await serving.transcribe(data, language="de", timestamps=True)
    plain = await serving.transcribe(data, language="de")
    english = await serving.transcribe(data, task="translate", timestamps=True)
    assert len(own.segments) > 2 and own.text != english.text
    async with listening(create_app(serving)) as url, openai.AsyncOpenAI(api_key="x", base_url=f"{url}/v1") as client:
        audio = client.audio
        said = await audio.transcriptions.create(file=("a.wav", data), model="whisper", language="de")
        assert said.text == plain.text and said.usage is not None and said.usage.type == "tokens"
        assert said.usage.input_tokens == plain.usage.prompt_tokens
        text = await audio.transcriptions.create(
            file=("a.wav", data), model="whisper", language="de", response_format="text"
        )
        assert text == plain.text
        verbose = await audio.transcriptions.create(
            file=("a.wav", data),
            model="whisper",
            language="de",
            response_format="verbose_json",
            timestamp_granularities=["segment"],
        )
        assert (verbose.text, verbose.language, verbose.duration) == (own.text, "de", pytest.approx(3.1))
        assert verbose.words is None
        assert [segment.id for segment in verbose.segments or ()] == list(range(len(own.segments)))
        for segment, expected in zip(verbose.segments or (), own.segments, strict=True):
            assert (segment.start, segment.end) == pytest.approx((expected.start, expected.end), abs=6e-4)
            assert (segment.text, tuple(segment.tokens)) == (expected.text, expected.token_ids)
            assert segment.avg_logprob == pytest.approx(expected.avg_logprob) and segment.avg_logprob < 0
            assert segment.compression_ratio == expected.compression_ratio and segment.temperature == 0
            assert segment.no_speech_prob == pytest.approx(expected.no_speech_prob)
            assert segment.seek == expected.seek
        assert len({segment.seek for segment in verbose.segments or ()}) == 2
        assert verbose.usage is not None and verbose.usage.seconds == pytest.approx(3.1)
        for form, write in (("srt", srt), ("vtt", vtt)):
            found: Any = await audio.transcriptions.create(
                file=("a.wav", data), model="whisper", language="de", response_format=form
            )
            assert found == write(own.segments)
        with warnings.catch_warnings():  # some versions of the client call the method deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            translated: Any = await audio.translations.create(
                file=("a.wav", data), model="whisper", response_format="verbose_json"
            )
        assert (translated.text, len(translated.segments)) == (english.text, len(english.segments))


async def test_times_of_words(serving: AsyncEngine) -> None:
    data, forms = file_of(1, 2.2), list[Any]()
    own = await serving.transcribe(data, language="de", timestamps="word")
    async with listening(create_app(serving)) as url, openai.AsyncOpenAI(api_key="x", base_url=f"{url}/v1") as client:
        for granularities in (["word"], ["segment", "word"]):
            verbose = await client.audio.transcriptions.create(
                file=("a.wav", data),
                model="whisper",
                language="de",
                response_format="verbose_json",
                timestamp_granularities=granularities,  # type: ignore[arg-type]
            )
            forms.append(verbose)
            assert verbose.text == own.text and verbose.words is not None and len(own.words) > 3
            for word, expected in zip(verbose.words, own.words, strict=True):
                assert word.word == expected.word.strip()
                assert (word.start, word.end) == pytest.approx((expected.start, expected.end), abs=6e-4)
    assert forms[0].segments is None and len(forms[1].segments) == len(own.segments)


async def test_words_of_a_model_that_does_not_know_when_they_are_said(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, times=True, heads=())
    async with AsyncEngine(EngineConfig(str(path), device="cpu", dtype="float32", max_num_sequence=4)) as serving:
        async with client_of(create_app(serving)) as client:
            form = {"timestamp_granularities[]": "word", "response_format": "verbose_json"}
            refused = await client.post(ROUTE, data=form, files={"file": ("a.wav", file_of(1, 0.5))})
    assert refused.status_code == 400 and error(refused)["param"] == "timestamp_granularities[]"
    assert (
        "has 'word', and the model knows no times of words: there are no alignment_heads" in error(refused)["message"]
    )


@pytest.mark.parametrize(
    ("route", "form", "param", "says"),
    [
        (ROUTE, {"language": "xx"}, "language", "the model knows de, en, fr"),
        (ROUTE, {"timestamp_granularities[]": "letter"}, "timestamp_granularities[]", "allowed: 'segment', 'word'"),
        (
            ROUTE,
            {"timestamp_granularities[]": "word", "response_format": "srt"},
            "timestamp_granularities[]",
            "needs the response_format 'verbose_json'; it is 'srt'",
        ),
        (TRANSLATIONS, {"timestamp_granularities[]": "word"}, "timestamp_granularities[]", "unknown field"),
        (
            ROUTE,
            {"timestamp_granularities[]": "segment"},
            "timestamp_granularities[]",
            "needs the response_format 'verbose_json'",
        ),
        (ROUTE, {"response_format": "xml"}, "response_format", "allowed: 'json', 'text', 'verbose_json', 'srt', 'vtt'"),
        (TRANSLATIONS, {"language": "de"}, "language", "unknown field 'language'"),
        (TRANSLATIONS, {"prompt": "<|endoftext|>"}, "prompt", "has marks of the model's"),
    ],
)
async def test_what_is_refused(route: str, form: dict[str, str], param: str, says: str, serving: AsyncEngine) -> None:
    async with client_of(create_app(serving)) as client:
        refused = await client.post(route, data=form, files={"file": ("a.wav", file_of(1, 0.5))})
        assert refused.status_code == 400 and error(refused)["param"] == param, refused.text
        assert says in error(refused)["message"]
        for messages in ([{"role": "user", "content": "hello"}],):
            chat = await client.post("/v1/chat/completions", json={"model": "whisper", "messages": messages})
            assert chat.status_code == 400
        assert (await client.post("/v1/completions", json={"model": "whisper", "prompt": "x"})).status_code == 400


async def test_one_that_is_aborted_is_an_error(serving: AsyncEngine) -> None:
    async with client_of(create_app(serving)) as client:
        await serving.pause()
        file = {"file": ("a.wav", file_of(1, 3.1))}
        asked = asyncio.ensure_future(client.post(ROUTE, data={"language": "de"}, files=file))
        await until(lambda: serving.metrics().num_requests_waiting == 2)
        await serving.reset()
        response = await asked
    assert response.status_code == 503 and error(response)["code"] == "request_aborted"
    assert response.headers["retry-after"] == "1"


async def test_transcripts_are_streamed_as_openai_does(serving: AsyncEngine) -> None:
    data = file_of(1, 3.1)
    plain = await serving.transcribe(data, language="de")
    english = await serving.transcribe(data, task="translate")
    async with listening(create_app(serving)) as url, openai.AsyncOpenAI(api_key="x", base_url=f"{url}/v1") as client:
        asked = {"file": ("a.wav", data), "model": "whisper"}
        stream: Any = await client.audio.transcriptions.create(**asked, language="de", stream=True)  # type: ignore[call-overload]
        *deltas, done = [event async for event in stream]
        assert {delta.type for delta in deltas} == {"transcript.text.delta"} and done.type == "transcript.text.done"
        assert "".join(delta.delta for delta in deltas) == done.text == plain.text
        assert done.usage.type == "tokens" and done.usage.output_tokens == plain.usage.completion_tokens
        form = {"file": ("a.wav", data)}
        answer = await client._client.post(f"{url}{TRANSLATIONS}", data={"stream": "true"}, files=form)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.endswith("data: [DONE]\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
        assert "".join(event["delta"] for event in events[:-1]) == events[-1]["text"] == english.text


async def test_who_leaves_a_streamed_transcript_ends_it(serving: AsyncEngine) -> None:
    async with listening(create_app(serving)) as url, openai.AsyncOpenAI(api_key="x", base_url=f"{url}/v1") as client:
        file = ("a.wav", file_of(1, 60.0))
        stream: Any = await client.audio.transcriptions.create(file=file, model="whisper", language="de", stream=True)
        await anext(aiter(stream))
        await stream.close()
        await settled(serving)
    assert serving.metrics().counters.requests["abort"] > 0


async def test_one_that_is_streamed_and_aborted_says_so(serving: AsyncEngine) -> None:
    async with client_of(create_app(serving)) as client:
        await serving.pause()
        file = {"file": ("a.wav", file_of(1, 3.1))}
        asked = asyncio.ensure_future(client.post(ROUTE, data={"language": "de", "stream": "true"}, files=file))
        await until(lambda: serving.metrics().num_requests_waiting == 2)
        await serving.reset()
        [error_event, done, _] = (await asked).text.split("\n\n")
    assert json.loads(error_event.removeprefix("data: "))["error"]["code"] == "request_aborted"
    assert done == "data: [DONE]"


async def test_what_looks_wrong_is_written_down_anew_if_asked(serving: AsyncEngine) -> None:
    async with client_of(create_app(serving)) as client:
        form = {"language": "de", "fallback": "true", "response_format": "verbose_json", "temperature": "0"}
        answer = (await client.post(ROUTE, data=form, files={"file": ("a.wav", file_of(1, 0.7))})).json()
    assert {segment["temperature"] for segment in answer["segments"]} == {1.0}  # a random model is never sure


def test_subtitles() -> None:
    said = [TranscriptSegment(0.0, 1.2345, " a  <b> & c ", (1,)), TranscriptSegment(3661.5, 3662.0, "d\ne", (2,))]
    assert srt(said) == ("1\n00:00:00,000 --> 00:00:01,234\na <b> & c\n\n2\n01:01:01,500 --> 01:01:02,000\nd e\n")
    assert vtt(said) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.234\na &lt;b&gt; &amp; c\n\n01:01:01.500 --> 01:01:02.000\nd e\n"
    )
    assert srt([]) == "" and vtt([]) == "WEBVTT\n"
    assert all(re.fullmatch(r"[\d:,]+ --> [\d:,]+", line) for line in srt(said).splitlines() if "-->" in line)
