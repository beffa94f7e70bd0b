from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

from asyncengine import EngineConfig, tiny
from asyncengine.errors import CheckpointError
from asyncengine.model.location import check_there, locate


@pytest.fixture
def llama(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(copytree(checkpoint("llama"), tmp_path / "llama"))


def test_locates_directories_and_the_embedded_model(llama: Path) -> None:
    assert locate(str(llama)) == llama
    assert locate("tiny") == tiny.PATH


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_a_path_that_does_not_exist_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(CheckpointError, match="there is no such directory"):
        locate(name)


def test_a_hub_id_is_looked_up_in_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"nor in the local Hugging Face cache.*hf download someone/model"):
        locate("someone/model")


def test_a_cached_hub_id_is_found(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    copytree(llama, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert locate("someone/model") == repository / "snapshots" / commit


def test_a_file_is_no_checkpoint(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; expected a checkpoint directory"):
        locate(str(llama / "config.json"))


@pytest.mark.parametrize("name", ["x" * 300, "./" + "y" * 300, "/" + "z/" * 5000])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="File name too long"):
        locate(name)


def test_all_that_a_configuration_names_must_be_there(llama: Path, tmp_path: Path) -> None:
    check_there(EngineConfig(str(llama), tokenizer="tiny"))
    drafted = {"speculative_mode": "small_draft", "additional_models": ["./nowhere"]}
    for fields in ({"tokenizer": "./nowhere"}, drafted):
        with pytest.raises(CheckpointError, match=r"model './nowhere': there is no such directory"):
            check_there(EngineConfig.from_dict({"model": "tiny"} | fields))
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        check_there(EngineConfig(str(tmp_path)))


def test_what_is_not_there_is_refused_before_torch_is_imported() -> None:
    program = (
        "import asyncio, sys\n"
        "from asyncengine import AsyncEngine, CheckpointError\n"
        "async def main():\n"
        "    try:\n"
        '        async with AsyncEngine(\'{"model": "/nowhere"}\'):\n'
        "            pass\n"
        "    except CheckpointError as error:\n"
        "        print(error)\n"
        "asyncio.run(main())\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["model '/nowhere': there is no such directory", "[]"]
