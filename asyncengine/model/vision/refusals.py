"""Why a checkpoint is served without images, as far as its files tell."""

from __future__ import annotations

import importlib.util
from typing import Any

from asyncengine.config import EngineConfig

TEXT_ALONE = "its checkpoint is of text alone"
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def refusal(config: EngineConfig, checkpoint: Any) -> str:
    """Why images are refused, in words; empty if nothing is known against them.

    Args:
        config: What is wanted.
        checkpoint: An `asyncengine.model.checkpoint.Checkpoint`.
    """
    if not isinstance(checkpoint.config.get("vision_config"), dict):
        return TEXT_ALONE
    if config.images is False:
        return "images is False"
    if not any((checkpoint.path / name).exists() for name in _PROCESSORS):
        return f"its checkpoint has no {' or '.join(_PROCESSORS)}"
    if importlib.util.find_spec("PIL") is None:
        return "Pillow is not installed; the extra 'images' brings it"
    return ""
