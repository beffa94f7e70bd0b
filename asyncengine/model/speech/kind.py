"""Whether a checkpoint is of a model that writes down what it hears: said by its configuration."""

from __future__ import annotations

from typing import Any

KINDS = frozenset({"whisper"})
"""Types of models, as ``config.json`` has them."""


def is_speech(config: dict[str, Any]) -> bool:
    """Whether a model is an encoder of audio with a decoder that attends to what it encodes.

    Args:
        config: Of its checkpoint, ``config.json``.
    """
    return config.get("model_type") in KINDS and config.get("is_encoder_decoder") is not False
