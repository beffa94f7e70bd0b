"""An encoder-decoder model of text as it runs on CUDA with weights of few bits, on a pretended device."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.config import Quantization
from asyncengine.model.encoder_decoder import trial
from asyncengine.model.quantised import four_bit_product
from tests.model.attention.triton_device import require_triton
from tests.model.cuda.pretended import Pretended, pretended
from tests.model.fused.interpreted import on_one_loop
from tests.model.text_to_text import checkpoints

CASES = [("int4", False), *(pytest.param(*case, marks=pytest.mark.long) for case in (("int4", True), ("fp8", False)))]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """With a load that tries as few tokens as it can: the interpreter takes its time."""
    require_triton()
    monkeypatch.setattr(trial, "_PIECES", (2, 1))
    monkeypatch.setattr(trial, "_READ", 3)
    with pretended() as device:
        yield device
        gc.collect()
        assert device.allocated == 0, "something outlives its engine"


@on_one_loop
@pytest.mark.parametrize(
    ("quantization", "fails"),
    [
        ("int4", False),
        pytest.param("int4", True, marks=pytest.mark.long),
        pytest.param("fp8", False, marks=pytest.mark.long),
    ],
)
async def test_weights_of_few_bits(
    quantization: Quantization, fails: bool, device: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their kernels are what the load tries; where those of four bits compute something else, they are not used."""
    path = checkpoints.write(tmp_path, "bart", decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    multiply = four_bit_product.multiply

    def wrong(x: torch.Tensor, *others: Any) -> torch.Tensor:
        return multiply(x, *others).flip(-1)

    if fails:
        monkeypatch.setattr(four_bit_product, "multiply", wrong)
    config = EngineConfig(str(path), device="cuda", quantization=quantization, max_num_sequence=2)
    async with AsyncEngine(config) as engine:
        note, *more = engine.health().notes
        assert note.startswith(f"quantization: {quantization}, ") and note.endswith("of their norm off")
        assert ["relative error" in each for each in more] == [True] * fails
        result = await engine.generate(checkpoints.source(1, 3), GenerationConfig(max_tokens=2, ignore_eos=True))
        assert len(result.token_ids) == 2
        kernels = {"by_tile"} if fails else {"by_row", "by_tile"} if quantization == "int4" else {"quantise_rows"}
        assert kernels <= set(device.kernels)
