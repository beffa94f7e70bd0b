"""Files whose matrices have more than four bits, served on the CPU with the codes that they have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from asyncengine import AsyncEngine, EngineConfig, ReloadError
from asyncengine.cli.estimate import read
from asyncengine.model import load_check
from asyncengine.model.adapters.adapted_modules import _LINEAR
from asyncengine.model.decoder.byte_matrix import ByteMatrix
from asyncengine.model.decoder.four_bit_matrix import FourBitMatrix
from asyncengine.model.decoder.weights import PackedMatrix
from asyncengine.model.gguf import description
from asyncengine.model.gguf.checkpoint import checkpoint_at
from asyncengine.model.gguf.placed import Placed, columns, rows
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.read_model import read_model
from asyncengine.model.stored.weight import OpenFiles
from asyncengine.step.model import LoadedModel
from tests.model.decoder.test_compiled_models import failing_at
from tests.model.gguf.test_blocks import bytes_of, random_data
from tests.model.stored.test_kept import scored

pytestmark = pytest.mark.loops("either")

HIDDEN, INNER, HEADS, LAYERS, WORDS = 256, 512, 4, 2, 192
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}  # fmt: skip
MIXED = {"attn_v": Kind.Q8_0, "ffn_down": Kind.Q6_K}
"""What llama.cpp leaves more bits than the rest has."""
PROMPT = [*range(3, 43)]
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found out of a file in one load is not known in another, which may read it in other ways."""
    kept = tmp_path_factory.getbasetemp() / "descriptions"
    monkeypatch.setattr(description, "cache_directory", lambda: kept)
    monkeypatch.setattr(load_check, "place_of", lambda *_: None)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes a random model without a tokenizer, whose matrices are of one kind but for some."""
    made: dict[object, Path] = {}

    def make(kind: Kind, others: dict[str, Kind] | None = None) -> Path:
        key = (kind, repr(others))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("gguf") / "model.gguf"
            write(made[key], kind, others or {})
        return made[key]

    return make


def write(path: Path, kind: Kind, others: dict[str, Kind]) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    generator = np.random.default_rng(0)
    tensors = {"token_embd": (WORDS, HIDDEN), "output": (WORDS, HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{name}": shape for name, shape in SHAPES.items()}
        tensors |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in tensors.items():
        own = others.get(name.rpartition(".")[2], kind) if len(shape) == 2 else Kind.F32
        if own is Kind.Q6_K:
            data = q6_k(shape, generator)
        else:
            spread = 0.06 if name.startswith("blk") else 0.5
            numbers = generator.standard_normal(shape, np.float32) * spread
            data = gguf.quants.quantize(numbers if len(shape) == 2 else np.ones(shape, np.float32), own)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q6_k(shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random blocks, as gguf's package does not make them."""
    data = generator.integers(0, 256, (shape[0], shape[1] // 256, 210), dtype=np.uint8)
    data[..., 208:] = np.array([4e-5], np.float16).view(np.uint8)
    return data.reshape(shape[0], -1)


def load(path: Path, **changes: Any) -> LoadedModel:
    loader = TransformersLoader()
    return loader.load(loader.check(config_of(path, **changes), None))


def config_of(path: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(str(path), device="cpu", max_num_sequence=4, max_total_sequence_length=512, **changes)


def matrices(loaded: LoadedModel) -> dict[str, type]:
    model: Any = loaded.model
    [first, *_] = model._program._layers
    return {name: type(matrix) for name, (matrix, _) in first.matrices.items()}


@pytest.mark.parametrize(
    ("kind", "others", "form"),
    [
        (Kind.Q8_0, {}, "int8"),
        (Kind.Q6_K, {}, "int8"),
        pytest.param(Kind.Q5_0, {}, "int8", marks=pytest.mark.long),  # as Q8_0, once they are read
        (Kind.Q5_1, {}, "int8"),
        (Kind.Q4_0, MIXED, "int4"),
    ],
    ids=["Q8_0", "Q6_K", "Q5_0", "Q5_1", "mixed"],
)
@pytest.mark.in_short("mixed", "Q6_K")
async def test_they_say_what_the_numbers_of_the_file_say(
    kind: Kind, others: dict[str, Kind], form: str, file: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearer than with one scale for each output, and about as near as in bfloat16."""
    path = file(kind, others)
    async with AsyncEngine(config_of(path)) as engine:
        assert engine.complete_engine_config.quantization == form
        assert f"quantization: {form}, as stored" in engine.health().notes
        found = await scored(engine, PROMPT)
        together = await engine.score([PROMPT[::-1], PROMPT, PROMPT[3:]])
        assert torch.equal(torch.tensor([each.logprob for each in together[1].logprobs if each is not None]), found)
    async with AsyncEngine(config_of(path, dtype="float32", quantization="none")) as engine:
        exact = await scored(engine, PROMPT)
    async with AsyncEngine(config_of(path, dtype="bfloat16", quantization="none")) as engine:
        rounded = await scored(engine, PROMPT)
    monkeypatch.setattr(Placed, "_may_be_bytes", lambda *_: False)
    async with AsyncEngine(config_of(path, quantization="int8")) as engine:
        by_outputs = await scored(engine, PROMPT)
    off = (found - exact).norm()
    assert off < 0.8 * (by_outputs - exact).norm()
    assert off < 2 * (rounded - exact).norm()


def test_layers_are_codes_and_those_of_four_bits_beside_them_are_told_in_eight(file: Make) -> None:
    loaded = load(file(Kind.Q4_0, MIXED))
    assert matrices(loaded) == {
        "qkv": ByteMatrix,
        "output": FourBitMatrix,
        "gate_up": FourBitMatrix,
        "down": ByteMatrix,
    }
    loaded.model.close()


@pytest.mark.parametrize(
    ("kind", "others", "quantization", "kinds"),
    [
        (Kind.Q8_0, {}, "int8", {ByteLinear}),
        (Kind.Q4_0, MIXED, "int4", {ByteLinear, FourBitLinear}),
        (Kind.Q4_0, MIXED, "int8", {ByteLinear, torch.nn.Linear}),
        (Kind.Q8_0, {}, "int4", {torch.nn.Linear}),  # no four bits are there, so these are made
        (Kind.Q8_0, {}, "none", {torch.nn.Linear}),
    ],
)
def test_which_codes_stay_depends_on_what_is_asked_for(
    kind: Kind, others: dict[str, Kind], quantization: Any, kinds: set[type], file: Make
) -> None:
    loader = TransformersLoader()
    details: Any = loader.check(config_of(file(kind, others), quantization=quantization), None)
    model, _ = read_model(getattr(details, "details", details))
    assert {type(module) for module in model.model.layers.modules() if isinstance(module, _LINEAR)} == kinds


def test_on_a_device_codes_of_eight_bits_become_numbers(file: Make) -> None:
    checkpoint = checkpoint_at(file(Kind.Q4_0, MIXED))
    assert checkpoint.kept_forms("int4", "cpu") == {"int4", "int8"}
    assert checkpoint.kept_forms("int4", "cuda") == {"int4"}
    sizes = [checkpoint.weight_bytes(torch.bfloat16, checkpoint.kept_forms("int4", where)) for where in ("cpu", "cuda")]
    eight = sum(weight.size for weight in checkpoint.coded.values() if weight.form == "int8")
    assert 0.8 * eight < sizes[1] - sizes[0] < eight


@pytest.mark.parametrize("changes", [{}, {"decoder_backend": "transformers"}], ids=["compiled step", "modules"])
@pytest.mark.parametrize(
    ("kind", "others", "form"), [(Kind.Q8_0, {}, "int8"), (Kind.Q6_K, {}, "int8"), (Kind.Q4_0, MIXED, "int4")]
)
def test_an_estimate_knows_what_they_take(kind: Kind, others: Any, form: str, changes: Any, file: Make) -> None:
    path = file(kind, others)
    loaded = load(path, quantization=form, **changes)
    model: Any = loaded.model
    held = loaded.model.debug_call("weight_bytes", ())[0] if changes else model._program.nbytes
    assert any("as stored" in note for note in loaded.notes)
    loaded.model.close()
    assert read(config_of(path, quantization=form, **changes)).weight_bytes == pytest.approx(held, rel=0.02)


async def test_modules_compute_what_the_compiled_step_does(file: Make) -> None:
    path = file(Kind.Q6_K)
    async with AsyncEngine(config_of(path)) as engine:
        wanted = await scored(engine, PROMPT)
    async with AsyncEngine(config_of(path, quantization="int8", decoder_backend="transformers")) as engine:
        [note] = engine.health().notes
        assert "% of the weights, as stored: logits" in note
        found = await scored(engine, PROMPT)
    assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("backend", ["auto", "transformers"])
async def test_new_weights_are_rounded_and_those_that_fail_leave_the_old_ones(
    backend: Any, file: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(Kind.Q4_0, MIXED)
    generator = torch.Generator().manual_seed(5)
    new = {
        f"model.layers.{layer}.{name}": torch.randn(shape, generator=generator).mul(0.06).bfloat16()
        for layer in range(LAYERS)
        for name, shape in (("self_attn.v_proj.weight", (128, 256)), ("mlp.down_proj.weight", (256, 512)))
    }
    async with AsyncEngine(config_of(path, quantization="int4", decoder_backend=backend)) as engine:
        before = await scored(engine, PROMPT)
        with pytest.raises(ReloadError, match="v_proj"):
            await engine.update_weights({"model.layers.0.self_attn.v_proj.weight": torch.zeros(3, 3)})
        with monkeypatch.context() as patched:
            patched.setattr(PackedMatrix, "write", failing_at(4))
            with pytest.raises(ReloadError, match="none was replaced"):
                await engine.update_weights(new)
        assert torch.equal(await scored(engine, PROMPT), before)
        await engine.update_weights(new)
        after = await scored(engine, PROMPT)
    async with AsyncEngine(config_of(path, quantization="none", dtype="float32")) as engine:
        await engine.update_weights({name: value.float() for name, value in new.items()})
        exact = await scored(engine, PROMPT)
    assert (after - exact).norm() < 0.1 * (before - exact).norm()


def test_outputs_and_inputs_may_be_in_another_order() -> None:
    codes = bytes_of("Q5_1", random_data("Q5_1"))
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    turned: Any = rows(lambda _: order)(codes)
    assert torch.equal(turned.weight(torch.float32), codes.weight(torch.float32)[order])
    moved: Any = columns(torch.tensor([1, 0, 3, 2]), 128)(codes)
    wanted = codes.weight(torch.float32).view(6, 4, 128)[:, [1, 0, 3, 2]].flatten(1)
    assert torch.equal(moved.weight(torch.float32), wanted)


def test_queries_in_pairs_are_put_into_halves(file: Make) -> None:
    checkpoint, files = checkpoint_at(file(Kind.Q8_0)), OpenFiles()
    weight = checkpoint.coded["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(weight.read_bytes(files).weight(torch.float32), weight.numbers(files, torch.float32))
