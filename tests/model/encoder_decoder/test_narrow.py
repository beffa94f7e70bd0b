"""Weights of few bits where a decoder attends to a source: what is rounded, and what comes of it."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from asyncengine import AsyncEngine, AudioPrompt, ConfigError, EngineConfig, GenerationConfig, ReloadError
from asyncengine.config import Quantization
from asyncengine.errors import UnsupportedModelError
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.attention.select import Selection
from asyncengine.model.decoder.compiled_linear import CompiledLinear
from asyncengine.model.decoder.weights import PackedMatrix
from asyncengine.model.encoder_decoder import loading, trial
from asyncengine.model.encoder_decoder.kept_bytes import kept_bytes
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.quantised.four_bits import nearest
from asyncengine.model.quantised.fp8_linear import Fp8Linear
from asyncengine.step.model import LoadedModel
from tests.model.decoder.test_compiled_models import failing_at
from tests.model.speech import checkpoints as speech
from tests.model.text_to_text import checkpoints as text

pytestmark = pytest.mark.loops("either")

MOST = 6
MARKS = ("<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>")
BEGIN = [speech.IDS[mark] for mark in MARKS]
SIZES = {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 128}
SOURCES = 3
Answer = tuple[list[int], list[dict[int, float]]]
"""Tokens that were written, and for each the log-probabilities of the likeliest."""


def write_text(path: Path, seed: int = 0, **changes: Any) -> Path:
    return text.write(path, "m2m_100", seed, **(SIZES | changes))


def write_audio(path: Path, seed: int = 0, **changes: Any) -> Path:
    return speech.write(path, seed, sharp=2, **(SIZES | changes))


def write_t5(path: Path, seed: int = 0, **changes: Any) -> Path:
    return text.write(path, "mt5", seed, **({"d_model": 64, "d_kv": 16, "d_ff": 96} | changes))


WRITE: dict[str, Callable[..., Path]] = {"text": write_text, "audio": write_audio}
WITH_T5 = WRITE | {"t5": write_t5}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random checkpoint once and returns its directory."""
    made: dict[object, Path] = {}

    def make(what: str, seed: int = 0, **changes: Any) -> Path:
        key = (what, seed, repr(changes))
        if key not in made:
            made[key] = WITH_T5[what](tmp_path_factory.mktemp(what), seed, **changes)
        return made[key]

    return make


def config_of(path: Path, **changes: Any) -> EngineConfig:
    settings = {"device": "cpu", "max_num_sequence": 4, "max_total_sequence_length": 1024}
    return EngineConfig(str(path), **(settings | changes))


def load(path: Path, **changes: Any) -> LoadedModel:
    loader = TransformersLoader()
    return loader.load(loader.check(config_of(path, **changes), None))


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("what", WRITE)
@pytest.mark.in_short("text-int8", "audio-int4", "text-fp8")
def test_linear_layers_are_kept_in_few_bits(
    what: str, quantization: Quantization, written: Callable[..., Path]
) -> None:
    """Those of encoder and decoder; tables and convolutions stay. What it takes is what was reckoned before."""
    path = written(what, **({"tie_word_embeddings": True} if what == "text" else {}))
    loaded: Any = load(path, quantization=quantization)
    try:
        assert loaded.config.dtype == "bfloat16" and loaded.config.quantization == quantization
        [note] = loaded.notes
        assert note.startswith(f"quantization: {quantization}, ") and "% of the weights, rounded: logits" in note
        model = loaded.model._text._model
        encoder, decoder = model.model.encoder, model.model.decoder
        linear = [each for part in (encoder, decoder) for each in part.modules() if takes_inputs(each)]
        assert len(linear) == 6 * len(encoder.layers) + 10 * len(decoder.layers)
        head = model.get_output_embeddings()
        if quantization == "fp8":
            assert {type(each) for each in linear} == {Fp8Linear} and type(head) is nn.Linear
            assert "slow on cpu" in note
        else:
            narrow = torch.int8 if quantization == "int8" else torch.uint8
            assert all(type(each) is CompiledLinear and each.matrix.weights.dtype is narrow for each in linear)
            assert type(head) is CompiledLinear and head.matrix.weights.dtype is torch.int8
        wide = [each for each in model.modules() if isinstance(each, (nn.Embedding, nn.Conv1d))]
        assert len(wide) > 1 and all(each.weight.dtype is torch.bfloat16 for each in wide)
        plan = TransformersLoader().check(config_of(path, quantization=quantization), None)
        [held], reckoned = loaded.model.debug_call("weight_bytes", ()), kept_bytes(plan.details)
        # Rows of codes of four bits are filled up, with their scales: in so small a model that counts.
        assert held == pytest.approx(reckoned, rel=0.05 if quantization == "int4" else 0)
        # While it is loaded all is in bfloat16, and the head beside it in bytes already.
        beside = 0 if quantization == "fp8" else head.out_features * head.in_features
        assert plan.details.weight_bytes == plan.details.checkpoint.weight_bytes(torch.bfloat16) + beside
        block = plan.details.bytes_per_block(CpuAttention.bytes_per_block)
        assert loaded.memory_bytes == held + loaded.limits.num_blocks * block
    finally:
        loaded.model.close()


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_head_of_its_own_is_reckoned(quantization: Quantization, written: Callable[..., Path]) -> None:
    """Also where the configuration says that it is the table of tokens, as that of each T5 does."""
    path = written("t5")
    plan = TransformersLoader().check(config_of(path, quantization=quantization), None)
    assert plan.details.hf_config.tie_word_embeddings
    loaded: Any = load(path, quantization=quantization)
    try:
        [held] = loaded.model.debug_call("weight_bytes", ())
    finally:
        loaded.model.close()
    assert held == kept_bytes(plan.details)


def takes_inputs(module: nn.Module) -> bool:
    return hasattr(module, "in_features")


async def answered(engine: AsyncEngine, what: str) -> list[Answer]:
    """What is written of some sources."""
    config = GenerationConfig(temperature=0.0, max_tokens=MOST, ignore_eos=True, logprobs=True, top_logprobs=20)

    async def answer(seed: int) -> Answer:
        prompt: Any = text.source(seed, 9)
        if what == "audio":
            prompt = AudioPrompt("".join(MARKS), [(speech.sound(seed, 1.3), speech.RATE)])
        result = await engine.generate(prompt, config)
        tops = [dict(zip(each.top_ids, each.top_logprobs, strict=True)) for each in result.outputs[0].logprobs or ()]
        return list(result.token_ids), tops

    return list(await asyncio.gather(*[answer(seed) for seed in range(SOURCES)]))


def reference(path: Path, what: str, quantization: str) -> Any:
    """transformers' model, in float32. Its weights are as they were, rounded to bfloat16, or then to fewer bits."""
    model = copy.deepcopy((speech if what == "audio" else text).loaded(path))
    if quantization == "float32":
        return model
    model.bfloat16().float()
    head = model.get_output_embeddings()
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and quantization != "bfloat16":
            weight = layer.weight.detach()
            if quantization == "int4" and layer is not head:
                rounded = nearest(weight).weight(torch.float32)
            else:
                scale = weight.abs().amax(1, keepdim=True) / 127
                rounded = (weight / scale).round() * scale
            layer.weight = nn.Parameter(rounded)  # and no more that of the table
    return model


def off(answers: list[Answer], path: Path, what: str, model: Any) -> float:
    """How far log-probabilities are from those of a model that is given the same tokens, on average."""
    found, expected = [], []
    for seed, (tokens, tops) in enumerate(answers):
        begin = {"audio": BEGIN, "text": [text.EOS], "t5": [text.PAD]}[what]
        given = (
            speech.features(path, speech.sound(seed, 1.3)) if what == "audio" else torch.tensor([text.source(seed, 9)])
        )
        with torch.no_grad():
            logits = model(given, decoder_input_ids=torch.tensor([[*begin, *tokens[:-1]]])).logits[0, len(begin) - 1 :]
        for row, top in zip(logits.log_softmax(-1), tops, strict=True):
            found += top.values()
            expected += row[list(top)].tolist()
    return float((torch.tensor(found) - torch.tensor(expected)).abs().mean())


@pytest.mark.parametrize("what", WITH_T5)
async def test_answers_are_those_of_transformers_with_weights_that_were_rounded_so(
    what: str, written: Callable[..., Path]
) -> None:
    """They are no farther off than those in bfloat16 are from those with these weights, and nearer than to what these
    were.
    """
    path = written(what)
    exact = reference(path, what, "bfloat16")
    async with AsyncEngine(config_of(path, dtype="bfloat16")) as engine:
        in_bfloat16 = off(await answered(engine, what), path, what, exact)
    for quantization, nearer in (("int8", 0.9), ("int4", 0.4)):
        async with AsyncEngine(config_of(path, quantization=quantization)) as engine:
            answers = await answered(engine, what)
        error = off(answers, path, what, reference(path, what, quantization))
        assert error < 2 * in_bfloat16
        assert error < nearer * off(answers, path, what, exact)


@pytest.mark.parametrize(("what", "quantization"), [("text", "int8"), ("audio", "int4")])
@pytest.mark.in_short("audio-int4")
async def test_it_sleeps_and_its_weights_are_replaced(
    what: str, quantization: Quantization, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By new ones it computes what an engine does that was loaded with them; by refused ones, what it did."""
    config, other = config_of(written(what), quantization=quantization), written(what, 1)
    new = {name: each.bfloat16() for name, each in stored(other, what).items()}
    async with AsyncEngine(config) as engine:
        before = await answered(engine, what)
        with pytest.raises(ReloadError, match="model's is"):
            await engine.update_weights({**new, "model.decoder.layers.1.fc2.weight": torch.zeros(2, 2)})
        with monkeypatch.context() as patched, pytest.raises(ReloadError, match="none was replaced"):
            patched.setattr(PackedMatrix, "write", failing_at(5))
            await engine.update_weights(new)
        assert await answered(engine, what) == before
        await engine.update_weights(new)
        after = await answered(engine, what)
        await engine.sleep()
        await engine.wake()
        assert await answered(engine, what) == after != before
        await engine.reload(config)
        assert await answered(engine, what) == before
        await engine.reload(config.replace(model=str(other)))
        assert await answered(engine, what) == after


def stored(path: Path, what: str) -> dict[str, torch.Tensor]:
    """Its weights, by the names that the model has for them."""
    state = dict((speech if what == "audio" else text).loaded(path).state_dict())
    return {name: each for name, each in state.items() if name != "proj_out.weight"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "float32"}, "quantization is 'int8' with dtype float32; allowed: bfloat16"),
    ({"attention_backend": "torch"}, "quantization is 'int8' on the CPU with attention_backend 'torch'"),
]


@pytest.mark.parametrize("what", WRITE)
def test_where_nothing_multiplies_them_they_are_refused(
    what: str, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the present model goes."""
    loader = TransformersLoader()
    for changes, message in REFUSED:
        with pytest.raises(ConfigError, match=message):
            loader.check(config_of(written(what), quantization="int8", **changes), None)
    with pytest.raises(UnsupportedModelError, match="has no linear layers that could be in int8"):
        load(written(what, d_model=40, encoder_ffn_dim=40, decoder_ffn_dim=40), quantization="int8")
    monkeypatch.setattr(loading, "select_attention", lambda *_: Selection(TorchAttention(), "no compiler"))
    with pytest.raises(UnsupportedModelError, match="cannot be in int4: that needs the compiled code of the CPU"):
        loader.check(config_of(written(what), quantization="int4"), None)
    loader.check(config_of(written(what)), None)


@pytest.mark.parametrize(("what", "of"), [("text", "encoder"), ("text", "decoder"), ("audio", "decoder")])
@pytest.mark.in_short("text-encoder", "audio-decoder")
async def test_products_that_compute_something_else_are_not_used(
    what: str, of: str, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they are: torch multiplies then, as a note says, but no weights of few bits. What has them is let go
    before the model is read again.
    """
    path, inner = written(what), SIZES[f"{of}_ffn_dim"]
    multiply, read, models = CompiledLinear.forward, trial.with_weights, list[Any]()

    def reading(*given: Any) -> Any:
        assert not any(list(model.parameters()) for model in models)
        models.append(read(*given))
        return models[-1]

    def wrong(layer: CompiledLinear, x: torch.Tensor) -> torch.Tensor:
        found = multiply(layer, x)
        return -99 * found if layer.in_features == inner != layer.out_features else found

    monkeypatch.setattr(CompiledLinear, "forward", wrong)
    monkeypatch.setattr(trial, "with_weights", reading)
    async with AsyncEngine(config_of(path, dtype="float32")) as engine:
        [note] = engine.health().notes
        assert note.startswith("linear layers: run as torch has them, which is slower: ")
        assert f"does not {'encode' if of == 'encoder' else 'compute over a paged KV cache'} what it " in note
        loaded: Any = engine._thread.core.loaded
        assert not any(isinstance(each, CompiledLinear) for each in loaded.model._text._model.modules())
        assert off(await answered(engine, what), path, what, reference(path, what, "float32")) < 1e-3
    with pytest.raises(UnsupportedModelError, match=r"is too far off in int8: relative error .*, allowed 0\.3"):
        load(path, quantization="int8")


def test_modules_that_read_what_is_let_go_cannot_be_in_few_bits(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(layer: CompiledLinear, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, layer.weight.to("cpu"), layer.bias)

    monkeypatch.setattr(CompiledLinear, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"cannot be in int8: .*meta"):
        load(written("text"), quantization="int8")
    loaded = load(written("text"), dtype="float32")
    assert "run as torch has them" in loaded.notes[0]
    loaded.model.close()
