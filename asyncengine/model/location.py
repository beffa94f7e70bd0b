"""Where a model is on disk. Imports no torch: a name that leads nowhere is refused before anything that takes time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from asyncengine import tiny
from asyncengine.config import EngineConfig
from asyncengine.errors import AdapterError, CheckpointError
from asyncengine.model.draft_heads.eagle_config import is_head

GGUF = ".gguf"
"""How names of llama.cpp's files end."""
_OTHER_WEIGHTS = "model*.safetensors", "pytorch_model*.bin"
_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
ADAPTER_CONFIG = "adapter_config.json"
_NOWHERE = (RuntimeError, OSError, ValueError)
"""Raised of a path whose user or home there is not, that may not be looked at, and that nothing on a disk can have."""
_EMBEDDED = {"tiny": tiny.PATH, "tiny-draft": tiny.DRAFT_PATH, "tiny-eagle3": tiny.EAGLE_PATH}


def locate(model: str) -> Path:
    """Directory of a model that is named by a path, by the id of a cached model, or as an embedded one (``"tiny"``).

    A GGUF file is a model by itself, and is found where a directory has no other model and no second one. In a cached
    model's place, ``"owner/name:Q4_K_M"`` means the one with that in its name. Of those in parts, the first is meant.

    Never touches the network.

    Returns:
        A directory, or a GGUF file.

    Raises:
        CheckpointError: It is not there.
    """
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return _in_directory(path)
        if path.suffix.lower() == GGUF and path.is_file():
            return path
        there = path.exists()
    except _NOWHERE as error:
        raise CheckpointError(f"model {model!r:.200}: {getattr(error, 'strerror', None) or error}") from error
    if model in _EMBEDDED:
        return _EMBEDDED[model]
    if there:
        raise CheckpointError(f"model {model!r} is a file; expected a checkpoint directory, or a file ending in {GGUF}")
    cached, _, kind = model.partition(":")
    is_file = model.lower().endswith(GGUF)
    if model.startswith((".", "/", "~")) or cached.count("/") != 1 or is_file:
        what = "file" if is_file else "directory"
        raise CheckpointError(f"model {model!r}: there is no such {what}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(cached, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"model {model!r} is neither a directory nor in the local Hugging Face cache; download it with "
            f"'hf download {cached}'"
        ) from error
    return _in_directory(path, kind)


def _in_directory(path: Path, kind: str = "") -> Path:
    """A directory, or the GGUF file in it that is a model.

    Args:
        path: The directory.
        kind: What its name has in it. Where several have, it is the one that ends with it behind a sign, and of those
            the one with the shortest name: "model-F16" and not "model-BF16", "model-Q4_K_M" and not
            "model-UD-Q4_K_M".
    """
    models = _models(path.glob(f"*{GGUF}"))
    if kind or not models:  # such files may be in directories of their own
        models = _models(path.glob(f"*/*{GGUF}")) + models
    if not kind and (not models or any(next(path.glob(pattern), None) for pattern in _OTHER_WEIGHTS)):
        return path
    named = [file for file in models if kind.lower() in file.stem.lower()]
    stems = {file: _PART.sub("", file.name).removesuffix(GGUF) for file in named}
    ending = [file for file in named if re.search(rf"(^|[-._]){re.escape(kind)}$", stems[file], re.IGNORECASE)]
    shortest = sorted(ending, key=lambda file: len(stems[file]))
    if len(named) == 1:
        return named[0]
    if kind and shortest and len({len(stems[file]) for file in shortest[:2]}) == len(shortest[:2]):
        return shortest[0]
    there = ", ".join(str(file.relative_to(path)) for file in models) or "none"
    if not named:
        raise CheckpointError(f"{path} has no GGUF file with {kind!r} in its name; there: {there}")
    raise CheckpointError(f"{path} has {len(models)} GGUF files; name one of them: {there}")


def _models(files: Iterable[Path]) -> list[Path]:
    """Those that are models, or the first parts of some: encoders of images and statistics lie beside them."""
    found = []
    for file in sorted(files):
        part = _PART.search(file.name)
        if "mmproj" not in file.name and "imatrix" not in file.name and (part is None or int(part[1]) == 1):
            found.append(file)
    return found


def locate_adapter(source: str) -> Path:
    """Directory of an adapter.

    Raises:
        AdapterError: It is not there, or nobody has saved an adapter in it.
    """
    try:
        path = Path(source).expanduser()
        if (path / ADAPTER_CONFIG).exists():
            return path
        there = path.exists()
    except _NOWHERE as error:
        raise AdapterError(f"adapter {source!r:.200}: {getattr(error, 'strerror', None) or error}") from error
    if there:
        raise AdapterError(f"adapter {source!r:.200} has no {ADAPTER_CONFIG}: it is not an adapter that PEFT saved")
    raise AdapterError(f"adapter {source!r:.200}: there is no such directory")


def names_head(model: str) -> bool:
    """Whether a draft head is meant, not a model: by the configuration that is there."""
    try:
        config = json.loads((locate(model) / "config.json").read_text(encoding="utf-8"))
    except (CheckpointError, OSError, ValueError, RecursionError):
        return False  # whoever reads it will say what is wrong
    return isinstance(config, dict) and is_head(config)


def check_there(config: EngineConfig) -> None:
    """Whether all that a configuration names is there. What is in it, others look at.

    Raises:
        CheckpointError: A directory is missing, or the model's has no ``config.json``.
        AdapterError: An adapter's is missing, or has no ``adapter_config.json``.
    """
    for model in (config.model, *config.additional_models):
        found = locate(model)
        wanted = found / "config.json" if found.is_dir() else found
        if not wanted.exists():
            raise CheckpointError(f"{wanted} does not exist")
    if config.tokenizer is not None:
        locate(config.tokenizer)
    for path in config.adapters.values():
        locate_adapter(path)
