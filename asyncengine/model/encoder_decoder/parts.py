"""The parts of models whose decoder attends to a source, which transformers has under several names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Parts:
    """Those of one model.

    Attributes:
        encoder: Reads sources.
        decoder: Its layers, and what stands before and behind them.
        own: What attends to the tokens before, by the modules' names and in the order of execution.
        beside: What attends to the source, in that order.
        projections: What makes queries, keys and values in these, and what takes what was attended to, by their names.
        head_dim: What the size of a head is called in these.
    """

    encoder: Any
    decoder: Any
    own: dict[str, Any]
    beside: list[Any]
    projections: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "out_proj")
    head_dim: str = "head_dim"


def parts_of(model: Any) -> Parts:
    """Those of a model of transformers that is built as BART and Whisper are, or as T5 is."""
    if hasattr(model, "model"):
        layers = model.model.decoder.layers
        return Parts(
            model.model.encoder,
            model.model.decoder,
            {f"model.decoder.layers.{index}.self_attn": layer.self_attn for index, layer in enumerate(layers)},
            [layer.encoder_attn for layer in layers],
        )
    blocks = [block.layer for block in model.decoder.block]
    return Parts(
        model.encoder,
        model.decoder,
        {f"decoder.block.{index}.layer.0.SelfAttention": block[0].SelfAttention for index, block in enumerate(blocks)},
        [block[1].EncDecAttention for block in blocks],
        ("q", "k", "v", "o"),
        "key_value_proj_dim",
    )


class Biases:
    """What a decoder's layers add to the scores of tokens before by their distance (T5, Raffel et al., 2020).

    It follows from weights, as transformers' modules compute it, and is made anew where these change.

    Attributes:
        tables: By layer, (heads, distances) float32, or None. A layer without weights of its own has that of the one
            before.

    Args:
        parts: Of the model, with its weights.
        distances: How many it tells apart; 0 without.
    """

    def __init__(self, parts: Parts, distances: int) -> None:
        self._made: list[tuple[Any, torch.Tensor]] = []
        self._distances = distances
        self.tables: list[torch.Tensor | None] = []
        for module in parts.own.values():
            if distances and module.has_relative_attention_bias:
                self._made.append((module, self._of(module)))
            self.tables.append(self._made[-1][1] if self._made else None)

    def refresh(self) -> None:
        """Makes the tables of what the weights are now."""
        with torch.inference_mode():
            for module, table in self._made:
                table.copy_(self._of(module))

    def _of(self, module: Any) -> torch.Tensor:
        with torch.inference_mode():  # of tokens so many places behind a single one
            found: torch.Tensor = module.compute_bias(self._distances, 1)[0, :, :, 0].float().contiguous()
        return found
