"""What the model is called on the wire."""

from __future__ import annotations

from pathlib import PurePath

from asyncengine.loop.engine import AsyncEngine
from asyncengine.server.settings import ServerSettings


def model_name(engine: AsyncEngine, settings: ServerSettings) -> str | None:
    """The name in the settings, or else that of the loaded model; of a path only its last part. None without both."""
    if settings.served_model_name is not None:
        return settings.served_model_name
    config = engine.complete_engine_config
    if config is None:
        return None
    path = PurePath(config.model)
    return path.name if path.is_absolute() or config.model.startswith((".", "~")) else config.model
