import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch

from asyncengine import tiny
from asyncengine.errors import CheckpointError
from asyncengine.model.checkpoint import Checkpoint, tokenizer_key
from asyncengine.model.sentence_modules import embedder_of


@pytest.fixture
def llama(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(copytree(checkpoint("llama"), tmp_path / "llama"))


def test_a_missing_configuration_is_named(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        Checkpoint(llama)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "modules.json"])
def test_json_that_is_nested_too_deeply_cannot_be_read(name: str, llama: Path) -> None:
    (llama / name).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: .*recursion"):
        embedder_of(llama) if name == "modules.json" else Checkpoint(llama).generation_defaults


def test_a_header_that_is_nested_too_deeply_cannot_be_read(llama: Path) -> None:
    text = b"[" * 100_000
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or incomplete: .*recursion"):
        Checkpoint(llama)


def test_missing_weights_are_named(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        Checkpoint(llama)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_noticed_from_the_header(llama: Path, keep: int) -> None:
    file = llama / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or incomplete"):
        Checkpoint(llama)


def test_a_tensor_that_is_not_as_large_as_its_shape_is_noticed(llama: Path) -> None:
    file = llama / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"][0] += 1
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} of shape"):
        Checkpoint(llama)


def test_a_missing_shard_is_named(llama: Path) -> None:
    (llama / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"1 weight files are missing: model-00002\.safetensors"):
        Checkpoint(llama)


def test_sizes_come_from_the_headers(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    assert checkpoint.dtype is torch.float32
    size = (llama / "model.safetensors").stat().st_size
    assert size - 10_000 < checkpoint.weight_bytes(torch.float32) < size
    assert checkpoint.weight_bytes(torch.bfloat16) * 2 == checkpoint.weight_bytes(torch.float32)


def test_generation_defaults_come_from_the_file_and_nonsense_is_passed_over(llama: Path) -> None:
    (llama / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_p": 7, "top_k": 0, "eos_token_id": [3, 5]})
    )
    checkpoint = Checkpoint(llama)
    assert checkpoint.generation_defaults.temperature == 0.6
    assert checkpoint.generation_defaults.top_p is None
    assert checkpoint.generation_defaults.top_k is None
    assert checkpoint.eos_token_ids == (3, 5)


def test_equal_tokenizers_have_equal_keys(llama: Path, tmp_path: Path) -> None:
    assert tokenizer_key(llama) is None
    assert tokenizer_key(tiny.PATH) == tokenizer_key(Path(copytree(tiny.PATH, tmp_path / "copy")))
