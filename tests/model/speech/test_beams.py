"""Transcripts that are searched for: those that transformers finds with as many beams."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, TranscriptionFallback
from tests.model.speech import checkpoints
from tests.model.speech.checkpoints import RATE, sound

pytestmark = pytest.mark.loops("either")

BEAMS = GenerationConfig(num_beams=3)


def engine(path: Path) -> AsyncEngine:
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_num_sequence": 9, "kv_cache_page_size": 8}
    return AsyncEngine(EngineConfig(str(path), **values))


async def test_transcripts_are_those_that_transformers_finds(tmp_path: Path) -> None:
    """Several at once."""
    path = checkpoints.write(tmp_path)
    expected = [checkpoints.reference(path, sound(seed, 1.3), language="de", num_beams=3) for seed in range(3)]
    assert expected != [checkpoints.reference(path, sound(seed, 1.3), language="de") for seed in range(3)]
    async with engine(path) as serving:
        asked = [serving.transcribe((sound(seed, 1.3), RATE), BEAMS, language="de") for seed in range(3)]
        found = await asyncio.gather(*asked)
        texts = [checkpoints.tokenizer().decode(each, skip_special_tokens=True) for each in expected]
        assert [each.text for each in found] == texts


async def test_what_looks_wrong_is_drawn_anew_without_a_search(tmp_path: Path) -> None:
    """As openai-whisper does it, which searches at a temperature of 0 alone."""
    asked = (sound(0, 1.3), RATE), BEAMS
    async with engine(checkpoints.write(tmp_path, 7, times=True)) as serving:
        found = await serving.transcribe(*asked, language="de", timestamps=True)
        assert found.segments and all(segment.avg_logprob is not None for segment in found.segments)
        assert {segment.temperature for segment in found.segments} == {0.0}
        doubts = TranscriptionFallback(
            temperature=(0.0, 0.4), logprob_threshold=1.0, no_speech_threshold=None
        )  # all is doubted
        warm = await serving.transcribe(*asked, language="de", timestamps=True, fallback=doubts)
        assert {segment.temperature for segment in warm.segments} == {0.4}
