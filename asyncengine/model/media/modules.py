"""Which of a model's modules look at images or listen to audio."""

from __future__ import annotations

from typing import Any

from torch import nn


def senses(model: Any) -> set[nn.Module]:
    """Modules outside of a model's decoder and its head: encoders of images and audio, and what is between them and
    the text.

    No weight of theirs is rounded or packed: a step has few images, and they are computed as transformers does.
    """
    config = model.config
    of_text = getattr(config, "vision_config", None) is None and getattr(config, "audio_token_id", None) is None
    if of_text or not hasattr(model, "get_decoder"):
        return set()
    own = {*model.get_decoder().modules()}
    if (head := model.get_output_embeddings()) is not None:
        own |= {*head.modules()}
    return {module for module in model.modules() if own.isdisjoint(module.modules())}
