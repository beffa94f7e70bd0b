"""Where a model is on disk. Imports no torch: a name that leads nowhere is refused before anything that takes time."""

from __future__ import annotations

from pathlib import Path

from asyncengine import tiny
from asyncengine.config import EngineConfig
from asyncengine.errors import AdapterError, CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
_NOWHERE = (RuntimeError, OSError, ValueError)
"""Raised of a path whose user or home there is not, that may not be looked at, and that nothing on a disk can have."""
_EMBEDDED = {"tiny": tiny.PATH, "tiny-draft": tiny.DRAFT_PATH}


def locate(model: str) -> Path:
    """Directory of a model that is named by a path, by the id of a cached model, or as ``"tiny"`` or ``"tiny-draft"``.

    Never touches the network.

    Raises:
        CheckpointError: It is not there.
    """
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        there = path.exists()
    except _NOWHERE as error:
        raise CheckpointError(f"model {model!r:.200}: {getattr(error, 'strerror', None) or error}") from error
    if model in _EMBEDDED:
        return _EMBEDDED[model]
    if there:
        raise CheckpointError(f"model {model!r} is a file; expected a checkpoint directory")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"model {model!r}: there is no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"model {model!r} is neither a directory nor in the local Hugging Face cache; download it with "
            f"'hf download {model}'"
        ) from error


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


def check_there(config: EngineConfig) -> None:
    """Whether all that a configuration names is there. What is in it, others look at.

    Raises:
        CheckpointError: A directory is missing, or the model's has no ``config.json``.
        AdapterError: An adapter's is missing, or has no ``adapter_config.json``.
    """
    for model in (config.model, *config.additional_models):
        wanted = locate(model) / "config.json"
        if not wanted.exists():
            raise CheckpointError(f"{wanted} does not exist")
    if config.tokenizer is not None:
        locate(config.tokenizer)
    for path in config.adapters.values():
        locate_adapter(path)
