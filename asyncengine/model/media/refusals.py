"""Why a checkpoint is served without images, audio or videos, as far as its files tell."""

from __future__ import annotations

import importlib.util
from typing import Any

from asyncengine.config import EngineConfig
from asyncengine.media import KINDS, PLURALS, UNENCODED, Kind

_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_LISTENING = ("audio", "speech", "acoustic", "sound", "encoder")
"""What is in the names of parts of configurations that may be encoders of audio."""


def refusals(config: EngineConfig, checkpoint: Any) -> dict[Kind, str]:
    """By kind, why images, audio and videos are refused, in words; empty if nothing is known against them.

    Args:
        config: What is wanted.
        checkpoint: An `asyncengine.model.checkpoint.Checkpoint`.
    """
    return {kind: _refusal(kind, config, checkpoint) for kind in KINDS}


def _refusal(kind: Kind, config: EngineConfig, checkpoint: Any) -> str:
    if not _may_have_encoder(kind, checkpoint.config):
        return UNENCODED[kind]
    if wanted(kind, config) is False:
        return "images is False" if kind == "video" and config.videos is None else f"{PLURALS[kind]} is False"
    if not any((checkpoint.path / name).exists() for name in _PROCESSORS):
        return f"its checkpoint has no {' or '.join(_PROCESSORS)}"
    if kind != "audio" and importlib.util.find_spec("PIL") is None:
        return f"Pillow is not installed; the extra {PLURALS[kind]!r} brings it"
    if kind == "audio" and (checkpoint.path / "adapter_config.json").exists():
        return (
            "its checkpoint has an adapter beside its weights, which transformers applies to prompts with audio alone"
        )
    return ""


def wanted(kind: Kind, config: EngineConfig) -> bool | None:
    """What the configuration says of a kind. Who wants no images wants no videos, if nothing else is said."""
    if kind == "video":
        return False if config.videos is None and config.images is False else config.videos
    return config.images if kind == "image" else config.audio


def _may_have_encoder(kind: Kind, stated: dict[str, Any]) -> bool:
    if kind != "audio":
        return isinstance(stated.get("vision_config"), dict)
    parts = [name for name, value in stated.items() if name.endswith("_config") and isinstance(value, dict)]
    return any(word in name for name in parts for word in _LISTENING)
