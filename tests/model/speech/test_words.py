"""Times of words: they are those that `generate(return_token_timestamps=True)` of transformers finds, and its words."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.whisper import generation_whisper, tokenization_whisper

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, InvalidRequestError, TranscriptWord
from asyncengine.loop.encoding import transcribing_of
from asyncengine.model.speech import transcription
from asyncengine.model.speech.alignment import _median_filtered, alignment_heads, token_ends
from asyncengine.model.speech.words import Spelling, SpokenToken, words_of
from asyncengine.model.tokenizer import FastTokenizer
from asyncengine.transcription import Alignment, AudioPiece, Quality
from tests.model.speech import checkpoints
from tests.model.speech.checkpoints import END, FIRST_TIME, RATE, SECONDS, sound

pytestmark = pytest.mark.loops("either")

FRAME = 0.02
LENGTHS = {0: 2.0, 1: 1.3, 2: 0.91, 3: 1.57}
"""Seconds of sounds, by their seeds."""
SETTINGS: list[dict[str, Any]] = [
    {"prefill_chunk_size": 24, "kv_cache_page_size": 4, "max_total_sequence_length": 240},
    {"prefix_cache_mode": "disable", "attention_backend": "torch", "max_num_sequence": 2},
]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose tokens look at different frames."""
    return checkpoints.write(tmp_path_factory.mktemp("words") / "whisper", 4, times=True, sharp=7)


@pytest.fixture(scope="module")
def expected(whisper: Path) -> list[checkpoints.Spoken]:
    """What transformers makes of the sounds, and of the second one behind a hint."""
    found = [checkpoints.spoken(whisper, heard(seed)[0], language="de") for seed in LENGTHS]
    hint = torch.tensor(checkpoints.tokenizer().get_prompt_ids("of Foo"))
    behind = checkpoints.spoken(whisper, heard(1)[0], language="de", prompt_ids=hint)
    assert sum(len(set(each.ends)) for each in found) > 20 and behind.token_ids != found[1].token_ids
    return [*found, behind]


def engine(path: Path, **changes: Any) -> AsyncEngine:
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_page_size": 8, "max_num_sequence": 4}
    return AsyncEngine(EngineConfig(str(path), **(values | changes)))


def heard(seed: int, seconds: float | None = None) -> tuple[Any, int]:
    return sound(seed, LENGTHS[seed] if seconds is None else seconds), RATE


def plain(words: Sequence[TranscriptWord]) -> list[tuple[str, float, float]]:
    return [(word.word, word.start, word.end) for word in words]


def near(words: list[tuple[str, float, float]]) -> list[Any]:
    """The same words, within a frame."""
    return [
        (word, pytest.approx(start, abs=1.1 * FRAME), pytest.approx(end, abs=1.1 * FRAME)) for word, start, end in words
    ]


@pytest.mark.parametrize("changes", SETTINGS, ids=[",".join(each) for each in SETTINGS])
@pytest.mark.in_short("prefill_chunk_size,kv_cache_page_size,max_total_sequence_length")
async def test_they_are_those_of_transformers(
    changes: dict[str, Any], whisper: Path, expected: list[checkpoints.Spoken]
) -> None:
    """Several at once, one of them twice, and behind a hint, in chunks, with preemptions, over two back ends."""
    async with engine(whisper, **changes) as serving:
        asked: dict[str, Any] = {"language": "de", "timestamps": "word"}
        found = await asyncio.gather(
            *[serving.transcribe(heard(seed), **asked) for seed in (*LENGTHS, 0)],
            serving.transcribe(heard(1), hint="of Foo", **asked),
        )
        without = await serving.transcribe(heard(0), language="de", timestamps=True)
        assert (serving.metrics().counters.preemptions > 0) == ("max_total_sequence_length" in changes)
        await serving.reset()
        metrics = serving.metrics()
        assert metrics.kv_blocks_free == metrics.kv_blocks_total
    for transcript, wanted in zip(found, (*expected[:-1], expected[0], expected[-1]), strict=True):
        assert plain(transcript.words) == near(checkpoints.words(wanted, "de"))
        for segment in transcript.segments:
            assert "".join(word.word for word in segment.words).replace(" ", "") == segment.text.replace(" ", "")
        assert all(0 < (word.probability or 0) <= 1 for word in transcript.words)
    assert not without.words and found[0].text == without.text
    for segment, other in zip(found[0].segments, without.segments, strict=True):
        assert (segment.start, segment.end, segment.token_ids) == (other.start, other.end, other.token_ids)
    usage = found[0].usage
    assert usage.completion_tokens == without.usage.completion_tokens
    # The audio and what begins the text, twice, and the text once more.
    assert usage.prompt_tokens == 2 * without.usage.prompt_tokens + usage.completion_tokens - 1


async def test_probability_is_that_of_its_tokens(whisper: Path) -> None:
    async with engine(whisper) as serving:
        found = await serving.transcribe(
            heard(0), GenerationConfig(temperature=0.5, seed=1), language="de", timestamps="word"
        )
    for segment in found.segments:
        tokens = [len(word.word.encode()) for word in segment.words]  # a byte is a token
        likely = sum(np.log(word.probability or 0) for word in segment.words if len(word.word) == 1)
        assert sum(tokens) == len([token for token in segment.token_ids if token < END])
        assert segment.logprob is not None and likely <= 0
        if set(tokens) == {1}:
            assert segment.logprob == pytest.approx(likely / len(tokens), abs=1e-6)


async def test_what_is_longer_has_them_in_its_own_seconds(whisper: Path) -> None:
    samples = sound(9, 4.7)
    async with engine(whisper) as serving:
        pieces = list(transcribing_of(await serving._view()).pieces((samples, RATE)))
        asked: dict[str, Any] = {"language": "de", "timestamps": "word"}
        alone = [await serving.transcribe(piece.audio, **asked) for piece in pieces]
        stream = serving.transcribe((samples, RATE), **asked)
        given = [word async for delta in stream for segment in delta.segments for word in segment.words]
        whole = await stream
    expected = [
        (word.word, piece.start + word.start, piece.start + word.end)
        for piece, transcript in zip(pieces, alone, strict=True)
        for word in transcript.words
    ]
    assert len(pieces) == 3 and tuple(given) == whole.words
    assert plain(whole.words) == [(word, pytest.approx(start), pytest.approx(end)) for word, start, end in expected]
    times = [time for word in whole.words for time in (word.start, word.end)]
    assert times == sorted(times) and times[-1] <= 4.7


async def test_in_bfloat16(whisper: Path) -> None:
    async with engine(whisper, dtype="bfloat16", attention_backend="torch") as serving:
        words = (await serving.transcribe(heard(0), language="de", timestamps="word")).words
    assert len(words) > 1 and len({word.end for word in words}) > 1
    assert all(one.start <= one.end <= other.start <= SECONDS for one, other in pairwise(words))


async def test_where_nothing_is_to_be_found_out_nothing_is_asked(whisper: Path) -> None:
    """Of one token, a time, and of a text of one token behind it."""
    async with engine(whisper) as serving:
        ended = serving.metrics().counters.requests
        asked: dict[str, Any] = {"language": "de", "timestamps": "word"}
        assert not (await serving.transcribe(heard(0), GenerationConfig(max_tokens=1), **asked)).segments
        assert sum(serving.metrics().counters.requests.values()) - sum(ended.values()) == 1
        [word] = (await serving.transcribe(heard(0), GenerationConfig(max_tokens=2), **asked)).words
        assert sum(serving.metrics().counters.requests.values()) - sum(ended.values()) == 3
        assert word.word and (word.start, word.end) == (0, 0)
        transcribing, piece = transcribing_of(await serving._view()), AudioPiece(None, 10.0, 11.31)
    assert transcribing.to_align([], piece) == transcribing.to_align([END], piece) == (0, 0)
    assert transcribing.to_align([FIRST_TIME, FIRST_TIME + 5, END], piece) == (0, 0)
    assert transcribing.to_align([FIRST_TIME, 65, FIRST_TIME + 5, END], piece) == (3, 65)
    assert transcribing.to_align([65], AudioPiece(None, 10.0, 10.001)) == (0, 1)
    [segment] = transcribing.segments([65], None, piece, Quality(), Alignment((), "de"))
    assert segment.words == (TranscriptWord("A", 10.0, 10.0),)


async def test_words_are_parted_as_in_the_language_that_is_written(
    whisper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    languages = list[str | None]()

    def noted(tokens: Any, spelling: Any, language: str | None) -> Any:
        languages.append(language)
        return words_of(tokens, spelling, language)

    monkeypatch.setattr(transcription, "words_of", noted)
    async with engine(whisper) as serving:
        short = GenerationConfig(max_tokens=2)
        for asked in ({}, {"task": "translate"}):
            await serving.transcribe(heard(0), short, language="german", timestamps="word", **asked)  # type: ignore[arg-type]
    assert languages == ["de", "en"]


async def test_a_model_of_english_alone(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, 4, multilingual=False, times=True, sharp=7)
    async with engine(path) as serving:
        found = await serving.transcribe(heard(0), timestamps="word")
    wanted = checkpoints.spoken(path, heard(0)[0])
    assert plain(found.words) == near(checkpoints.words(wanted, "en")) and len(found.words) > 1


async def test_a_model_whose_heads_are_not_known_has_other_times(whisper: Path, tmp_path: Path) -> None:
    path = tmp_path / "without"
    shutil.copytree(whisper, path)
    stated = json.loads((path / "generation_config.json").read_text())
    del stated["alignment_heads"]
    (path / "generation_config.json").write_text(json.dumps(stated))
    async with engine(path) as serving:
        message = "^timestamps is 'word'; the model knows no times of words: there are no alignment_heads of its"
        with pytest.raises(InvalidRequestError, match=message):
            await serving.transcribe(heard(0), language="de", timestamps="word")
        assert (await serving.transcribe(heard(0), language="de", timestamps=True)).segments


# Without a model


HEADS: list[tuple[Any, dict[int, list[int]], str]] = [
    (None, {}, "there are no alignment_heads"),
    ([], {}, "there are no alignment_heads"),
    ([[1, 0], [0, 1], [1, 1]], {1: [0, 1], 0: [1]}, ""),
    ([[0, 1], [1, 2]], {}, "have [1, 2]; there are 2 layers of 2 heads"),
    ([[2, 0]], {}, "have [2, 0]; there are 2 layers"),
    ([[0, -1]], {}, "have [0, -1]; there are"),
    ([[0, 1, 1]], {}, "have [0, 1, 1]; expected a layer and a head"),
    ([3], {}, "have 3; expected a layer and a head"),
]


@pytest.mark.parametrize(("stated", "heads", "message"), HEADS)
def test_heads_that_a_checkpoint_states(stated: Any, heads: dict[int, list[int]], message: str) -> None:
    found, why = alignment_heads(SimpleNamespace(alignment_heads=stated), checkpoints.config())
    assert found == heads and message in why and bool(why) != bool(found)


SHAPES = [(1, 1, 1), (1, 1, 9), (2, 5, 1), (3, 4, 3), (2, 7, 4), (1, 40, 30), (3, 30, 150), (2, 70, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_way_through_is_that_of_transformers(shape: tuple[int, int, int]) -> None:
    """In pieces, and where nothing is there to choose: of one token, or one frame."""
    _, tokens, frames = shape
    weights = np.random.default_rng(frames).uniform(0, 1, shape).astype(np.float32)
    expected = np.zeros(tokens, np.int64)
    if tokens > 1:
        spread, mean = torch.std_mean(torch.from_numpy(weights), dim=1, keepdim=True, correction=0)
        filtered = generation_whisper._median_filter((torch.from_numpy(weights) - mean) / spread, 7).mean(0)
        rows, columns = generation_whisper._dynamic_time_warping(-filtered.double().numpy())
        expected = columns[np.flatnonzero(np.diff(rows, prepend=-1))]
    found = token_ends(np.array_split(weights, min(tokens, 3), axis=1), 7)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("width", [1, 3, 5, 7])
def test_the_filter_is_that_of_transformers(width: int) -> None:
    for tokens, frames in ((1, 1), (33, 3), (5, 4), (70, 40)):
        rows = np.random.default_rng(width).normal(size=(tokens, frames)).astype(np.float32)
        expected = generation_whisper._median_filter(torch.from_numpy(rows)[None], width)[0]
        assert np.array_equal(_median_filtered(rows, width), expected.numpy())


def test_frames_that_no_token_looks_at_and_tokens_that_look_alike() -> None:
    """Where transformers divides by zero."""
    weights = np.zeros((2, 6, 40), np.float32)
    for token in range(6):
        weights[:, token, 5 * token + 5 : 5 * token + 10] = 0.2
    assert token_ends([weights], 7).tolist() == [0, 10, 15, 20, 25, 30]
    for alike in (0.0, 0.5, np.nan):
        ends = token_ends([np.full((2, 6, 40), alike, np.float32)], 7).tolist()
        assert ends == sorted(ends) and ends[0] == 0 and ends[-1] < 40


TEXTS = {
    "de": " Er sagte: „Nein!“ (nie) - wirklich... ja-wohl. 5,3 % à la ñandú",
    "en": "It's a \"test\", isn't it? [yes] {no} ¿que? 🙂 🙂🙂",
    "zh": "你好，世界。「再見」！abc 你",
    "ja": "こんにちは、「世界」。",
    "th": "สวัสดี",
    "xx": "a b",
}


@pytest.mark.parametrize("language", TEXTS)
def test_words_are_those_of_transformers(language: str) -> None:
    tokenizer = checkpoints.tokenizer()
    ids = tokenizer.encode(TEXTS[language], add_special_tokens=False)
    name = tokenization_whisper.LANGUAGES.get(language, "english")
    words, _, places = tokenization_whisper._combine_tokens_into_words(tokenizer, ids, name)
    tokens = [SpokenToken(token, place, place + 0.5, np.log(1 / (place + 1))) for place, token in enumerate(ids)]
    found = words_of(tokens, Spelling(FastTokenizer(tokenizer), END), language)
    assert [word.word for word in found] == words and "".join(words) == TEXTS[language]
    for word, own in zip(found, places, strict=True):
        assert (word.start, word.end) == (own[0], own[-1] + 0.5)
        assert word.probability == pytest.approx(np.mean([1 / (place + 1) for place in own]))
    assert len(words) > 2 or language == "xx"


def test_special_tokens_are_in_no_word() -> None:
    tokenizer = checkpoints.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|speaker|>"]})
    ids = [65, checkpoints.VOCABULARY, 66, 32, 67]
    tokens = [SpokenToken(token, place, place + 1, None) for place, token in enumerate(ids)]
    spelling = Spelling(FastTokenizer(tokenizer), END)
    assert words_of(tokens, spelling, None) == (TranscriptWord("AB", 0, 3), TranscriptWord(" C", 3, 5))
    assert words_of([], spelling, None) == ()
