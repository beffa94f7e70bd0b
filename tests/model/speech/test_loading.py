"""Whisper over back ends of attention that take a GPU, with stand-ins for the libraries behind them."""

from __future__ import annotations

import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncengine import (
    AsyncEngine,
    DeadlineExceededError,
    Deadlines,
    EngineConfig,
    GenerationConfig,
    RequestOptions,
)
from asyncengine.model.attention import flashinfer
from asyncengine.model.attention.flash_attention import FlashAttention3
from asyncengine.model.attention.flashinfer import FlashInferAttention
from asyncengine.model.attention.select import Selection
from asyncengine.model.encoder_decoder import loading
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.model.speech import loading as speech_loading
from asyncengine.model.speech.transcription import WhisperTranscription
from tests.model.attention.fake_libraries import modules
from tests.model.speech import checkpoints

pytestmark = pytest.mark.loops("either")


@pytest.mark.parametrize("kind", [FlashInferAttention, FlashAttention3])
async def test_it_runs_over_libraries(
    kind: type[FlashInferAttention | FlashAttention3], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load compares what it computes with transformers'."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 1 << 10)
    monkeypatch.setattr(loading, "select_attention", lambda *_: Selection(kind()))
    path = checkpoints.write(tmp_path, d_model=128, decoder_layers=1, encoder_layers=1)
    config = EngineConfig(str(path), device="cpu", dtype="float16", max_num_sequence=2, kv_cache_page_size=16)
    async with AsyncEngine(config) as engine:
        audio = checkpoints.sound(1, 1.3), checkpoints.RATE
        found = await engine.transcribe(audio, GenerationConfig(max_tokens=3), language="de")
        assert len(found.text) == 3


async def test_what_it_is_tried_with_is_let_go_before_memory_is_reckoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[weakref.ref[torch.Tensor]] = []
    allocate, reckon = PagedLayers.allocate, speech_loading.limits_of

    def watched(self: PagedLayers) -> None:
        allocate(self)
        caches.extend(weakref.ref(cache.keys) for cache in self.caches)

    def reckoned(*given: Any) -> Any:
        assert caches and not any(cache() is not None for cache in caches)
        return reckon(*given)

    monkeypatch.setattr(PagedLayers, "allocate", watched)
    monkeypatch.setattr(speech_loading, "limits_of", reckoned)
    async with AsyncEngine(EngineConfig(str(checkpoints.write(tmp_path)), device="cpu", dtype="float32")):
        assert len(caches) == 4


async def test_a_deadline_ends_it_while_the_audio_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over, ended = threading.Event(), []

    def cut(self: WhisperTranscription, audio: Any) -> Any:
        ended.append(over.wait(10))
        return []

    monkeypatch.setattr(WhisperTranscription, "pieces", cut)
    async with AsyncEngine(EngineConfig(str(checkpoints.write(tmp_path)), device="cpu", dtype="float32")) as engine:
        options = RequestOptions(deadlines=Deadlines(total=0.05))
        with pytest.raises(DeadlineExceededError, match=r"the total deadline of 0\.05 s passed"):
            await engine.transcribe((checkpoints.sound(1, 1.0), checkpoints.RATE), options=options, language="de")
        assert not ended
        over.set()
