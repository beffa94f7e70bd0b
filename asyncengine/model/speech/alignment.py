"""When each token of a text is said, by what it attends to in the audio. On worker threads; arrays, no torch.

This is openai-whisper's way (``whisper/timing.py``): some heads of the decoder look at what is being said. Their
weights are normalised and filtered, and the way through (tokens, frames) along which they are largest, on which both
only go forward, is found by dynamic time warping (Sakoe and Chiba, 1978). A token is said up to the frame in which the
next one begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import WhisperConfig

from asyncengine.step.batch import Float32, Float64, Int64

_ROWS = 32
"""Rows that are filtered at once: as many as a processor keeps at hand."""


def alignment_heads(generation: Any, config: WhisperConfig) -> tuple[dict[int, list[int]], str]:
    """The heads that look at what is being said, and why they are not known, in words; one of both is empty.

    Args:
        generation: What the model's checkpoint says of generating.
        config: The model's.

    Returns:
        By layer, its heads.
    """
    name, stated = "alignment_heads of its generation_config.json", getattr(generation, "alignment_heads", None)
    if not stated:
        return {}, f"there are no {name}"
    found: dict[int, list[int]] = {}
    for each in stated:
        try:
            layer, head = map(int, each)
        except (TypeError, ValueError):
            return {}, f"{name} have {each!r:.40}; expected a layer and a head"
        if not (0 <= layer < config.decoder_layers and 0 <= head < config.decoder_attention_heads):
            return {}, (
                f"{name} have {each!r:.40}; there are {config.decoder_layers} layers of "
                f"{config.decoder_attention_heads} heads"
            )
        found.setdefault(layer, []).append(head)
    return found, ""


def token_ends(attention: Sequence[Float32], width: int) -> Int64:
    """(tokens,) the frame in which each token has been said, and the next one begins.

    Args:
        attention: (heads, tokens, frames) each, one behind the other, how much heads attend to each frame.
        width: Of the filter, in frames; an odd number.
    """
    weights = np.concatenate(attention, axis=1)
    matrix = np.zeros(weights.shape[1:])
    for head in weights:
        head = head - head.mean(axis=0)
        spread = head.std(axis=0)
        head /= np.where(spread > 0, spread, 1)  # where none of the tokens looks at a frame, it says nothing
        matrix += _median_filtered(head, width)
    return _first_frames(-matrix / len(weights))


def _median_filtered(rows: Float32, width: int) -> Float32:
    """The median of so many neighbours in (rows, frames), which are mirrored at their ends.

    Fewer frames than the filter looks ahead are left as they are, as transformers does.
    """
    half = width // 2
    frames = rows.shape[1]
    if frames <= half:
        return rows
    padded = np.pad(rows, ((0, 0), (half, half)), mode="reflect")
    found = np.empty_like(rows)
    for first in range(0, len(rows), _ROWS):
        some = padded[first : first + _ROWS]
        shifted = [some[:, at : at + frames].copy() for at in range(width)]
        lower = np.empty_like(shifted[0])
        for smallest in range(half + 1):  # the next smallest of all comes to its place
            for at in range(width - 1, smallest, -1):
                np.minimum(shifted[at], shifted[at - 1], out=lower)
                np.maximum(shifted[at], shifted[at - 1], out=shifted[at])
                shifted[at - 1], lower = lower, shifted[at - 1]
        found[first : first + _ROWS] = shifted[half]
    return found


def _first_frames(costs: Float64) -> Int64:
    """(tokens,) the frame in which the cheapest way through (tokens, frames) comes to each token.

    It goes from the first of both to the last, each time to the next token, the next frame, or both. What the cheapest
    ways to a token's frames cost depends on each other; but in sums over the frames it is a running minimum.
    """
    sums = np.cumsum(costs, axis=1)
    before = sums - costs
    ways = np.empty_like(costs)
    ways[0] = sums[0]
    for token in range(1, len(costs)):
        above = ways[token - 1]
        entered = np.append(above[0], np.minimum(above[1:], above[:-1])) - before[token]
        ways[token] = np.minimum.accumulate(entered) + sums[token]
    first = np.zeros(len(costs), dtype=np.int64)
    token, frame = len(costs) - 1, costs.shape[1] - 1
    while token:
        by_token = ways[token - 1, frame]
        by_both, by_frame = (ways[token - 1, frame - 1], ways[token, frame - 1]) if frame else (np.inf, np.inf)
        if by_frame <= min(by_token, by_both):
            frame -= 1
            continue
        first[token] = frame
        token -= 1
        if by_both <= by_token:
            frame -= 1
    return first
