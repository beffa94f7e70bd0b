"""What cannot be had with a model that has recurrent layers."""

from __future__ import annotations

from asyncengine.config import EngineConfig
from asyncengine.errors import ConfigError


def check_recurrent(config: EngineConfig, target: bool, draft: bool) -> None:
    """Refuses a compiled step, which knows no such layers, and speculation: tokens that turn out not to count cannot be
    taken out of a state again.

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
    if config.speculative_mode == "disable":
        return
    if draft:
        raise ConfigError(
            f"additional_models is {list(config.additional_models)!r}, a model with recurrent layers, whose states "
            "cannot be taken back; it cannot draft"
        )
    if target:
        raise ConfigError(
            f"speculative_mode is {config.speculative_mode!r} with a model that has recurrent layers, whose states "
            "cannot be taken back; allowed: 'disable'"
        )
