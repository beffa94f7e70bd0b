"""Whatever a caller gives for a video, as those of its frames that are looked at. On worker threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncengine.errors import InvalidRequestError
from asyncengine.media import Video, VideoSource
from asyncengine.model.media.pictures import picture_of

MOST_PIXELS = 1 << 28
"""Of all frames of one video that are looked at, together."""
MOST_FRAMES = 1 << 12
"""That are looked at."""

MOST_SECONDS = 1 << 20
"""From the first frame of a video to the last: twelve days. Models count them in tokens' positions."""

_EXPECTED = (
    "expected bytes of a file, a pathlib.Path, a data: URL, a list of PIL images, a (frames, height, width, 3) array "
    "of uint8, or a Video of one of them"
)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Stated:
    """What a file says of its video, or a caller of frames.

    Attributes:
        frames: How many there are.
        fps: In a second.
        width: In pixels.
        height: In pixels.
    """

    frames: int
    fps: float
    width: int
    height: int


Choose = Callable[[Stated, Video], Sequence[int]]
"""Which of a file's frames are looked at, in ascending order."""


@dataclass(frozen=True, slots=True)
class Frames:
    """Those that are looked at.

    Attributes:
        shown: (frames, height, width, 3) they.
        indices: Which frames of the video they are.
        of: The video.
    """

    shown: Pixels
    indices: list[int]
    of: Stated


def frames_of(source: VideoSource, choose: Choose, usual_fps: float) -> Frames:
    """The frames of a video that are looked at: of a file those that are chosen, of frames all.

    Args:
        source: As a caller gives it.
        choose: Chooses of a file's.
        usual_fps: Of frames of which nothing is said.

    Raises:
        InvalidRequestError: It is no video, or too large, or there is nothing to decode it with.
    """
    video = source if isinstance(source, Video) else Video(source)
    if isinstance(video.source, (str, bytes, bytearray, memoryview, Path)):
        from asyncengine.model.media.video_file import decoded

        found: Frames = decoded(video, choose)
        return found
    shown = _given(video.source)
    if video.num_frames is not None:
        raise InvalidRequestError(f"a video has num_frames {video.num_frames}; of given frames, all are looked at")
    stated = Stated(len(shown), float(video.fps or usual_fps), shown.shape[2], shown.shape[1])
    check_length(stated)
    return Frames(shown, list(range(len(shown))), stated)


def check_size(frames: int, width: int, height: int) -> None:
    """Whether so many frames may be looked at.

    Raises:
        InvalidRequestError: They may not.
    """
    if not 0 < frames <= MOST_FRAMES:
        raise InvalidRequestError(f"{frames} frames of a video are to be looked at; allowed: 1..{MOST_FRAMES}")
    if not 0 < frames * width * height <= MOST_PIXELS:
        raise InvalidRequestError(
            f"{frames} frames of {width} x {height} pixels are to be looked at; allowed: {MOST_PIXELS} pixels together"
        )


def check_length(stated: Stated) -> None:
    """Whether a video may be so long.

    Raises:
        InvalidRequestError: It may not.
    """
    if (seconds := stated.frames / stated.fps) > MOST_SECONDS:
        raise InvalidRequestError(
            f"a video of {stated.frames} frames, {stated.fps:g} in a second, is {seconds:g} s long; allowed: "
            f"{MOST_SECONDS}"
        )


def _given(source: Any) -> Pixels:
    """(frames, height, width, 3) of frames as a caller gives them."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
            raise InvalidRequestError(f"a video is an array of {source.shape} {source.dtype}; {_EXPECTED}")
        check_size(*(source.shape[axis] for axis in (0, 2, 1)))
        return np.require(source, requirements=("C", "W"))  # torch warns of those that it may not write
    if not isinstance(source, (list, tuple)):
        raise InvalidRequestError(f"a video is {source!r:.80}; {_EXPECTED}")
    if not source:
        raise InvalidRequestError("a video has no frames")
    if len(source) > MOST_FRAMES:
        check_size(len(source), 1, 1)
    found: list[Pixels] = []
    for place, frame in enumerate(source):
        if isinstance(frame, (str, bytes, bytearray, memoryview, Path)):
            raise InvalidRequestError(f"a video's frame {place} is a file; {_EXPECTED}")
        try:
            found.append(np.asarray(picture_of(frame)))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"a video's frame {place}: {error}") from error
        height, width = found[-1].shape[:2]
        if (height, width) != found[0].shape[:2]:
            first = f"the first has {found[0].shape[1]} x {found[0].shape[0]}"
            raise InvalidRequestError(f"a video's frame {place} has {width} x {height} pixels, and {first}")
        if place == 0:
            check_size(len(source), width, height)
    return np.stack(found)
