"""Whole models over the Triton kernels: the same comparison with transformers that every load makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from triton_device import DEVICE, require_triton

from asyncengine import EngineConfig
from asyncengine.errors import ConfigError
from asyncengine.model import architecture, verification
from asyncengine.model.attention.triton import TritonAttention
from asyncengine.model.latent_attention import keep_latents
from asyncengine.model.loader import TransformersLoader


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "minicpm3"])
@pytest.mark.in_short("gpt_oss")
def test_models_compute_what_transformers_computes(name: str, checkpoint: Callable[..., Path]) -> None:
    require_triton()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(name, num_hidden_layers=2), dtype=torch.float32, attn_implementation=architecture.ATTENTION
    ).to(DEVICE)
    keep_latents(model)  # of minicpm3; the others have none
    layers = architecture.record(model.eval())
    assert any(layer.spec.values_in_keys for layer in layers.attention) == (name == "minicpm3")
    backend = TritonAttention(programs=4, parts_bytes=1 << 16)
    verification.Trial.of(model, layers, DEVICE).run(model, backend)


def test_a_load_on_the_cpu_with_triton_is_refused(checkpoint: Callable[..., Path]) -> None:
    config = EngineConfig(str(checkpoint("llama")), device="cpu", attention_backend="triton")
    with pytest.raises(ConfigError, match=r"attention_backend is 'triton': .* needs a CUDA device, not cpu"):
        TransformersLoader().check(config, None)
