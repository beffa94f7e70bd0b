"""How checkpoints store the layer that predicts a further token, which transformers leaves out. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

LAYER = "model.layers.0."
"""What the names of a layer begin with in a model of one layer."""
NORM = "model.norm.weight"
"""The last norm of such a model, or of any."""


@dataclass(frozen=True, slots=True)
class MtpLayout:
    """One way.

    Attributes:
        layer: What the names of its decoder layer begin with.
        embedding_norm: Of the token's embedding; as the following ones, a parameter's whole name.
        state_norm: Of the state before it.
        projection: Of both, side by side.
        norm: Behind the layer.
        embedding: Where it has one of its own.
        head: Likewise.
        state_first: Whether the state comes first in what is projected.
        of_normed: Whether it sees the model's states behind that one's last norm.
        goes_on_normed: Whether it goes on from its own states behind its norm.
    """

    layer: str
    embedding_norm: str
    state_norm: str
    projection: str
    norm: str
    embedding: str = ""
    head: str = ""
    state_first: bool = False
    of_normed: bool = True
    goes_on_normed: bool = False

    @property
    def own(self) -> tuple[str, ...]:
        """Parameters beside those of the layer, all of which there must be."""
        return self.embedding_norm, self.state_norm, self.projection, self.norm


def layouts(num_layers: int) -> dict[str, MtpLayout]:
    """Those that are known, by the families that have them.

    Args:
        num_layers: Of the model.
    """
    behind = f"model.layers.{num_layers}."
    return {
        "DeepSeek, GLM": MtpLayout(
            behind,
            f"{behind}enorm.weight",
            f"{behind}hnorm.weight",
            f"{behind}eh_proj.weight",
            f"{behind}shared_head.norm.weight",
            f"{behind}embed_tokens.weight",
            f"{behind}shared_head.head.weight",
        ),
        "Qwen": MtpLayout(
            "mtp.layers.0.",
            "mtp.pre_fc_norm_embedding.weight",
            "mtp.pre_fc_norm_hidden.weight",
            "mtp.fc.weight",
            "mtp.norm.weight",
            "mtp.embed_tokens.weight",
            goes_on_normed=True,
        ),
        "MiMo": MtpLayout(
            "model.mtp_layers.0.",
            "model.mtp_layers.0.token_layernorm.weight",
            "model.mtp_layers.0.hidden_layernorm.weight",
            "model.mtp_layers.0.input_proj.weight",
            "model.mtp_layers.0.final_layernorm.weight",
            state_first=True,
            of_normed=False,
            goes_on_normed=True,
        ),
    }


def layout_of(names: Collection[str], num_layers: int) -> MtpLayout | None:
    """That of a checkpoint, by the names of its parameters; None if it has no such layer."""
    found = (each for each in layouts(num_layers).values() if each.projection in names)
    return next(found, None)
