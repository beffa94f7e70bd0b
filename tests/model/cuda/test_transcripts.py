"""Whisper as it runs on CUDA, on a pretended device: what it says is what it says on the host."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import WhisperFeatureExtractor

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.model.encoder_decoder import trial
from tests.model.attention.triton_device import require_triton
from tests.model.cuda.pretended import TOTAL, Pretended, pretended
from tests.model.fused.interpreted import on_one_loop
from tests.model.speech import checkpoints


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """With a load that tries as few tokens as it can: the interpreter takes its time."""
    require_triton()
    monkeypatch.setattr(trial, "_PIECES", (2, 1))
    with pretended() as device:
        yield device
        gc.collect()
        assert device.allocated == 0, "something outlives its engine"


@on_one_loop
@pytest.mark.long
async def test_transcripts_are_those_of_the_host(device: Pretended, tmp_path: Path) -> None:
    """Of more sequences than there is memory for, so that all that may be taken is."""
    heads = [(0, 1)]
    path = checkpoints.write(tmp_path, heads=heads, decoder_layers=1, encoder_layers=1, max_source_positions=25)
    hearing = {"feature_size": 16, "sampling_rate": checkpoints.RATE, "hop_length": 320, "n_fft": 400}
    WhisperFeatureExtractor(chunk_length=1, **hearing).save_pretrained(path)
    config = EngineConfig(str(path), device="cuda", dtype="float32", max_num_sequence=6000, gpu_memory_utilization=0.03)

    async def transcript(engine: AsyncEngine, seed: int, language: str | None) -> Any:
        audio, short = (checkpoints.sound(seed, 0.9), checkpoints.RATE), GenerationConfig(max_tokens=2)
        found = await engine.transcribe(
            audio, short, language=language, timestamps="word" if language is None else False
        )
        words = [(word.word, word.start, word.end) for word in found.words]
        return found.text, found.language, words, found.segments and found.segments[0].token_ids

    async def work(engine: AsyncEngine) -> list[Any]:
        return await asyncio.gather(transcript(engine, 0, None), transcript(engine, 1, "de"))

    async with AsyncEngine(config) as engine:
        assert engine.health().notes == ()
        found = await work(engine)
        assert device.allocated <= 0.03 * TOTAL and found[0][2]
        await engine.sleep()
        await engine.wake()
        assert await transcript(engine, 1, "de") == found[1]
    async with AsyncEngine(config.replace(device="cpu", max_num_sequence=2, gpu_memory_utilization=None)) as engine:
        assert await work(engine) == found
