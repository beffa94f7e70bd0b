"""Beam search told naively: whole texts in lists, as transformers describes it."""

from __future__ import annotations

import functools

import numpy as np

from asyncengine.instructions import NewRequest
from asyncengine.testing.scripted import guesses

from .core_case import EOS

Text = tuple[float, tuple[int, ...]]
"""A score, and the tokens."""


def found_by(new: NewRequest, most: int) -> list[list[int]]:
    """The best texts that a search over the scripted model's guesses finds, as many as the request has branches.

    Where there are fewer, empty ones are behind them.

    Args:
        new: The request.
        most: Most tokens of a text.
    """
    search = new.params.search
    assert search is not None
    stops = (*new.params.stop_token_ids,)
    return _found(
        tuple(new.prompt.tolist()), search.num_beams, search.length_penalty, search.early_stopping, stops,
        new.params.min_tokens, most, new.params.n,
    )  # fmt: skip


@functools.cache
def _found(
    prompt: tuple[int, ...],
    width: int,
    penalty: float,
    early: object,
    stops: tuple[int, ...],
    least: int,
    most: int,
    n: int,
) -> list[list[int]]:
    beams: list[Text] = [(0.0, ())]
    complete: list[Text] = []
    for length in range(1, most + 1):
        grown = [
            (float(np.float32(total) + np.float32(logprob)), (*text, token))
            for total, text in beams
            for token, logprob in guesses([*prompt, *text], EOS)
            if token not in stops or length > least
        ]
        grown.sort(key=lambda each: -each[0])
        for place, (total, text) in enumerate(grown[: width * max(2, 1 + len(stops))]):
            if place < width and (text[-1] in stops or length == most):
                complete.append((float(np.float32(total) / np.float32(length**penalty)), text))
        complete = sorted(complete, key=lambda each: -each[0])[:width]
        beams = [each for each in grown if each[1][-1] not in stops][:width]
        if len(complete) == width:
            ahead = most if early == "never" and penalty > 0 else length
            if early is True or np.float32(beams[0][0]) / np.float32(ahead**penalty) <= np.float32(complete[-1][0]):
                break
    return [list(text) for _, text in complete[:n]] + [[]] * (n - len(complete))
