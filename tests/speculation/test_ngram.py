"""Drafts from the text itself."""

from __future__ import annotations

import numpy as np
import pytest

from asyncengine.speculation.ngram import continued


def guess(tokens: list[int], length: int) -> list[int]:
    found: list[int] = continued(np.array(tokens, dtype=np.int32), length).tolist()
    return found


@pytest.mark.parametrize(
    ("tokens", "length", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, [4]),  # the newest
        ([9, 1, 2, 3, 7, 1, 2, 4, 9, 1, 2], 1, [3]),  # the longest before the newest
        ([1, 2, 3, 4], 4, []),
        ([1, 5, 1], 4, []),  # a single token is not enough
        ([7], 4, []),
        ([3, 3, 3], 4, [3, 3, 3, 3]),
        ([8, 1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # it goes on with its period
    ],
)
def test_what_followed_the_same_tokens_is_guessed(tokens: list[int], length: int, expected: list[int]) -> None:
    assert guess(tokens, length) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, -7, -7, 4, 1, 2], [3]),  # up to an image, from there on nothing is known
        ([1, 2, -7, -7, 4, 1, 2], []),
        ([-7, -7, 1, 4, 5, -7, -7, 1], [4, 5]),  # what came behind the same image
    ],
)
def test_pieces_of_images_are_never_guessed(tokens: list[int], expected: list[int]) -> None:
    assert guess(tokens, 4) == expected
