"""Whether a checkpoint is of a model that writes one text of another: said by its configuration."""

from __future__ import annotations

from typing import Any

KINDS = frozenset({
    "bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mt5", "pegasus", "plbart", "t5", "umt5",
})  # fmt: skip
"""Types of models that are served, as ``config.json`` has them. NLLB's is "m2m_100", MBart-50's "mbart", Flan-T5's and
MADLAD-400's "t5".
"""

_OWN = "it attends in code of its own"
_REASONS = {
    **dict.fromkeys(("bigbird_pegasus", "fsmt", "led", "longt5", "mvp", "nllb-moe", "pegasus_x", "prophetnet"), _OWN),
    **dict.fromkeys(("pop2piano", "t5gemma2", "udop"), "it reads more than texts"),
    "switch_transformers": "it has experts",
    "t5gemma": "layers of its decoder attend in several ways",
}
"""Why others are not, by their types."""


def is_text_to_text(config: dict[str, Any]) -> bool:
    """Whether a model is an encoder of text with a decoder that attends to what it encodes, of a kind that is served.

    Args:
        config: Of its checkpoint, ``config.json``.
    """
    return config.get("model_type") in KINDS and config.get("is_encoder_decoder") is not False


def why_not(model_type: str) -> str:
    """Why an encoder-decoder model of another type cannot be served, in words."""
    reason = _REASONS.get(model_type)
    known = "Whisper and, of text, " + ", ".join(sorted(KINDS))
    return f"{known} can be served" if reason is None else f"{reason}; {known} can be served"
