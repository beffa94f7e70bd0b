"""Frames of videos as callers give them."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from PIL import Image

from asyncengine import InvalidRequestError, Video
from asyncengine.model.media.frames import frames_of

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 8, 10, 3), dtype=np.uint8)


FIXED = FRAMES.copy()
FIXED.flags.writeable = False


def taken(source: Any) -> Any:
    return frames_of(source, lambda stated, video: pytest.fail("of given frames, none are chosen"), 2.0)


@pytest.mark.parametrize(
    "source",
    [FRAMES, list(FRAMES), tuple(Image.fromarray(frame) for frame in FRAMES), FRAMES[:, ::-1][:, ::-1], FIXED],
    ids=["array", "arrays", "pictures", "view", "read-only"],
)
def test_forms_of_the_same_frames(source: Any) -> None:
    for video, fps in ((source, 2.0), (Video(source), 2.0), (Video(source, fps=12.5), 12.5)):
        found = taken(video)
        assert np.array_equal(found.shown, FRAMES)
        assert found.shown.flags.c_contiguous and found.shown.flags.writeable
        assert found.indices == [0, 1, 2]
        assert (found.of.frames, found.of.fps, found.of.width, found.of.height) == (3, fps, 10, 8)


def test_a_file_without_what_decodes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "av" else found(name, *more))
    with pytest.raises(InvalidRequestError, match="PyAV is not installed; the extra 'videos' brings it"):
        taken(b"a file")


def test_frames_are_made_rgb() -> None:
    found = taken([Image.new("L", (4, 4), 7), Image.new("RGB", (4, 4), (7, 7, 7))])
    assert found.shown.shape == (2, 4, 4, 3)
    assert (found.shown == 7).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "a video has no frames"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"0 frames of a video are to be looked at; allowed: 1\.\.4096"),
        (7, "a video is 7; expected bytes of a file"),
        ({"url": "x"}, "a video is {'url': 'x'}; expected"),
        (Image.new("L", (4, 4)), "a video is <PIL.Image"),
        (np.zeros((4, 8, 8)), r"a video is an array of \(4, 8, 8\) float64"),
        (np.zeros((4, 8, 8, 3)), r"a video is an array of \(4, 8, 8, 3\) float64"),
        (np.zeros((4, 8, 8, 4), np.uint8), r"a video is an array of \(4, 8, 8, 4\) uint8"),
        ([FRAMES[0], FRAMES[0, 1:]], "frame 1 has 10 x 7 pixels, and the first has 10 x 8"),
        ([b"x"], "a video's frame 0 is a file"),
        ([FRAMES[0], Image.new("F", (10, 8))], "a video's frame 1: an image has numbers of mode 'F'"),
        ([Image.new("1", (1, 1))] * 5000, r"5000 frames of a video are to be looked at; allowed: 1\.\.4096"),
        ([Image.new("1", (3000, 3000))] * 30, "30 frames of 3000 x 3000 pixels .* allowed: 268435456 pixels together"),
        (Video(FRAMES, num_frames=2), "num_frames 2; of given frames, all are looked at"),
        (Video(FRAMES, fps=1e-9), "a video of 3 frames, 1e-09 in a second, is 3e.09 s long; allowed: 1048576"),
    ],
)
def test_what_are_no_frames(source: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        taken(source)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"fps": 0}, "fps is 0; expected frames in a second"),
        ({"fps": "2"}, "fps is '2'"),
        ({"fps": True}, "fps is True"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": 10**400}, "fps is 1000"),
        ({"num_frames": 0}, "num_frames is 0; expected 1 or more"),
        ({"num_frames": 2.0}, "num_frames is 2.0"),
        ({"num_frames": 2, "fps": 1}, "has fps 1 and num_frames 2; allowed: one of them"),
        ({"source": Video(FRAMES)}, "source is another Video"),
    ],
)
def test_what_is_said_of_frames(said: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Video(**({"source": FRAMES} | said))
