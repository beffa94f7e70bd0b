"""Models that do not run as a compiled step, loaded and served with the compiled code's products."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from asyncengine import AsyncEngine, EngineConfig, ReloadError, UnsupportedModelError
from asyncengine.cli.estimate import read
from asyncengine.model.decoder.compiled_experts import CompiledExperts
from asyncengine.model.decoder.compiled_linear import CompiledLinear
from asyncengine.model.decoder.weights import PackedMatrix
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.packed_linear import PackedLinear
from asyncengine.step.model import LoadedModel
from tests.model.stored import coded_checkpoints
from tests.model.stored.test_kept import scored

pytestmark = pytest.mark.loops("either")

Checkpoint = Callable[..., Path]
PROMPT = [*range(3, 40)]
MODELS = ["deepseek_v3", "qwen3_5", "qwen3_5_moe", "lfm2_moe", "granitemoehybrid"]


def config_of(path: Path, **changes: Any) -> EngineConfig:
    settings = {"device": "cpu", "mode": "interactive", "max_num_sequence": 4, "max_total_sequence_length": 512}
    return EngineConfig(str(path), **{**settings, **changes})


def load(path: Path, **changes: Any) -> LoadedModel:
    loader = TransformersLoader()
    return loader.load(loader.check(config_of(path, **changes), None))


def calmed(path: Path, to: Path) -> Path:
    """The same checkpoint with smaller weights, which four bits move less far."""
    tensors = {
        name: each * 0.3 if each.dim() == 2 else each for name, each in load_file(path / "model.safetensors").items()
    }
    return coded_checkpoints.saved(to, path, tensors)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [*((name, "float32") for name in MODELS), ("qwen3_5_moe", "bfloat16")]
)
@pytest.mark.in_short("qwen3_5-float32", "deepseek_v3-float32", "granitemoehybrid-float32", "qwen3_5_moe-bfloat16")
def test_layers_and_experts_are_replaced(architecture: str, dtype: str, checkpoint: Checkpoint) -> None:
    """And an estimate knows what they take, but for routers and what fills vectors up."""
    path = checkpoint(architecture, vocab_size=208)
    loaded = load(path, dtype=dtype)
    assert loaded.config.decoder_backend == "transformers"
    [note] = loaded.notes
    assert note.startswith("decoder: runs as transformers has it: ")
    model: Any = loaded.model
    kinds = {type(module) for module in model._model.modules()}
    assert CompiledLinear in kinds
    assert (CompiledExperts in kinds) == (architecture != "qwen3_5")
    assert type(model._model.get_output_embeddings()) is CompiledLinear
    [held] = model.debug_call("weight_bytes", ())
    assert read(config_of(path, dtype=dtype)).weight_bytes == pytest.approx(held, rel=0.04)
    loaded.model.close()


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        *zip(MODELS, itertools.cycle(["int8", "int4"]), strict=False),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in zip(MODELS, itertools.cycle(["int4", "int8"]), strict=False)
        ),
    ],
)
def test_they_are_kept_in_few_bits(
    architecture: str, quantization: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The embedding stays a table; a note says how much is narrow, and how far that moved the logits.

    An estimate knows what they take, but for routers, buffers and what fills vectors up: so small a model has much.
    """
    path = calmed(checkpoint(architecture, vocab_size=208), tmp_path / "calm")
    loaded = load(path, quantization=quantization)
    assert loaded.config.dtype == "bfloat16"
    note = loaded.notes[1]
    assert note.startswith(f"quantization: {quantization}, ") and "% of the weights, rounded: logits" in note
    assert int(note.split()[2].removesuffix("%")) > 70
    model: Any = loaded.model
    assert not model._model.get_input_embeddings().weight.is_meta
    assert model._model.get_output_embeddings().matrix.weights.dtype is torch.int8
    [held] = model.debug_call("weight_bytes", ())
    assert read(config_of(path, quantization=quantization)).weight_bytes == pytest.approx(held, rel=0.1)
    loaded.model.close()


async def test_an_engine_serves_them_and_replaces_their_weights(checkpoint: Checkpoint) -> None:
    """After new weights it computes what an engine does that was loaded with them; after refused ones, what it did."""
    first, second = checkpoint("deepseek_v3", seed=1), checkpoint("deepseek_v3", seed=2)
    for settings in ({"dtype": "float32"}, {"quantization": "int8"}):
        config = config_of(first, **settings)
        async with AsyncEngine(config) as engine:
            before = await scored(engine, PROMPT)
            dtype = getattr(torch, engine.complete_engine_config.dtype)
            weights = weights_of(second, dtype)
            wrong = {**weights, "model.layers.1.mlp.experts.down_proj": torch.zeros(2, 2)}
            with pytest.raises(ReloadError, match="model's is"):
                await engine.update_weights(wrong)
            assert torch.equal(await scored(engine, PROMPT), before)
            await engine.update_weights(weights)
            after = await scored(engine, PROMPT)
            await engine.sleep()
            await engine.wake()
            assert torch.equal(await scored(engine, PROMPT), after)
            await engine.reload(config)
            assert torch.equal(await scored(engine, PROMPT), before)
        async with AsyncEngine(config.replace(model=str(second))) as engine:
            assert torch.equal(await scored(engine, PROMPT), after)
        assert not torch.equal(before, after)


def weights_of(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.state_dict()


async def test_weights_that_fail_half_way_are_put_back(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = checkpoint("qwen3_5", seed=1), checkpoint("qwen3_5", seed=2)
    async with AsyncEngine(config_of(first, quantization="int8")) as engine:
        before = await scored(engine, PROMPT)
        weights = weights_of(second, torch.bfloat16)
        with monkeypatch.context() as patched:
            patched.setattr(PackedMatrix, "write", failing_at(5))
            with pytest.raises(ReloadError, match="none was replaced"):
                await engine.update_weights(weights)
        assert torch.equal(await scored(engine, PROMPT), before)
        await engine.update_weights(weights)
        assert not torch.equal(await scored(engine, PROMPT), before)


def failing_at(call: int) -> Callable[..., None]:
    write, calls = PackedMatrix.write, [0]

    def failing(matrix: PackedMatrix, part: int, weight: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise MemoryError("none is left")
        write(matrix, part, weight)

    return failing


async def test_codes_of_a_checkpoint_stay_codes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """They say what the numbers say that they stand for."""
    plain = checkpoint("deepseek_v3", vocab_size=192, q_lora_rank=32, kv_lora_rank=32, v_head_dim=16)
    coded, numbers = coded_checkpoints.write(tmp_path, plain, "awq")
    async with AsyncEngine(config_of(coded, quantization="int4")) as engine:
        [_, note] = engine.health().notes
        assert "% of the weights, as stored: logits" in note
        found = await scored(engine, PROMPT)
    async with AsyncEngine(config_of(numbers, dtype="float32")) as engine:
        exact = await scored(engine, PROMPT)
    async with AsyncEngine(config_of(numbers, dtype="bfloat16")) as engine:
        rounded = await scored(engine, PROMPT)
    assert (found - exact).norm() < 2 * (rounded - exact).norm() + 0.01 * exact.norm()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_transformers_modules_may_be_asked_for(quantization: str, checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint("llama"), quantization=quantization, decoder_backend="transformers")
    [note] = loaded.notes
    assert note.startswith(f"quantization: {quantization}, ")
    loaded.model.close()


def test_where_nothing_can_be_in_few_bits_a_load_is_refused(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama", hidden_size=40, intermediate_size=40)
    with pytest.raises(UnsupportedModelError, match="has no linear layers that could be in int8"):
        load(path, quantization="int8")
    load(path, dtype="float32").model.close()


def test_modules_that_read_what_is_let_go_keep_it(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    path = checkpoint("llama")
    loaded = load(path, dtype="float32", decoder_backend="transformers")
    [note] = loaded.notes
    assert note.startswith("decoder: its linear layers run as torch has them: ")
    model: Any = loaded.model
    assert not any(isinstance(module, CompiledLinear) for module in model._model.modules())
    loaded.model.close()
    with pytest.raises(UnsupportedModelError, match=r"cannot be in int8: |too far off in int8"):
        load(path, quantization="int8", decoder_backend="transformers")


def test_without_the_compiled_code_layers_are_those_of_onednn(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama", hidden_size=512, intermediate_size=512)
    loaded = load(path, dtype="float32", attention_backend="torch")
    model: Any = loaded.model
    kinds = {type(module) for module in model._model.modules()}
    assert PackedLinear in kinds and CompiledLinear not in kinds
    loaded.model.close()
