"""Which tokens of a prompt attend to later ones, where those of an image attend to all of it."""

from __future__ import annotations

import numpy as np
import pytest

from asyncengine.media import MediaItem, PromptMedia


def prompt(*places: list[int], whole: bool = True) -> PromptMedia:
    return PromptMedia(tuple(MediaItem("image", b"", {}, np.array(each), 7, whole) for each in places))


@pytest.mark.parametrize(
    ("places", "runs"),
    [([3], [[3, 4]]), ([3, 4, 5], [[3, 6]]), ([0, 1, 4, 7, 8, 9], [[0, 2], [4, 5], [7, 10]])],
)
def test_runs_are_what_has_no_other_token_in_it(places: list[int], runs: list[list[int]]) -> None:
    assert MediaItem("image", b"", {}, np.array(places), 7).runs.tolist() == runs


def test_tokens_of_a_run_reach_to_its_end_and_others_to_themselves() -> None:
    images = prompt([1, 2, 5, 6], [7, 8])
    assert images.reach(0, 10).tolist() == [1, 3, 3, 4, 5, 7, 7, 9, 9, 10]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("start", "end", "reach"), [(2, 7, [3, 4, 5, 7, 7]), (6, 12, [7, 9, 9, 10, 11, 12]), (3, 5, None), (9, 12, None)]
)
def test_of_a_part_of_the_prompt(start: int, end: int, reach: list[int] | None) -> None:
    found = prompt([1, 2, 5, 6], [7, 8]).reach(start, end)
    assert (None if found is None else found.tolist()) == reach


def test_where_no_token_attends_to_later_ones() -> None:
    assert prompt([1, 2], whole=False).reach(0, 4) is None
    assert prompt().reach(0, 4) is None
