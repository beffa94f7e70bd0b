"""The directory that describes the model in a GGUF file: what others read of a checkpoint beside its weights.

It is written once for each header, by one rename; the oldest ones go when there are many.
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
from collections.abc import Iterator, Mapping
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
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>",
    "<end_of_turn>", "<turn|>", "<|tool_response>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<end_of_utterance>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
"""Control tokens that end an answer whatever else the metadata says, as llama.cpp has it."""
_SAMPLING = {
    "temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
_CONTROL = 3


def directory_of(header: Header, family: Family) -> Path:
    """The directory, which is written if there is none.

    Raises:
        CheckpointError: The metadata does not fit together.
        UnsupportedModelError: The tokenizer is of a kind that is not known here.
    """
    about = (header.digest, _program(), version("transformers"), version("tokenizers"))
    name = hashlib.sha256("\0".join(about).encode()).hexdigest()
    try:
        home = cache_directory() / "gguf" / name
        if home.is_dir():
            os.utime(home)
            return home
        home.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix="writing-", dir=home.parent))
    except (OSError, RuntimeError):  # nowhere to keep it: it is for this process alone
        workspace = Path(tempfile.mkdtemp(prefix="asyncengine-"))
        atexit.register(shutil.rmtree, workspace, ignore_errors=True)
        _write(header, family, workspace)
        return workspace
    try:
        _write(header, family, workspace)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(workspace, home)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    _forget(home.parent)
    return home


def _forget(parent: Path) -> None:
    """Removes the oldest directories, as far as no load can still be reading them."""
    with contextlib.suppress(OSError):  # another process does the same
        used = sorted(((each.stat().st_mtime, each) for each in parent.iterdir()), reverse=True)
        for when, old in used[MOST_DIRECTORIES:]:
            if when < time.time() - _IN_USE:
                shutil.rmtree(old, ignore_errors=True)


def _write(header: Header, family: Family, directory: Path) -> None:
    config = family.config(Facts(header)) | {"transformers_version": version("transformers")}
    generation = {"eos_token_id": list(_ends(header.metadata))} | _sampling(header.metadata)
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
    write_tokenizer(header.metadata, directory)


def _ends(metadata: Mapping[str, Any]) -> Iterator[int]:
    """Tokens that end a text."""
    stated = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    tokens, kinds = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", [])
    control = {token: at for at, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == _CONTROL}
    found = {at for at in stated if isinstance(at, int)} | {control[each] for each in _ENDS if each in control}
    if "<|return|>" in control and "<|call|>" in control:  # a message of several ends there, and no answer
        found.discard(control.get("<|end|>", -1))
    yield from sorted(found)


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
