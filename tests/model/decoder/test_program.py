"""The compiled step: the same numbers as transformers, and the same bits whatever else is in the batch."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncengine import ConfigError, EngineConfig, UnsupportedModelError
from asyncengine.config import Quantization
from asyncengine.model.architecture import ATTENTION, record
from asyncengine.model.attention import kernel
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.decoder.blueprint import recognise
from asyncengine.model.decoder.four_bit_matrix import FourBitMatrix
from asyncengine.model.decoder.program import CompiledDecoder, Writer
from asyncengine.model.decoder.rotation import rotates
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.eight_bits import nearest_bytes
from asyncengine.model.quantised.four_bit_experts import NAMES, hold, round_experts
from asyncengine.model.quantised.four_bit_linear import FourBitLinear, round_layers
from asyncengine.model.quantised.four_bits import FP4, INT4, NONLINEAR, nearest
from asyncengine.model.runner import TorchModel
from asyncengine.step.batch import StepBatch
from asyncengine.step.model import LoadedModel
from tests.model.attention.targets import optimise_less, require_target

PAGE = 16
Checkpoint = Callable[..., Path]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
BESIDE = {
    "qwen2_moe": {"num_hidden_layers": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    "glm4_moe": {
        "num_local_experts": 8, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5, "num_hidden_layers": 2,
    },
    "ernie4_5_moe": {"num_hidden_layers": 2},
    "granitemoeshared": {"num_hidden_layers": 2},
    "cohere2_moe": {"num_hidden_layers": 4},
}  # fmt: skip
"""Experts that have an MLP beside them, and changes to the checkpoints."""
LATENT = {
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "num_hidden_layers": 2,
}  # fmt: skip
LATENTS = {"deepseek_v3": LATENT | {"q_lora_rank": 48}, "deepseek_v2": LATENT, "minicpm3": LATENT | {"q_lora_rank": 32}}
"""Models that keep latents, in sizes that fill vectors."""
CHANGES: dict[str, dict[str, Any]] = BESIDE | LATENTS
OTHERS = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "granite", "phi3", "gpt2", "gpt_neox", "cohere",
    "starcoder2", "opt", "glm4", "phi", "cohere2", "exaone4",
)  # fmt: skip


def load(path: Path, **changes: Any) -> LoadedModel:
    config = EngineConfig(
        str(path),
        **{
            "device": "cpu", "decoder_backend": "compiled", "kv_cache_page_size": PAGE, "max_num_sequence": 8,
            "max_total_sequence_length": 1024, **changes,
        },
    )  # fmt: skip
    loader = TransformersLoader()
    return loader.load(loader.check(config, None))


def batch_of(rows: list[tuple[np.ndarray, int]]) -> StepBatch:
    """Each row: tokens, and how many of them are in the cache already. Row r has the blocks from 4 r on; all logits."""
    new = [len(tokens) - context for tokens, context in rows]
    tables = np.arange(4 * len(rows), dtype=np.int32).reshape(len(rows), 4)
    positions = np.concatenate([np.arange(context, len(tokens)) for tokens, context in rows])
    row = np.repeat(np.arange(len(rows)), new)
    return StepBatch(
        token_ids=np.concatenate([tokens[context:] for tokens, context in rows]).astype(np.int32),
        positions=positions.astype(np.int32),
        query_start=np.cumsum([0, *new]).astype(np.int32),
        context_lens=np.array([context for _, context in rows], np.int32),
        block_tables=tables,
        slot_mapping=tables[row, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE,
        sample_index=np.arange(len(positions)),
        sample_slots=np.zeros(len(positions), np.int64),
        sample_positions=np.zeros(len(positions), np.int64),
        copies=np.empty((0, 2), np.int64),
        num_decodes=0,
    )


def sequences(count: int = 5) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(1, 199, length) for length in (33, 17, 40, 1, 9)[:count]]


def expected(path: Path, sequences: list[np.ndarray], dtype: torch.dtype) -> list[torch.Tensor]:
    # Eager: there are versions of transformers whose other ways leave a soft cap out.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model = model.to(dtype).float()
    with torch.inference_mode():
        return [model(torch.from_numpy(tokens)[None]).logits[0] for tokens in sequences]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def median_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of most rows: a rounding may send a token to another expert."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


def logits(loaded: LoadedModel, batch: StepBatch) -> torch.Tensor:
    model = loaded.model
    assert isinstance(model, TorchModel)
    return model.logits(batch)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *itertools.product(OTHERS, [torch.float32]),
        *itertools.product(EXPERTS, [torch.float32]),
        *itertools.product(CHANGES, [torch.float32]),
        # Parts are the same code in all dtypes, but for how numbers enter products and leave them.
        ("qwen2", torch.bfloat16),
        ("gpt_oss", torch.bfloat16),
        ("minicpm3", torch.bfloat16),
        ("gpt2", torch.float16),
        ("qwen2_moe", torch.float16),
        *(
            pytest.param(name, dtype, marks=pytest.mark.long)
            for dtype, names in (
                (torch.bfloat16, ("gpt2", "cohere", "mixtral", "glm4_moe")),
                (torch.float16, ("qwen2", "gpt_oss", "gemma2", "minicpm3")),
            )
            for name in names
        ),
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(architecture: str, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    """In low precision: of the rounded weights computed in float32, to which it is nearer than transformers is."""
    path = checkpoint(architecture, **CHANGES.get(architecture, {}))
    loaded = load(path, dtype=str(dtype).removeprefix("torch."))
    found = logits(loaded, batch_of([(tokens, 0) for tokens in sequences()]))
    # A rounding may send a token to another expert.
    sparse = architecture in EXPERTS or architecture in CHANGES
    allowed = TOLERANCE[dtype] * (3 if sparse and dtype is not torch.float32 else 1)
    start = 0
    for wanted in expected(path, sequences(), dtype):
        assert error(found[start : start + len(wanted)], wanted) < allowed
        start += len(wanted)
    loaded.model.close()


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *itertools.product(["qwen3", "qwen3_moe"], ["float32", "bfloat16"]),
        ("gpt2", "float32"),
        ("gpt_neox", "bfloat16"),
        ("gpt_oss", "bfloat16"),
        *itertools.product(["qwen3", "qwen3_moe"], ["int8", "int4"]),
        ("glm4_moe", "float32"),
        ("qwen2_moe", "int4"),
        *itertools.product(["minicpm3"], ["float32", "bfloat16", "int8", "int4"]),
    ],
)
def test_a_token_gets_the_same_bits_in_any_batch(architecture: str, dtype: str, checkpoint: Checkpoint) -> None:
    """Contract 16: alone or beside others, prefilled at once, in chunks or token by token, by any number of threads."""
    stored = {"dtype": "bfloat16", "quantization": dtype} if dtype in ("int8", "int4") else {"dtype": dtype}
    loaded = load(checkpoint(architecture, **CHANGES.get(architecture, {})), **stored)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        together = logits(loaded, batch_of([(tokens, 0) for tokens in sequences()]))
        for threads, token_by_token in ((1, 33), (2, 17)):  # the first over three pages
            torch.set_num_threads(threads)
            assert torch.equal(logits(loaded, batch_of([(tokens, 0) for tokens in sequences()])), together)
            start = 0
            for tokens in sequences():
                mine = together[start : start + len(tokens)]
                assert torch.equal(logits(loaded, batch_of([(tokens, 0)])), mine)
                cuts = sorted({0, *range(min(7, len(tokens)), len(tokens), 7), len(tokens)})
                if len(tokens) == token_by_token:
                    cuts = [*range(len(tokens) + 1)]
                chunks = [logits(loaded, batch_of([(tokens[:end], begin)])) for begin, end in itertools.pairwise(cuts)]
                assert torch.equal(torch.cat(chunks), mine)
                start += len(tokens)
    finally:
        torch.set_num_threads(before)
        loaded.model.close()


def test_layers_that_look_ahead_beside_others_of_their_shape(checkpoint: Checkpoint) -> None:
    path, (first, end) = checkpoint("llama", num_hidden_layers=3), (45, 58)  # on two tiles and two vectors
    loaded, (other, *_) = load(path), sequences(1)
    tokens = np.random.default_rng(8).integers(1, 199, 64)
    model = loaded.model
    assert isinstance(model, TorchModel) and model._program is not None
    ahead = model._program._layers[1]
    ahead.spec = dataclasses.replace(ahead.spec, looks_ahead=True)
    model._program.bind(model._layers.caches)

    reach = np.arange(1, 65)
    reach[first:end] = end
    before = logits(loaded, batch_of([(tokens[:1], 0), (other, 0)]))
    batch = batch_of([(tokens, 0), (other, 32)])
    found = logits(loaded, dataclasses.replace(batch, reach=np.append(reach, 33).astype(np.int32)))

    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    mask = torch.zeros(1, 1, 64, 64).masked_fill(torch.arange(64) >= torch.from_numpy(reach)[:, None], -torch.inf)
    plain.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, arguments, given: (arguments, given | {"attention_mask": mask}), with_kwargs=True
    )
    with torch.inference_mode():
        wanted = plain(torch.from_numpy(tokens)[None]).logits[0]
    assert error(found[:64], wanted) < TOLERANCE[torch.float32]
    assert error(found[first:end], expected(path, [tokens], torch.float32)[0][first:end]) > 1e-2
    assert error(found[64:], before[-1:]) < TOLERANCE[torch.float32]
    loaded.model.close()


# Sizes that are no whole number of tiles: of steps, of groups of outputs, and of both.
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
@pytest.mark.in_short("qwen3_moe-int4", "qwen3_moe-none", "llama-int8")
def test_a_row_gets_the_same_bits_beside_any_number_of_others(
    architecture: str, quantization: str, checkpoint: Checkpoint
) -> None:
    """Also where numbers are too small to be normal, infinite or none: few rows are multiplied otherwise than many."""
    hidden = 96 if quantization == "int4" else 80  # what is no whole bundle is stored in bytes, as down projections are
    path = checkpoint(architecture, hidden_size=hidden, intermediate_size=112, head_dim=16, tie_word_embeddings=False)
    loaded = load(path, dtype="bfloat16", quantization=quantization, max_total_sequence_length=16384)
    outputs = torch.arange(199)
    scale = torch.tensor([1.0, 1e-36, 1e-37, 1e-38, 3e-39])[outputs % 5]
    weight = torch.randn(199, hidden, generator=torch.Generator().manual_seed(1)) * scale[:, None]
    if quantization == "none":
        weight[7::40, 3] = torch.inf
        weight[8::40, 79] = torch.nan
    loaded.model.update_weights({"lm_head.weight": weight.to(torch.bfloat16)})
    tokens = np.random.default_rng(2).integers(1, 199, 130)
    rows = [(tokens[i : i + 1], 0) for i in range(130)]
    alone = torch.cat([logits(loaded, batch_of([row])) for row in rows])
    assert alone.isnan().any() or quantization != "none"
    for count in [*range(2, 71), 95, 96, 97, 127, 128, 129]:
        together = logits(loaded, batch_of(rows[:count]))
        torch.testing.assert_close(together, alone[:count], rtol=0, atol=0, equal_nan=True)
    loaded.model.close()


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_a_thread_that_falls_behind_changes_nothing(architecture: str, checkpoint: Checkpoint) -> None:
    """More threads than cores: some come to a phase when the others are in a later layer."""
    loaded = load(checkpoint(architecture), dtype="float32")
    before = torch.get_num_threads()
    batches = [batch_of([(tokens, 0)]) for tokens in sequences()]
    try:
        torch.set_num_threads(1)
        wanted = [logits(loaded, batch) for batch in batches]
        torch.set_num_threads(2 * (os.cpu_count() or 1) + 1)
        for _ in range(20):
            for batch, expected_logits in zip(batches, wanted, strict=True):
                assert torch.equal(logits(loaded, batch), expected_logits)
    finally:
        torch.set_num_threads(before)
        loaded.model.close()


@pytest.mark.parametrize(("architecture", "most"), [("llama", 0.05), ("mixtral", 0.1)])
def test_int8_is_near(architecture: str, most: float, checkpoint: Checkpoint) -> None:
    path = checkpoint(architecture)
    loaded = load(path, dtype="bfloat16", quantization="int8")
    tokens = sequences()[0]
    found, [wanted] = logits(loaded, batch_of([(tokens, 0)])), expected(path, [tokens], torch.bfloat16)
    assert (
        TOLERANCE[torch.bfloat16] / 10 < median_error(found, wanted) < most
    )  # it is quantised, and no worse than it has to be
    loaded.model.close()


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_oss", "qwen2_moe"])
def test_int4_computes_with_the_nearest_codes(architecture: str, checkpoint: Checkpoint) -> None:
    """And no worse than with what is left of the numbers, but for the head and the cache."""
    path, [tokens] = checkpoint(architecture, **BESIDE.get(architecture, {})), sequences(1)
    loaded = load(path, dtype="bfloat16", quantization="int4")
    found, [exact] = logits(loaded, batch_of([(tokens, 0)])), expected(path, [tokens], torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    layers, experts = round_layers(model)[0], round_experts(model)
    assert layers and bool(experts) == (architecture != "llama")
    with torch.inference_mode():
        wanted = model(torch.from_numpy(tokens)[None]).logits[0].float()
    off, rounding = (
        float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median()) for a, b in ((found, wanted), (wanted, exact))
    )
    assert off < 0.1 < rounding < 0.5
    loaded.model.close()


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_oss", "qwen2_moe"])
def test_a_model_whose_weights_have_four_bits(architecture: str, checkpoint: Checkpoint) -> None:
    """Its codes are taken as they are, and what has none is stored in bytes."""
    changes = BESIDE.get(architecture, {})
    path, [tokens] = (
        checkpoint(architecture, 1, **changes),
        sequences(1),
    )  # with this seed rounding sends none elsewhere
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation=ATTENTION).eval()
    round_layers(model, 64)
    if architecture == "llama":  # one that its author left as it was
        layer = model.model.layers[0].self_attn
        layer.o_proj = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).model.layers[0].self_attn.o_proj
    else:
        round_experts(model)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        wanted = model(torch.from_numpy(tokens)[None]).logits[0].float()
    model.set_attn_implementation(ATTENTION)
    step = CompiledModel(model, torch.bfloat16, "int4")
    assert step.program.rounded_to == "bytes"
    assert median_error(step.logits(batch_of([(tokens, 0)])), wanted) < 0.06
    left = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    assert not [name for name in left if not name.endswith("sinks")]


@pytest.mark.parametrize(
    ("kinds", "kept"),
    [
        ({"q": (INT4, True), "k": (INT4, False), "v": (INT4, True), "up": (INT4, True)}, {"qkv", "gate_up"}),
        ({"q": (NONLINEAR, False), "k": (NONLINEAR, False), "v": (NONLINEAR, False)}, {"qkv", "gate_up"}),
        ({"q": (INT4, True), "k": (INT4, True), "v": None, "up": (NONLINEAR, False)}, set()),
        ({"q": (NONLINEAR, False), "k": (FP4, False), "v": (INT4, True), "up": None}, set()),
    ],
    ids=["zeros beside none", "nonlinear", "plain numbers", "other tables"],
)
def test_siblings_may_be_stored_in_different_ways(
    kinds: dict[str, Any], kept: set[str], checkpoint: Checkpoint
) -> None:
    """As llama.cpp mixes them. They stay codes if all are and stand for the same values; else they get bytes."""
    [tokens] = sequences(1)
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), dtype=torch.bfloat16, attn_implementation=ATTENTION
    ).eval()
    for layer in model.model.layers:
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            module = layer.mlp if name in ("gate", "up", "down") else layer.self_attn
            linear = getattr(module, f"{name}_proj")
            if (kind := kinds.get(name, (INT4, False))) is not None:
                values, zeros = kind
                codes = nearest(linear.weight.detach(), 32, values)
                if zeros:
                    codes = dataclasses.replace(codes, zeros=torch.full_like(codes.scales, 0.625))
                setattr(module, f"{name}_proj", FourBitLinear(codes, linear.bias, torch.bfloat16))
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        wanted = model(torch.from_numpy(tokens)[None]).logits[0].float()
    model.set_attn_implementation(ATTENTION)
    step = CompiledModel(model, torch.bfloat16, "int4")
    for packed in step.program._layers:
        assert {name for name, (each, _) in packed.matrices.items() if type(each) is FourBitMatrix} == {
            "output", "down", *kept
        }  # fmt: skip
    assert median_error(step.logits(batch_of([(tokens, 0)])), wanted) < 0.06


@pytest.mark.parametrize("name", NAMES)
def test_one_of_the_weights_of_experts_may_be_codes(name: str, checkpoint: Checkpoint) -> None:
    [tokens] = sequences(1)
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint("mixtral"), dtype=torch.bfloat16, attn_implementation=ATTENTION
    ).eval()
    for layer in model.model.layers:
        experts = layer.mlp.experts
        hold(experts, {name: nearest(getattr(experts, name).detach().flatten(0, 1))}, transposed=False)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        wanted = model(torch.from_numpy(tokens)[None]).logits[0].float()
    model.set_attn_implementation(ATTENTION)
    step = CompiledModel(model, torch.bfloat16, "int4")
    for packed in step.program._layers:
        assert packed.experts is not None
        kinds = dict(zip(NAMES, (type(packed.experts.gate_up), type(packed.experts.down)), strict=True))
        assert [each for each, kind in kinds.items() if kind is FourBitMatrix] == [name]
    assert median_error(step.logits(batch_of([(tokens, 0)])), wanted) < 0.1  # what has bytes is rounded


def test_int8_needs_bfloat16(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="'int8' with dtype float32; allowed: bfloat16"):
        load(checkpoint("llama"), dtype="float32", quantization="int8")


@pytest.mark.parametrize("changes", [{}, {"quantization": "int8", "dtype": "bfloat16"}])
def test_what_cannot_be_compiled_is_refused_by_reason(changes: dict[str, Any], checkpoint: Checkpoint) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot run as a compiled step: it has a size of 8, which is"):
        load(checkpoint("deepseek_v3"), decoder_backend="compiled", **changes)


def test_what_cannot_be_compiled_runs_as_transformers_has_it_and_says_so(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint("deepseek_v3"), decoder_backend="auto")
    assert loaded.config.decoder_backend == "transformers"
    [note] = loaded.notes
    assert note.startswith("decoder: runs as transformers has it: it has a size of 8, which is not a multiple of 16")
    loaded.model.close()


@pytest.mark.parametrize("kind", ["numbers", "four bits", "bytes"])
def test_layers_that_do_not_rotate_are_seen_whatever_their_weights_are(kind: str, checkpoint: Checkpoint) -> None:
    """In few bits the logits would hardly tell."""
    path = checkpoint("smollm3", num_hidden_layers=2, no_rope_layers=[1, 0])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    if kind == "four bits":
        round_layers(model)
    elif kind == "bytes":
        for layer in model.model.layers:
            for name, each in list(layer.self_attn.named_children()):
                setattr(layer.self_attn, name, ByteLinear(nearest_bytes(each.weight.detach()), None, torch.bfloat16))
    model.set_attn_implementation(ATTENTION)
    assert [rotates(layer.self_attn, 64) for layer in model.model.layers] == [True, False]


def test_a_model_that_has_the_parts_but_computes_something_else_is_found_out(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it not seen that layers of SmolLM3 do not rotate, it would be one."""
    monkeypatch.setattr("asyncengine.model.decoder.blueprint.rotates", lambda *_: True)
    path = checkpoint("smollm3", no_rope_layers=[1, 0, 1])
    loaded = load(path, decoder_backend="auto", dtype="float32")
    assert loaded.config.decoder_backend == "transformers"
    assert "computes without one" in loaded.notes[0]
    tokens = sequences()[0]
    assert error(logits(loaded, batch_of([(tokens, 0)])), *expected(path, [tokens], torch.float32)) < 1e-5
    loaded.model.close()
    with pytest.raises(UnsupportedModelError, match="cannot run as a compiled step"):
        load(path, dtype="float32")


def test_the_model_gives_its_weights_up(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint("qwen2"))
    model = loaded.model
    assert isinstance(model, TorchModel) and model._model is not None
    assert {p.device.type for p in model._model.parameters()} == {"meta"}
    assert model.debug_call("num_parameters", ()) == [sum(p.numel() for p in model._model.parameters())]
    loaded.model.close()


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        *((name, "none") for name in ("qwen2", "phi3", "gpt2", "gpt_neox", "opt", "cohere", "mixtral", "gpt_oss")),
        *((name, "int8") for name in ("phi3", "gpt2", "gpt_oss")),
        *((name, "int4") for name in ("phi3", "gpt_oss")),
        ("glm4_moe", "int8"),
        ("qwen2_moe", "int4"),
        ("minicpm3", "int8"),
        ("deepseek_v2", "int4"),
    ],
)
@pytest.mark.in_short(
    "glm4_moe-int8",
    "qwen2_moe-int4",
    "gpt_oss-none",
    "gpt2-int8",
    "deepseek_v2-int4",
    "phi3-none",
    "qwen2-none",
    "opt-none",
)
def test_new_weights_are_those_of_a_new_model(architecture: str, quantization: str, checkpoint: Checkpoint) -> None:
    """Every parameter finds its place: biases, norms, projections that were fused, embedding and head."""
    dtype = "float32" if quantization == "none" else "bfloat16"
    paths = [checkpoint(architecture, seed=seed, **LATENTS.get(architecture, {})) for seed in (0, 1)]
    old, new = (load(path, dtype=dtype, quantization=quantization) for path in paths)
    weights = AutoModelForCausalLM.from_pretrained(paths[1], dtype=getattr(torch, dtype)).state_dict()
    batch = batch_of([(sequences()[0], 0)])
    before = logits(old, batch)
    old.model.update_weights(weights)
    assert torch.equal(logits(old, batch), logits(new, batch))
    assert not torch.equal(before, logits(old, batch))
    old.model.close()
    new.model.close()


def test_the_matrix_behind_latents_counts(checkpoint: Checkpoint) -> None:
    sizes = []
    for rank in (32, 64):
        loaded = load(checkpoint("minicpm3", **LATENTS["minicpm3"] | {"kv_lora_rank": rank}), dtype="float32")
        assert isinstance(loaded.model, TorchModel) and loaded.model._program is not None
        sizes.append(loaded.model._program.nbytes)
        loaded.model.close()
    heads, hidden = 4 * (16 + 32), 64
    assert sizes[1] - sizes[0] == 2 * 32 * (heads + hidden) * 4


def test_new_weights_that_fail_leave_the_old_ones(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(checkpoint("llama"), dtype="float32")
    model = loaded.model
    assert isinstance(model, TorchModel) and model._program is not None
    batch = batch_of([(sequences()[0], 0)])
    before = logits(loaded, batch)
    writers = model._program.writers()
    last = list(writers)[-1]

    def fail(value: torch.Tensor) -> None:
        raise RuntimeError("the last one fails")

    failing = [Writer(fail, writers[last][0].keep)]
    monkeypatch.setattr(model._program, "writers", lambda: {**writers, last: failing})
    state = AutoModelForCausalLM.from_pretrained(checkpoint("llama", seed=3), dtype=torch.float32).state_dict()
    with pytest.raises(Exception, match="none was replaced"):
        loaded.model.update_weights(state)
    assert torch.equal(logits(loaded, batch), before)
    loaded.model.close()


class CompiledModel:
    """The compiled step of a model of transformers, which it takes the weights of."""

    def __init__(
        self, model: Any, dtype: torch.dtype, quantization: Quantization = "none", target: list[str] | None = None
    ) -> None:
        kind = kernel.kind_of(dtype, quantization)
        self._backend = CpuAttention(kind, target=target)
        layers = record(model).attention
        self.program = CompiledDecoder(recognise(model, layers, 64), self._backend.library(kind), dtype, quantization)
        cpu = torch.device("cpu")
        self._caches = [self._backend.allocate(layer.spec, 64, PAGE, dtype, cpu) for layer in layers]
        self.program.bind(self._caches)

    def logits(self, batch: StepBatch) -> torch.Tensor:
        """One row for each token."""
        return self.program.logits(batch, self._backend.plan(batch, PAGE, torch.device("cpu")))


@pytest.mark.parametrize(
    ("target", "dtype", "quantization"),
    [
        pytest.param("-march=x86-64", torch.bfloat16, "none", marks=pytest.mark.long),
        pytest.param("-march=x86-64-v3", torch.float32, "none", marks=pytest.mark.long),
        ("-march=x86-64-v3", torch.bfloat16, "int4"),
    ],
    ids=str,
)
def test_older_processors(
    target: str, dtype: torch.dtype, quantization: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No dot products of bfloat16, no wide vectors."""
    require_target(target)
    path = checkpoint("qwen3")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION).eval()
    with monkeypatch.context() as patch:
        if dtype is not torch.float32:
            optimise_less(patch)
        step = CompiledModel(model, dtype, quantization, [target])
    found = step.logits(batch_of([(tokens, 0) for tokens in sequences(2)]))
    if quantization == "int4":  # bundles are the same integers on any processor
        own = load(path, dtype="bfloat16", quantization="int4")
        assert error(found[:33], logits(own, batch_of([(sequences(1)[0], 0)]))) < 0.02
        own.model.close()
    else:
        assert error(found[:33], *expected(path, sequences(1), dtype)) < TOLERANCE[dtype]
