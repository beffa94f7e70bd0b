"""What things are called on the wire."""

from __future__ import annotations

import random
from pathlib import PurePath

from asyncengine.loop.engine import AsyncEngine
from asyncengine.server.settings import ServerSettings

_random = random.Random()
"""Names need to differ, not to be secret; asking the system for each is slow."""


def fresh_id() -> str:
    """Twenty-four hexadecimal digits that nobody else has."""
    return f"{_random.getrandbits(96):024x}"


def model_name(engine: AsyncEngine, settings: ServerSettings) -> str | None:
    """The name in the settings, or else that of the loaded model; of a path only its last part. None without both."""
    if settings.served_model_name is not None:
        return settings.served_model_name
    config = engine.complete_engine_config
    if config is None:
        return None
    path = PurePath(config.model)
    return path.name if path.is_absolute() or config.model.startswith((".", "~")) else config.model
