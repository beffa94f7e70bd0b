"""How far a transcript can be trusted, and what becomes of what cannot: as transformers and openai-whisper have it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from asyncengine import (
    AsyncEngine,
    AudioPrompt,
    EngineConfig,
    GenerationConfig,
    TranscriptionFallback,
    TranscriptSegment,
)
from asyncengine.fallback import compression_ratio
from asyncengine.loop.encoding import transcribing_of
from asyncengine.transcription import TranscriptionPrompt
from tests.model.speech import checkpoints
from tests.model.speech.checkpoints import END, FIRST_TIME, RATE, judged, sound

pytestmark = pytest.mark.loops("either")

SEEDS = range(4)
NO_FALLBACK: dict[str, Any] = {"temperature": (0.0,), "logprob_threshold": -50.0, "no_speech_threshold": 0.99}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("quality") / "whisper", times=True)


@pytest.fixture
async def serving(whisper: Path) -> AsyncIterator[AsyncEngine]:
    async with engine(whisper) as found:
        yield found


def engine(path: Path, **changes: Any) -> AsyncEngine:
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_page_size": 4, "max_num_sequence": 4}
    return AsyncEngine(EngineConfig(str(path), **(values | changes)))


def heard(seed: int, seconds: float = 2.0) -> tuple[Any, int]:
    return sound(seed, seconds), RATE


async def segments_of(serving: AsyncEngine, seed: int, **asked: Any) -> tuple[TranscriptSegment, ...]:
    return (await serving.transcribe(heard(seed), language="de", timestamps=True, **asked)).segments


async def test_segments_have_what_transformers_has_of_them(whisper: Path) -> None:
    """Beside each other and behind a hint, in chunks, with preemptions, and out of the prefix cache."""
    hint = torch.tensor(checkpoints.tokenizer().get_prompt_ids("of Foo"))
    asked: dict[str, Any] = {"language": "de", "return_timestamps": True, **NO_FALLBACK}
    expected = [judged(whisper, sound(seed, 2.0), **asked) for seed in SEEDS[:3]]
    behind = judged(whisper, sound(0, 2.0), prompt_ids=hint, **asked)
    assert behind.no_speech_prob[0] != pytest.approx(expected[0].no_speech_prob[0], rel=0.01)
    async with engine(whisper, prefill_chunk_size=24, max_total_sequence_length=240) as serving:
        found = await asyncio.gather(*[segments_of(serving, seed) for seed in (*SEEDS[:3], *SEEDS[:3])])
        hinted = await segments_of(serving, 0, hint="of Foo")
        assert serving.metrics().counters.preemptions > 0
        again = await serving.transcribe(heard(0), language="de", timestamps=True)
    assert again.usage.cached_tokens >= 100
    compared, wants = 0, (*expected, *expected, behind, expected[0])
    for segments, wanted in zip((*found, hinted, again.segments), wants, strict=True):
        [(likely, silent)] = {(segment.avg_logprob, segment.no_speech_prob) for segment in segments}
        assert likely == pytest.approx(wanted.avg_logprob[0], abs=1e-4)
        assert silent == pytest.approx(wanted.no_speech_prob[0], rel=1e-3)
        assert {(segment.temperature, segment.seek) for segment in segments} == {(0.0, 0)}
        own = [(segment.start, segment.end, list(segment.token_ids)) for segment in segments]
        whole = [
            # transformers gives the last one the time at which another begins, too.
            (pytest.approx(start), pytest.approx(end), ids[:-1] if ids[-2] >= FIRST_TIME else ids)
            for start, end, ids in wanted.segments
            if end <= 2.0 and text_of(ids)
        ]
        assert own[: len(whole)] == whole
        compared += len(whole)
        ratio = compression_ratio(text_of(wanted.token_ids))
        assert [segment.compression_ratio for segment in segments] == [pytest.approx(ratio)] * len(segments)
    assert compared > 6


def text_of(token_ids: list[int]) -> str:
    return str(checkpoints.tokenizer().decode([token for token in token_ids if token < END])).strip()


async def test_what_is_heard_later_says_where(serving: AsyncEngine) -> None:
    found = await serving.transcribe(heard(5, 4.7), language="de", timestamps=True)
    pieces = list(transcribing_of(await serving._view()).pieces(heard(5, 4.7)))
    assert {segment.seek for segment in found.segments} == {round(100 * piece.start) for piece in pieces}
    for segment in found.segments:
        [piece] = [piece for piece in pieces if round(100 * piece.start) == segment.seek]
        assert piece.end is not None and piece.start <= segment.start < segment.end <= piece.end
    assert len({segment.no_speech_prob for segment in found.segments}) == len(pieces) > 2


async def test_what_looks_wrong_and_is_silent_is_left_out(whisper: Path, serving: AsyncEngine) -> None:
    """Where transformers leaves it out, by either threshold."""
    room: dict[str, Any] = {"language": "de", "return_timestamps": False, "max_new_tokens": 6}
    plain = [judged(whisper, sound(seed, 2.0), **room, **NO_FALLBACK) for seed in SEEDS]
    likely = median(each.avg_logprob[0] for each in plain)
    silent = median(each.no_speech_prob[0] for each in plain)
    config = GenerationConfig(max_tokens=6)
    outcomes = set[bool]()
    for least, most in ((likely, silent), (0.0, silent), (likely, 0.0)):
        asked: dict[str, Any] = {"temperature": (0.0,), "logprob_threshold": least, "no_speech_threshold": most}
        fallback = TranscriptionFallback(**asked, compression_ratio_threshold=None)
        found = await asyncio.gather(
            *[serving.transcribe(heard(seed), config, language="de", fallback=fallback) for seed in SEEDS]
        )
        for seed, transcript in zip(SEEDS, found, strict=True):
            wanted = judged(whisper, sound(seed, 2.0), **room, **asked).token_ids
            assert transcript.text == checkpoints.tokenizer().decode(wanted).strip(), (least, most, seed)
            outcomes.add(bool(wanted))
    assert outcomes == {False, True}


async def test_what_looks_wrong_is_written_down_at_the_next_temperature(serving: AsyncEngine) -> None:
    """Until it does not, or there are no more; what comes then is what the model says at that temperature."""
    temperatures, config = (0.0, 0.7, 0.9), GenerationConfig(max_tokens=20, seed=2)
    drawn = [
        await serving.transcribe(heard(2), config.replace(temperature=temperature), language="de")
        for temperature in temperatures
    ]
    ratios = [compression_ratio(each.text) for each in drawn]
    assert len(set(ratios)) == 3
    off: dict[str, Any] = {"compression_ratio_threshold": None, "logprob_threshold": None, "no_speech_threshold": None}
    found = set[int]()
    for thresholds in ({}, {"logprob_threshold": 0.0}, *({"compression_ratio_threshold": ratio} for ratio in ratios)):
        fallback = TranscriptionFallback(temperature=temperatures, **(off | thresholds))
        got = await serving.transcribe(heard(2), config, language="de", fallback=fallback)
        most = thresholds.get("compression_ratio_threshold", 0.0 if thresholds else 9.0)
        attempt = next((at for at, ratio in enumerate(ratios) if ratio <= most), 2)
        assert got.text == drawn[attempt].text, thresholds
        assert got.usage.completion_tokens == sum(each.usage.completion_tokens for each in drawn[: attempt + 1])
        assert got.usage.prompt_tokens == (attempt + 1) * drawn[0].usage.prompt_tokens
        found.add(attempt)
    assert len(found) > 1


async def test_pieces_are_doubted_each_by_itself(serving: AsyncEngine) -> None:
    config = GenerationConfig(max_tokens=12, seed=3)
    plain = await serving.transcribe(heard(5, 4.7), config, language="de", timestamps=True)
    likely = {segment.seek: segment.avg_logprob for segment in plain.segments}
    least = median(value for value in likely.values() if value is not None)
    fallback = TranscriptionFallback(
        temperature=[0.0, 0.6], logprob_threshold=least, compression_ratio_threshold=None, no_speech_threshold=None
    )
    found = await serving.transcribe(heard(5, 4.7), config, language="de", timestamps=True, fallback=fallback)
    for segment in found.segments:
        before = likely[segment.seek]
        assert before is not None and segment.temperature == (0.6 if before < least else 0.0)
    assert {segment.temperature for segment in found.segments} == {0.0, 0.6} and len(likely) > 2


async def test_avg_logprob_is_of_what_may_be_said_at_any_temperature(whisper: Path, serving: AsyncEngine) -> None:
    config = GenerationConfig(max_tokens=9, seed=1, temperature=0.8)
    [segment, *_] = (await serving.transcribe(heard(2), config, language="de", timestamps=True)).segments
    asked = TranscriptionPrompt(heard(2), "de", timestamps=True)
    transcribing = transcribing_of(await serving._view())
    settings = transcribing.settings(config, asked)
    ids = (await serving.generate(AudioPrompt(transcribing.request(asked), [heard(2)]), settings)).token_ids
    expected = checkpoints.likely_with_times(whisper, sound(2, 2.0), "de", ids)
    assert segment.avg_logprob == pytest.approx(sum(expected) / len(ids), abs=1e-4) and ids[0] >= FIRST_TIME
