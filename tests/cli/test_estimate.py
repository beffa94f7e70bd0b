"""``asyncengine estimate``: its arithmetic is the loader's, and it reads no weights."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncengine import AsyncEngine, EngineConfig, UnsupportedModelError, tiny
from asyncengine.cli.estimate import Room, _needs_rows, read
from asyncengine.model import memory
from asyncengine.model.load_check import SLACK
from tests.cli.programs import run
from tests.model.checkpoints import write
from tests.model.encoders import checkpoints as encoders
from tests.model.text_to_text import checkpoints as sources

pytestmark = pytest.mark.loops("either")

LAYERS, HIDDEN, VOCABULARY = 3, 2048, 32000
ROWS: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)} | {
    f"model.layers.{layer}.{name}.weight": (HIDDEN, HIDDEN)
    for layer in range(LAYERS)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
}


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint of 236 MB of which nothing but its headers is on the disk."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 64,
        "vocab_size": VOCABULARY, "max_position_embeddings": 8192,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    headers(tmp_path, ROWS)
    return tmp_path


def headers(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes a file of weights in bfloat16, of which nothing else is on the disk."""
    entries, at = {}, 0
    for name, (rows, columns) in shapes.items():
        end = at + rows * columns * 2
        entries[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + at)


def test_shows_its_arithmetic(large: Path) -> None:
    done = run("estimate", str(large), "--memory", "4")
    assert done.status == 0, done.err
    parameters = VOCABULARY * HIDDEN + LAYERS * 4 * HIDDEN * HIDDEN
    assert f"LlamaForCausalLM, {parameters / 1e6:,.1f} M parameters in {1 + 4 * LAYERS} tensors" in done.out
    assert f"weights         {2 * parameters / 2**30:.2f} GiB in bfloat16" in done.out
    assert "3 layers x 4 heads x (128 + 128) x 2 bytes" in done.out
    per_token = LAYERS * 4 * 256 * 2
    assert f"= {per_token / 1024:.1f} KiB per token, {per_token * 32 / 1024:.1f} KiB per block of 32" in done.out
    blocks = int((4 * 2**30 - 2 * parameters - SLACK) * 0.4) // (per_token * 32)
    assert f"= {blocks:,} blocks = {blocks * 32:,} tokens" in done.out
    rows = re.findall(r"^ +([\d,]+) +([\d,]+) +([\d,]+)$", done.out, re.MULTILINE)
    table = [tuple(int(value.replace(",", "")) for value in row) for row in rows]
    assert table == [(n, blocks * 32 // n, min(64, blocks * 32 // n)) for n in (128, 256, 512, 1024, 2048, 4096, 8192)]


def test_flags_change_it(large: Path) -> None:
    flags = ("--max-model-len", "2048", "--max-num-seqs", "3", "--dtype", "float32", "--gpu-memory-utilization", "0.5")
    done = run("estimate", str(large), "--memory", "8", *flags)
    assert "x 4 bytes" in done.out and "0.5 x (8.00 GiB free" in done.out
    assert "largest batch   3 sequences of 2,048 tokens, limited by --max-num-seqs" in done.out


def test_a_short_memory_limits_the_context_and_then_the_model(large: Path) -> None:
    done = run("estimate", str(large), "--memory", "0.5")
    assert "tokens, limited by memory" in done.out and done.status == 0
    done = run("estimate", str(large), "--memory", "0.3")
    assert done.status == 1 and "does not fit" in done.out


async def test_it_reckons_as_the_loader_does(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SLACK + (8 << 20)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    config = EngineConfig("tiny", device="cpu", max_num_sequence=64)
    needs = read(config)
    assert needs.weight_bytes == sum(
        tensor.numel() * 4 for tensor in safetensors(tiny.PATH / "model.safetensors").values()
    )
    async with AsyncEngine(config) as engine:
        complete = engine.complete_engine_config
        assert complete is not None
        assert (complete.kv_cache_page_size, complete.max_single_sequence_length) == (needs.page_size, needs.max_length)
        total = complete.max_total_sequence_length
    # The loader asks what is free once the weights are there, so nothing is taken off again.
    assert total == min(int(free * 0.4) // needs.bytes_per_block, 64 * 1024 // 32) * needs.page_size
    assert (
        Room.of(needs, config, None).blocks == int((free - needs.weight_bytes - SLACK) * 0.4) // needs.bytes_per_block
    )


async def test_states_of_recurrent_layers_are_shown_and_reckoned_as_the_loader_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write(tmp_path, "lfm2"))
    done = run("estimate", path, "--memory", "1")
    assert done.status == 0, done.err
    assert "states          2 recurrent layers, 0.0 MiB per sequence" in done.out
    assert "320 states: of 64 sequences, and 256 that are kept" in done.out
    done = run("estimate", path, "--memory", "1", "--speculative-model", "ngram", "--num-speculative-tokens", "3")
    assert "512 states: of 64 sequences, 192 behind guessed tokens, and 256 that are kept" in done.out
    done = run("estimate", path, "--memory", "0.25")
    assert done.status == 1
    assert "states          2 recurrent layers" in done.out and "does not fit: the states of recurrent" in done.out
    free = SLACK + (8 << 20)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    config = EngineConfig(path, device="cpu", dtype="float32")
    room = Room.of(needs := read(config), config, free + needs.weight_bytes)
    async with AsyncEngine(config) as engine:
        complete, metrics = engine.complete_engine_config, engine.metrics()
    assert complete is not None
    assert (complete.max_num_sequence, metrics.states_total) == (room.sequences, room.kept)


async def test_a_draft_model_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SLACK + (8 << 20)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    config = EngineConfig("tiny", device="cpu", speculative_mode="small_draft", additional_models=("tiny-draft",))
    needs, alone = read(config), read(EngineConfig("tiny", device="cpu"))
    weights = sum(tensor.numel() * 4 for tensor in safetensors(tiny.DRAFT_PATH / "model.safetensors").values())
    assert needs.weight_bytes - alone.weight_bytes == needs.draft_bytes == weights
    async with AsyncEngine(config) as engine:
        complete = engine.complete_engine_config
        assert complete is not None and complete.max_total_sequence_length is not None
        assert complete.max_single_sequence_length == needs.max_length
        # The loader asks what is free once the weights are there, so nothing is taken off again.
        assert complete.max_total_sequence_length // needs.page_size == int(free * 0.4) // needs.bytes_per_block
    told = run("estimate", "tiny", "--speculative-model", "tiny-draft", "--memory", "1").out
    assert f"{weights / 2**20:,.1f} MiB of them the draft model's" in told
    assert "layers of the draft model x" in told


async def test_a_draft_head_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SLACK + (8 << 20)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    config = EngineConfig("tiny", device="cpu", speculative_mode="eagle3", additional_models=("tiny-eagle3",))
    needs, alone = read(config), read(EngineConfig("tiny", device="cpu"))
    own = sum(tensor.numel() * 4 for tensor in safetensors(tiny.EAGLE_PATH / "model.safetensors").values())
    shared = 2 * 1024 * 128 * 4  # embedding and head: as much as that, if they are not the model's own memory
    assert needs.weight_bytes - alone.weight_bytes == needs.draft_bytes == own + shared
    async with AsyncEngine(config) as engine:
        complete = engine.complete_engine_config
        assert complete is not None and complete.max_total_sequence_length is not None
        assert complete.max_total_sequence_length // needs.page_size == int(free * 0.4) // needs.bytes_per_block
    told = run("estimate", "tiny", "--speculative-model", "tiny-eagle3", "--memory", "1").out
    assert f"{(own + shared) / 2**20:,.1f} MiB of them the draft head's" in told
    assert "1 layers of the draft head x 1 heads x (40 + 32) x 4 bytes" in told


def test_keys_and_values_of_one_byte_are_half_of_those_in_bfloat16() -> None:
    half = read(EngineConfig("tiny", device="cuda", dtype="bfloat16")).bytes_per_block
    assert 2 * read(EngineConfig("tiny", device="cuda", kv_cache_dtype="fp8_e4m3")).bytes_per_block == half
    done = run("estimate", "tiny", "--kv-cache-dtype", "fp8_e4m3", "--memory", "1")
    assert done.status == 0 and "x 1 bytes" in done.out


def test_latents_are_kept_once_but_for_the_kernel_of_the_cpu(tmp_path: Path) -> None:
    path = str(write(tmp_path, "minicpm3"))
    for changes, text, numbers in (
        ({}, "latents of (24 + 16)", 24 + 16),
        ({"attention_backend": "torch"}, "latents of 24", 24),
        ({"attention_backend": "torch", "mla": False}, "4 heads x (24 + 20)", 4 * (24 + 20)),
    ):
        needs = read(EngineConfig(path, device="cpu", **changes))
        assert needs.bytes_per_block == 3 * needs.page_size * numbers * 4
        assert ("KV cache", f"3 layers x {text} x 4 bytes") in _needs_rows(needs)
    with pytest.raises(UnsupportedModelError, match="mla is True"):
        read(EngineConfig("tiny", device="cpu", mla=True))


def test_graphs_of_a_gpu_are_taken_off() -> None:
    needs = read(EngineConfig("tiny", device="cuda", max_num_sequence=64))
    steps, draws, with_prompts = 11, 3 * 11, 7
    assert needs.graphs is not None and needs.graphs.graphs == steps + draws + with_prompts
    done = run("estimate", "tiny", "--device", "cuda", "--max-num-seqs", "64", "--memory", "8")
    left = int(8 * 2**30 * 0.9) - needs.weight_bytes - SLACK - needs.graphs.nbytes
    assert f"0.25 GiB for everything else - {needs.graphs} = {left / 2**30:.2f} GiB" in done.out
    assert f"= {left // needs.bytes_per_block:,} blocks" in done.out
    drafted = read(
        EngineConfig(
            "tiny", device="cuda", max_num_sequence=64, speculative_mode="small_draft", additional_models=["tiny-draft"]
        )
    )
    assert drafted.graphs is not None and drafted.graphs.graphs == 2 * (steps + with_prompts)
    for config in (EngineConfig("tiny", device="cpu"), EngineConfig("tiny", device="cuda", attention_backend="torch")):
        assert read(config).graphs is None


def safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./nowhere"], "model './nowhere': there is no such directory"),
        (["tiny", "--max-model-len", "4096"], "--max-model-len (max_single_sequence_length) is 4096"),
        (["tiny", "--memory", "inf"], "--memory is inf; expected GiB >= 0"),
        (["tiny", "--memory", "1e300"], "--memory is 1e+300; expected GiB >= 0, and less than 1,073,741,824"),
        (["tiny", "--device", "cuda:99"], "--memory says how much to reckon with"),
        (["tiny", "--quantization", "int8", "--dtype", "float16"], "quantization is 'int8' with dtype float16"),
        (["tiny", "--speculative-model", "./nowhere"], "model './nowhere': there is no such directory"),
        (["tiny", "--num-speculative-tokens", "3"], "--num-speculative-tokens (spec_draft_length) is 3 with"),
        (["tiny", "--speculative-model", "ngram", "--num-speculative-tokens", "33"], "expected an integer in 0..32"),
    ],
)
def test_what_cannot_be_reckoned_is_one_line(arguments: list[str], said: str) -> None:
    done = run("estimate", *arguments)
    assert done.status in (1, 2)
    assert said in done.err and done.err.count("\n") == 1


def test_a_model_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "longt5"}')
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    done = run("estimate", str(tmp_path))
    assert done.status == 1 and "encoder-decoder" in done.err


def test_an_encoder_takes_its_weights_and_nothing_for_texts(tmp_path: Path) -> None:
    path = str(encoders.write(tmp_path, "bert", 3))
    done = run("estimate", path, "--memory", "1", "--max-num-seqs", "7")
    assert done.status == 0, done.err
    for text in ("BertForSequenceClassification", "in float32", "none: an encoder", "64 tokens", "7 prompts"):
        assert text in done.out
    done = run("estimate", path, "--memory", "0.1")
    assert done.status == 1 and "does not fit" in done.out
    done = run("estimate", path, "--max-model-len", "65")
    assert done.status == 1 and "the model's positions allow 1..64" in done.err


FEW_BITS: list[tuple[str, float, int]] = [
    ("--quantization int8", 1, 1),
    ("--quantization int4", 0.5 + 2 / 32, 1),
    ("--quantization fp8", 1, 0),
    ("--quantization int4 --device cuda", 0.5 + 4 / 32, 0),
    ("--quantization fp8 --device cuda", 1, 0),
    ("--dtype bfloat16", 2, 2),
]
"""Bytes of each weight in the layers, and of each in the head where it is apart from the table of tokens."""


def test_weights_of_few_bits_in_a_model_that_reads_sources(tmp_path: Path) -> None:
    """Its table of tokens stays in bfloat16."""
    tokens, width = 64000, 1024
    sizes = {"encoder_layers": 2, "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width}
    config = sources.config("m2m_100", vocab_size=tokens, d_model=width, tie_word_embeddings=True, **sizes)
    config.save_pretrained(tmp_path)
    sources.tokenizer().save_pretrained(tmp_path)
    numbers = 2 * (4 + 8) * width**2 + 2 * (8 + 8) * width**2
    headers(tmp_path, {"model.shared.weight": (tokens, width), "all.layers.weight": (numbers // width, width)})
    for flags, of_layers, of_head in FEW_BITS:
        done = run("estimate", str(tmp_path), "--memory", "4", *flags.split())
        assert done.status == 0, done.err
        [(found, form)] = re.findall(r"weights +([0-9.]+) GiB in (\w+)", done.out)
        assert form == flags.split()[1] and f" - {found} GiB weights - " in done.out
        reckoned = tokens * width * (2 + of_head) + numbers * of_layers
        assert float(found) == pytest.approx(reckoned / 2**30, abs=0.006), flags
