"""The directory that describes the model in a GGUF file: what others read of a checkpoint beside its weights.

It is written once for what a file says, by one rename; the oldest ones go when there are many.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncengine.builds import cache_directory
from asyncengine.model.gguf.facts import Facts
from asyncengine.model.gguf.family import Family
from asyncengine.model.gguf.header import Header
from asyncengine.model.gguf.tokenizer import write_tokenizer
from asyncengine.model.kept_file import version

MOST_DIRECTORIES = 16
"""Kept at a time. A vocabulary of 152,000 tokens takes some 12 MB."""
_IN_USE = 3600.0
"""Seconds after which nobody is taken to read one any more."""
_SAMPLING = {
    "temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
_WHOLE = "whole.json"
"""What is written last: the sizes of the other files."""
_OWN: dict[str, Path] = {}
"""Directories of this process alone, by what would be their names."""


def directory_of(header: Header, family: Family) -> Path:
    """The directory, which is written if there is none.

    Raises:
        CheckpointError: The metadata does not fit together.
        UnsupportedModelError: The tokenizer is of a kind that is not known here.
    """
    config = json.dumps(family.config(Facts(header)) | {"transformers_version": version("transformers")}, indent=1)
    about = (header.digest, config, _program(), version("transformers"), version("tokenizers"))
    name = hashlib.sha256("\0".join(about).encode()).hexdigest()
    try:
        return _kept(cache_directory() / "gguf" / name, header, config)
    except (OSError, RuntimeError):  # nowhere to keep it, or no room: it is for this process alone
        if name in _OWN and _is_whole(_OWN[name]):
            return _OWN[name]
        own = Path(tempfile.mkdtemp(prefix="asyncengine-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        _write(header, config, own)
        _OWN[name] = own
        return own


def _kept(home: Path, header: Header, config: str) -> Path:
    if _is_whole(home):
        os.utime(home)
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix="writing-", dir=home.parent))
    try:
        _write(header, config, workspace)
        if home.exists() and not _is_whole(home):  # somebody has cleaned up
            _remove(home)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(workspace, home)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    _forget(home.parent)
    return home


def _is_whole(directory: Path) -> bool:
    """Whether all that was written is there."""
    try:
        sizes = json.loads((directory / _WHOLE).read_text("utf-8"))
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _remove(directory: Path) -> None:
    """At once, as far as others can see."""
    gone = directory.with_name(f"removing-{directory.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        os.rename(directory, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _forget(parent: Path) -> None:
    """Removes the oldest directories, as far as no load can still be reading them."""
    with contextlib.suppress(OSError):  # another process does the same
        used = sorted(((each.stat().st_mtime, each) for each in parent.iterdir()), reverse=True)
        for when, old in used[MOST_DIRECTORIES:]:
            if when < time.time() - _IN_USE:
                _remove(old)


def _write(header: Header, config: str, directory: Path) -> None:
    vocabulary = write_tokenizer(header.metadata, directory)
    stated = [header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ends = {each for each in stated if isinstance(each, int)} if vocabulary is None else vocabulary.ends
    generation = {"eos_token_id": sorted(ends)} | _sampling(header.metadata)
    (directory / "config.json").write_text(config, encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=1), encoding="utf-8")
    sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
    (directory / _WHOLE).write_text(json.dumps(sizes), encoding="utf-8")


def _sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's makers say of sampling."""
    stated = {name: metadata.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    return {name: value for name, value in stated.items() if value is not None}


def _program() -> str:
    """A digest of the code that writes it."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
