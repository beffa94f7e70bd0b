"""A load of a checkpoint whose weights are codes, or other numbers than the model's, that an earlier one knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from asyncengine import CheckpointError
from asyncengine.model.gguf import description
from asyncengine.model.gguf.checkpoint import GgufCheckpoint
from tests.model.decoder.test_program import batch_of, load, logits, sequences
from tests.model.gguf import test_eight_bits
from tests.model.gguf.tiny_file import write_tiny
from tests.model.stored import coded_checkpoints
from tests.model.test_findings import builds, kept, recalled

__all__ = ["builds", "kept"]  # fixtures
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def descriptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "cache_directory", lambda: tmp_path / "descriptions")


def untied(tmp_path: Path, kind: Kind) -> Path:
    """Of which queries, keys and values are not all stored alike, so that they become bytes together."""
    test_eight_bits.write(tmp_path / "model.gguf", kind, test_eight_bits.MIXED)
    return tmp_path / "model.gguf"


def in_halves(tmp_path: Path, path: Path) -> Path:
    """A checkpoint in float16."""
    values = {name: value.half() for name, value in load_file(path / "model.safetensors").items()}
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


WAYS: dict[str, Callable[[Path, Make], Path]] = {
    "tied Q8_0": lambda at, make: write_tiny(at / "tiny.gguf", Kind.Q8_0),
    "tied F32": lambda at, make: write_tiny(at / "tiny.gguf", Kind.F32),
    "Q4_0 and others": lambda at, make: untied(at, Kind.Q4_0),
    "Q6_K": lambda at, make: untied(at, Kind.Q6_K),
    "gptq": lambda at, make: coded_checkpoints.write(at, make("qwen2", num_hidden_layers=2, vocab_size=192), "gptq")[0],
    "awq": lambda at, make: coded_checkpoints.write(at, make("llama", num_hidden_layers=2, vocab_size=192), "awq")[0],
    "float16": lambda at, make: in_halves(at, make("qwen3", num_hidden_layers=2)),
    "turned": lambda at, make: in_halves(at, make("gpt2", num_hidden_layers=2)),
}


@pytest.mark.parametrize(
    ("way", "settings"),
    [
        ("tied Q8_0", {}),
        ("tied Q8_0", {"dtype": "float32", "quantization": "none"}),
        ("tied F32", {}),
        ("Q4_0 and others", {}),
        pytest.param("Q4_0 and others", {"quantization": "int8"}, marks=pytest.mark.long),
        ("Q6_K", {}),
        ("gptq", {"quantization": "int4"}),
        pytest.param("gptq", {"quantization": "none", "dtype": "float32"}, marks=pytest.mark.long),
        ("awq", {"quantization": "int4"}),
        ("float16", {"dtype": "float32"}),
        ("float16", {"dtype": "bfloat16", "quantization": "int8"}),
        ("turned", {"dtype": "float32"}),
    ],
    ids=str,
)
@pytest.mark.in_short("tied Q8_0-{}", "Q4_0 and others-{}", "gptq", "Q6_K", "turned")
def test_a_known_checkpoint_needs_no_model_of_transformers(
    way: str, settings: dict[str, Any], tmp_path: Path, checkpoint: Make, builds: list[str]
) -> None:
    """And what it computes is the same, bit for bit, also with new weights."""
    path = WAYS[way](tmp_path, checkpoint)
    settings = {"max_single_sequence_length": 128, **settings}
    first, second = (load(path, **settings) for _ in range(2))
    assert (recalled(first), recalled(second), len(builds)) == (False, True, 1)
    words = first.vocab_size
    batch = batch_of([(tokens % words, 0) for tokens in sequences()])
    found = logits(first, batch)
    assert torch.equal(found, logits(second, batch))
    for name in ("config", "limits", "vocab_size", "hidden_size", "notes", "eos_token_ids", "memory_bytes"):
        assert getattr(first, name) == getattr(second, name), name
    model: Any = first.model
    generator, new = torch.Generator().manual_seed(0), {}
    for name, parameter in model._model.named_parameters():
        module = model._model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim == 2 and any(part in name for part in ("down_proj", "q_proj", "c_fc", "embed_tokens")):
            shape = (module.out_features, module.in_features) if hasattr(module, "weight_scale") else parameter.shape
            new[name] = torch.randn(shape, generator=generator).mul_(0.1).to(model._program._dtype)
    assert len(new) > 1
    for loaded in (first, second):
        loaded.model.update_weights(new)
    changed = logits(first, batch)
    assert not torch.equal(changed, found)
    assert torch.equal(changed, logits(second, batch))
    first.model.close()
    second.model.close()


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, checkpoint: Make, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", Kind.Q8_0)
    load(path, max_single_sequence_length=128).model.close()

    def changed(self: GgufCheckpoint) -> None:
        raise CheckpointError("it has changed")

    monkeypatch.setattr(GgufCheckpoint, "check_unchanged", changed)
    with pytest.raises(CheckpointError, match="it has changed"):
        load(path, max_single_sequence_length=128)
    assert len(builds) == 1
