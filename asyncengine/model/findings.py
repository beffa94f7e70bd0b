"""What a load found out about a checkpoint, kept on disk for the next load of the same one on the same machine.

Most of a load is finding out: importing transformers' modules takes seconds, and so do building a model, watching it,
and computing what its logits should be. For a model that runs as a compiled step, all that comes to a few hundred
kilobytes: where its parts are (`asyncengine.model.decoder.parts`), and its logits in the trial. With them the next load
needs no model of transformers'.

No verdict is kept. The logits are those that transformers computed, and each load compares them with what the compiled
step computes from the weights as they are now; where they differ, everything is found out anew. Nor does a file say
anything about another checkpoint: its name is a digest of this package's code, the versions of Python, torch and
transformers, the processor, the configuration, and of each weight file's size, place and times.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

import asyncengine
from asyncengine.builds import cache_directory, processor
from asyncengine.config import EngineConfig
from asyncengine.model import kept_file
from asyncengine.model.kept_file import version

MOST_FILES = 64
"""Kept at a time; the oldest goes first."""
MOST_BYTES = 4 << 20
"""Of one file. What is larger is not worth keeping."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found.

    Attributes:
        description: As `asyncengine.model.skeleton` writes and reads it; of JSON's types alone.
        tensors: What it refers to.
    """

    description: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def place_of(config: EngineConfig, checkpoint: Any, device: torch.device, dtype: torch.dtype) -> Path | None:
    """Where what is found is kept; None if nothing is, for a load of this kind.

    Args:
        config: What is wanted.
        checkpoint: An `asyncengine.model.checkpoint.Checkpoint`.
        device: Where.
        dtype: Of weights and activations.
    """
    if device.type != "cpu" or config.decoder_backend == "transformers" or config.quantization == "fp8":
        return None
    if (
        config.speculative_mode == "mtp"
        or config.additional_models
        or config.kv_cache_dtype != "auto"
        or not checkpoint.tensors
    ):
        return None
    digest = hashlib.sha256()
    asked = (str(dtype), config.quantization, config.max_single_sequence_length)
    for about in (program(), asked, checkpoint.config, *stamps(checkpoint.weight_files), *_modules(checkpoint)):
        digest.update(f"{about}\0".encode())
    try:
        return cache_directory() / "findings" / digest.hexdigest()
    except RuntimeError:  # this user has no home directory
        return None


def recall(place: Path | None) -> Findings | None:
    """What was kept there, if it is whole."""
    content = None if place is None else kept_file.read(place)
    if content is None:
        return None
    try:
        tensors = load(content)
        return Findings(json.loads(tensors.pop("description").numpy().tobytes()), tensors)
    except (SafetensorError, ValueError, KeyError):
        return None


def keep(place: Path, findings: Findings) -> None:
    """Writes what was found, by one rename. Where that cannot be, the next load finds it out again."""
    text = bytearray(json.dumps(findings.description).encode())
    content = save({**findings.tensors, "description": torch.frombuffer(text, dtype=torch.uint8)})
    if len(content) <= MOST_BYTES:
        kept_file.write(place, content, MOST_FILES)


def program() -> tuple[str, ...]:
    """Whatever of the programs could come to something else."""
    capability = torch.backends.cpu.get_cpu_capability()
    return (sys.version, torch.__version__, version("transformers"), processor(), capability, _sources())


@cache
def _sources() -> str:
    """A digest of this package's code, as the process found it."""
    package = Path(asyncengine.__file__).parent
    sources = [file for folder in ("model", "step") for file in sorted((package / folder).rglob("*"))]
    digest = hashlib.sha256()
    for source in sources:
        if source.suffix in (".py", ".cpp", ".h"):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def stamps(files: list[Path]) -> Iterator[tuple[str, int, int, int, int, int]]:
    """What changes when a file does: the system sets the last of the times, and nobody else can."""
    for file in files:
        status = file.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        yield file.name, status.st_size, status.st_dev, status.st_ino, *times


def _modules(checkpoint: Any) -> Iterator[tuple[str, int, int, int, int, int]]:
    """Stamps of transformers' modules for the model, which somebody may have edited."""
    spec = find_spec("transformers")
    kind = str(checkpoint.config.get("model_type")).replace("-", "_")
    for root in () if spec is None else spec.submodule_search_locations or ():
        yield from stamps(sorted((Path(root) / "models" / kind).glob("*.py")))
