"""What things are called on the wire."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import PurePath

from asyncengine.config import EngineConfig
from asyncengine.errors import ConfigError
from asyncengine.loop.engine import AsyncEngine
from asyncengine.server.settings import ServerSettings

_random = random.Random()
"""Names need to differ, not to be secret; asking the system for each is slow."""


@dataclass(frozen=True, slots=True)
class Served:
    """Who answers a request.

    Attributes:
        name: What the answer calls it.
        adapter: What the model computes the request with; None is the model alone.
    """

    name: str
    adapter: str | None = None


def fresh_id() -> str:
    """Twenty-four hexadecimal digits that nobody else has."""
    return f"{_random.getrandbits(96):024x}"


def model_name(engine: AsyncEngine, settings: ServerSettings) -> str | None:
    """The name in the settings, or else that of the loaded model; of a path only its last part. None without both."""
    config = engine.complete_engine_config
    return settings.served_model_name if config is None else name_of(config, settings)


def name_of(config: EngineConfig, settings: ServerSettings) -> str:
    """What a model is called once it is loaded."""
    if settings.served_model_name is not None:
        return settings.served_model_name
    path = PurePath(config.model)
    return path.name if path.is_absolute() or config.model.startswith((".", "~")) else config.model


def check_names(config: EngineConfig, settings: ServerSettings) -> None:
    """Refuses an adapter that nobody could ask for.

    Raises:
        ConfigError: It has the model's own name.
    """
    name = name_of(config, settings)
    if name in config.adapters:
        raise ConfigError(f"adapters has {name!r}, which is what the model itself is called; choose another name")
