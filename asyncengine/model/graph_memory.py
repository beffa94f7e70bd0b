"""How much memory of a device captured steps will take, reckoned from shapes before any is captured."""

from __future__ import annotations

from typing import Any

import torch

from asyncengine.model.buckets import Buckets
from asyncengine.model.memory import GraphReserve
from asyncengine.model.token_draw import FILTERED
from asyncengine.model.token_filters import HISTOGRAM_BYTES, SEARCH_ROWS

STEP_GRAPH, DRAW_GRAPH = 8 << 20, 1 << 20
"""Bytes of one graph beside its tensors: what the driver keeps of its launches, and what is lost to rounding."""


def reserve(
    text: Any, dtype: torch.dtype, sequences: int, draws: bool, tokens: int = 0, adapters: bool = False
) -> GraphReserve:
    """What the steps of a model and the draws behind them take.

    Each graph keeps its logits where it writes them. Everything else is in a pool that all share: the activations of
    the largest step, and what the largest draw works on.

    Args:
        text: The part of the model's configuration that is about text.
        dtype: Of weights and activations.
        sequences: Most sequences in one step.
        draws: Whether draws are captured, too.
        tokens: Most tokens in one step, if steps with prompts are captured, too.
        adapters: Whether steps with adapters are captured, too.
    """
    sizes, vocab, bytes_each = Buckets.upto(sequences).sizes, int(text.vocab_size), dtype.itemsize
    mixed = Buckets.mixed(tokens).sizes if tokens else ()
    adapted = Buckets.doubling(sequences).sizes if adapters else ()
    rows = sum(sizes) + sum(min(size, sequences) for size in mixed) + sum(adapted)
    largest = max((*sizes, *mixed))
    shared = largest * activation_numbers(text) * bytes_each + (draw_bytes(sizes[-1], vocab) if draws else 0)
    drawn = len(sizes) * len(FILTERED) if draws else 0
    steps = len(sizes) + len(mixed) + len(adapted)
    return GraphReserve(rows * vocab * bytes_each + shared + steps * STEP_GRAPH + drawn * DRAW_GRAPH, steps + drawn)


def activation_numbers(text: Any) -> int:
    """How many numbers a layer has at hand for one token: around the attention, or in the MLP, whichever is more."""
    hidden = int(text.hidden_size)
    experts = int(getattr(text, "num_experts_per_tok", None) or 1)
    width = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * hidden
    return experts * (6 * hidden + 4 * int(width))


def draw_bytes(rows: int, vocab: int) -> int:
    """Bytes that a draw from (rows, vocab) logits works on: two float32 copies, and more of rows that are searched."""
    searched = max(28 * vocab, 12 * vocab + HISTOGRAM_BYTES)
    return 8 * rows * vocab + min(rows, SEARCH_ROWS) * searched
