"""The last look before a model serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncengine.errors import UnsupportedModelError
from asyncengine.model import architecture
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.runner import TorchModel
from asyncengine.model.verification import Trial


def test_a_model_that_keeps_nothing_does_not_pass_by_its_first_piece(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), dtype=torch.float32, attn_implementation=architecture.ATTENTION
    ).eval()
    trial = Trial.of(model, architecture.layers_of(model, None), torch.device("cpu"))
    assert trial.run(model, TorchAttention()) < 1e-3
    logits = TorchModel.logits

    def forgetful(runner: TorchModel, batch: Any) -> torch.Tensor:
        found = logits(runner, batch)
        return found if not batch.context_lens.any() else torch.zeros_like(found)

    monkeypatch.setattr(TorchModel, "logits", forgetful)
    with pytest.raises(UnsupportedModelError, match="does not compute over a paged KV cache"):
        trial.run(model, TorchAttention())
