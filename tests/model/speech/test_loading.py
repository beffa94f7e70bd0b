"""Whisper over back ends of attention that take a GPU, with stand-ins for the libraries behind them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.model.attention import flashinfer
from asyncengine.model.attention.flash_attention import FlashAttention3
from asyncengine.model.attention.flashinfer import FlashInferAttention
from asyncengine.model.attention.select import Selection
from asyncengine.model.speech import loading
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
