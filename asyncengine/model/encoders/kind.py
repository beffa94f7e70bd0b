"""Whether a checkpoint is of an encoder: said by its configuration, and cheaply for what is none."""

from __future__ import annotations

from typing import Any

_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How architectures end that write texts."""


def is_encoder(config: dict[str, Any]) -> bool:
    """Whether a model reads in both directions.

    That is so of those which transformers has as models that fill in masked words, unless they are configured as
    decoders, and of decoders that are configured to look ahead (as EmbeddingGemma is).

    Args:
        config: Of its checkpoint, ``config.json``.
    """
    if config.get("is_encoder_decoder") or config.get("is_decoder") or "text_config" in config:
        return False
    if config.get("use_bidirectional_attention") is True:
        return True
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(named, str) and named.endswith(_WRITERS):
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return str(config.get("model_type")) in MODEL_FOR_MASKED_LM_MAPPING_NAMES
