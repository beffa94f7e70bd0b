"""Where images and audio stand in a prompt, and which tokens attend to later ones."""

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


def test_each_piece_has_the_id_of_its_kind_in_any_part_of_a_sequence() -> None:
    image = MediaItem("image", b"i", {}, np.array([1, 2]), 7)
    audio = MediaItem("audio", b"a", {}, np.array([4, 5, 7]), 9)
    media = PromptMedia((image, audio))
    sequence = np.array([50, -1, -1, 51, -2, -2, 52, -2, 53, 54], dtype=np.int32)
    wanted = [50, 7, 7, 51, 9, 9, 52, 9, 53, 54]
    for start in range(len(sequence)):
        assert media.plain(sequence[start:], start).tolist() == wanted[start:]
        assert media.plain(sequence[:start]).tolist() == wanted[:start]
    assert sequence[1] == -1
    assert (media.num_tokens("image"), media.num_tokens("audio"), media.kinds) == (2, 3, {"image", "audio"})
