"""`kv_cache_dtype="fp8_e4m3"`: who takes it, how much it holds, and what the engine says of its error."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncengine import AsyncEngine, ConfigError, EngineConfig, GenerationConfig, UnsupportedModelError
from asyncengine.model import architecture, load_check
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.verification import Trial

pytestmark = pytest.mark.loops("either")

Checkpoint = Callable[..., Path]


def config(path: Path, **changes: object) -> EngineConfig:
    return EngineConfig(str(path), device="cpu", attention_backend="torch").replace(**changes)


async def test_an_engine_serves_over_it_and_says_how_far_off_it_is(checkpoint: Checkpoint) -> None:
    given = config(checkpoint("llama"), kv_cache_dtype="fp8_e4m3", mode="interactive")
    async with AsyncEngine(given) as engine:
        (note,) = [note for note in engine.health().notes if note.startswith("KV cache")]
        found = re.fullmatch(r"KV cache: fp8_e4m3: logits of a trial are ([\d.]+)% of their norm off", note)
        assert found is not None and 0 < float(found[1]) < 10
        prompt = list(range(1, 80))
        greedy = GenerationConfig(temperature=0, max_tokens=8, ignore_eos=True)
        first = await engine.generate(prompt, greedy)
        again = await engine.generate(prompt, greedy)
        assert again.usage.cached_tokens > 0
        assert first.token_ids == again.token_ids
        assert engine.complete_engine_config.kv_cache_dtype == "fp8_e4m3"


def test_the_same_memory_holds_twice_as_many_tokens_as_in_bfloat16(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_check.memory, "free_bytes", lambda device: 1 << 30)
    half = config(checkpoint("llama"), dtype="bfloat16", kv_cache_page_size=16, gpu_memory_utilization=0.001)
    loader, blocks = TransformersLoader(), []
    for given in (half, half.replace(kv_cache_dtype="fp8_e4m3")):
        loaded = loader.load(loader.check(given, None))
        loaded.model.close()
        blocks.append(loaded.limits.num_blocks)
    assert blocks[1] // 2 == blocks[0]


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_the_kernel_for_the_cpu_refuses_and_names_who_does_not(backend: str, checkpoint: Checkpoint) -> None:
    given = config(checkpoint("llama"), kv_cache_dtype="fp8_e4m3", attention_backend=backend)
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'fp8_e4m3' .*not torch\.float8_e4m3fn; allowed: "):
        TransformersLoader().check(given, None)


def test_a_model_whose_values_do_not_fit_into_it_gets_scales_or_is_refused(checkpoint: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), dtype=torch.float32, attn_implementation=architecture.ATTENTION
    ).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(1e4)
    layers = architecture.record(model)
    trial = Trial.of(model, layers, torch.device("cpu"))
    assert trial.run(model, TorchAttention()) < 1e-3
    with pytest.raises(UnsupportedModelError, match=r"allowed 0\.4 in torch\.float8_e4m3fn"):
        trial.run(model, TorchAttention(), kv_dtype=torch.float8_e4m3fn)
    trial.layers = trial.scaled(model, TorchAttention())
    assert [layer.spec.key_scale for layer in trial.layers.attention] == [1.0] * len(layers.attention)
    assert all(layer.spec.value_scale > 4 for layer in trial.layers.attention)
    assert trial.run(model, TorchAttention(), kv_dtype=torch.float8_e4m3fn) < 0.1
    assert trial.run(model, TorchAttention()) < 1e-3  # they are for fp8 alone


@pytest.mark.parametrize("factor", [1e4, 1e-3])
async def test_an_engine_scales_what_would_be_cut_off_or_vanish(
    checkpoint: Checkpoint, tmp_path: Path, factor: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(factor)
            layer.self_attn.o_proj.weight.div_(factor)
    model.save_pretrained(tmp_path)
    given = config(tmp_path, kv_cache_dtype="fp8_e4m3", mode="interactive")
    async with AsyncEngine(given) as engine:
        (note,) = [note for note in engine.health().notes if note.startswith("KV cache")]
        found = re.fullmatch(r"KV cache: fp8_e4m3, 3 of 6 scaled: logits of a trial are ([\d.]+)% .*", note)
        assert found is not None and 0 < float(found[1]) < 10
