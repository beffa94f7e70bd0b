"""What cannot be had with a model that has recurrent layers."""

from __future__ import annotations

from asyncengine.config import EngineConfig
from asyncengine.errors import ConfigError


def check_recurrent(config: EngineConfig, target: bool, draft: bool) -> None:
    """Refuses a compiled step, which knows no such layers, and a model with such layers that drafts: what it has
    guessed could not be taken out of its states again.

    Args:
        config: What is wanted.
        target: Whether the model has recurrent layers.
        draft: Whether the one that drafts for it has.

    Raises:
        ConfigError: One of them is wanted.
    """
    if target and config.decoder_backend == "compiled":
        raise ConfigError(
            f"{config.model!r} cannot run as a compiled step: it has recurrent layers; decoder_backend is 'compiled', "
            "allowed: 'auto', 'transformers'"
        )
    if draft:
        raise ConfigError(
            f"additional_models is {list(config.additional_models)!r}, a model with recurrent layers, from whose "
            "states guesses cannot be taken back; name one with attention alone, or use speculative_mode 'ngram'"
        )
