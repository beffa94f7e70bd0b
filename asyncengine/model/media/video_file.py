"""Files of videos, decoded by FFmpeg as PyAV brings it. On worker threads.

What a file says of itself is checked before anything of it is decoded; how many frames it has is counted, since many
formats do not say so. Sound is passed over. Files may name others, as playlists do: no format that can is read, and
FFmpeg opens nothing itself.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from asyncengine.errors import InvalidRequestError
from asyncengine.media import Video
from asyncengine.model.media import pictures
from asyncengine.model.media.data_urls import data_of
from asyncengine.model.media.frames import Choose, Frames, Pixels, Stated, check_length, check_size
from asyncengine.waiting import check_awaited

FORMATS = ("mp4", "mov", "matroska", "webm", "avi", "mpegts", "mpeg")
"""FFmpeg's names of what is read."""
CODECS = (
    "h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mpeg2video", "mpeg1video",
    "h263", "mjpeg",
)  # fmt: skip
"""FFmpeg's names of what is decoded. It knows hundreds, at most of which nobody has looked for long."""
MOST_FILE_FRAMES = 1 << 20
"""Of a file."""
MOST_DECODED_PIXELS = 1 << 36
"""Of all frames up to the last that is looked at, since each is made of those before: half an hour at 1280 x 720."""

_OPTIONS = {
    "format_whitelist": ",".join(FORMATS),
    "protocol_whitelist": "none",
    "max_pixels": str(pictures.MOST_PIXELS),  # for what is decoded to find out what is in the file
}


def decoded(video: Video, choose: Choose) -> Frames:
    """The frames of a file that are looked at.

    Args:
        video: Whose source is a file.
        choose: Chooses them.

    Raises:
        InvalidRequestError: It is damaged, too large or no video, or PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise InvalidRequestError("a video is a file, and PyAV is not installed; the extra 'videos' brings it")
    import av

    try:
        with _opened(video.source) as file, av.open(file, "r", options=_OPTIONS, metadata_errors="ignore") as container:
            return _taken(container, video, choose)
    except InvalidRequestError:
        raise
    except av.FFmpegError as error:
        raise InvalidRequestError(f"a video is damaged or no file that is read here: {error.strerror}") from error
    except Exception as error:  # of the file system, say
        raise InvalidRequestError(f"a video cannot be read: {error}") from error


@contextmanager
def _opened(source: Any) -> Iterator[Any]:
    if isinstance(source, Path):
        with source.open("rb") as file:  # FFmpeg would take its name for a URL
            yield file
    elif isinstance(source, str):
        yield io.BytesIO(data_of(source, "a video", "video"))
    else:
        yield io.BytesIO(source)


def _taken(container: Any, video: Video, choose: Choose) -> Frames:
    stream = container.streams.best("video")
    if stream is None:
        raise InvalidRequestError("a video's file has no video in it")
    codec = stream.codec_context
    if (name := getattr(codec, "name", "a codec that FFmpeg does not know")) not in CODECS:
        raise InvalidRequestError(f"a video is in {name}, which is not decoded here")
    width, height = codec.width, codec.height
    if not 0 < width * height <= pictures.MOST_PIXELS:
        raise InvalidRequestError(f"a video has {width} x {height} pixels; allowed: 1..{pictures.MOST_PIXELS}")
    count = _count(container, stream)
    rate = stream.average_rate or stream.guessed_rate
    if not rate or rate <= 0:
        raise InvalidRequestError("a video's file does not say how many frames it has in a second")
    codec.thread_count = 1
    codec.options = {"max_pixels": _OPTIONS["max_pixels"]}
    for _ in range(2):
        stated = Stated(count, float(rate), width, height)
        _check_asked(stated, video)
        indices = [int(index) for index in choose(stated, video)]
        check_size(len(indices), width, height)
        if (last := indices[-1] + 1) * width * height > MOST_DECODED_PIXELS:
            raise InvalidRequestError(
                f"a video has {last} frames of {width} x {height} pixels; allowed: {MOST_DECODED_PIXELS} pixels"
            )
        container.seek(0)
        shown, number = _shown(container.decode(stream), indices, (width, height))
        if shown is not None:
            height, width = shown.shape[1:3]  # it may have been lying on its side
            return Frames(shown, indices, Stated(count, float(rate), width, height))
        if not 0 < number < count:
            break
        count = number  # of some packets, nothing is shown
    raise InvalidRequestError(f"a video is damaged: {number} of its {count} frames can be decoded")


def _check_asked(stated: Stated, video: Video) -> None:
    """Whether frames may be chosen. Processors list as many as they are asked for before they find them too many.

    Raises:
        InvalidRequestError: The video is too long, or more of its frames are asked for than it may have.
    """
    check_length(stated)
    if video.num_frames is not None:
        check_size(video.num_frames, 1, 1)
    if video.fps is not None and stated.frames / stated.fps * video.fps > MOST_FILE_FRAMES:
        raise InvalidRequestError(
            f"a video's fps is {video.fps:g}, in all more than the {MOST_FILE_FRAMES} frames that a file may have"
        )


def _count(container: Any, stream: Any) -> int:
    """Packets of a file, of which most have a frame; it is read for that, but not decoded."""
    count = 0
    for packet in container.demux(stream):
        check_awaited()
        count += packet.size > 0 and not packet.is_discard
        if count > MOST_FILE_FRAMES:
            raise InvalidRequestError(f"a video has more than {MOST_FILE_FRAMES} frames")
    return count


def _shown(decoding: Iterator[Any], indices: Sequence[int], size: tuple[int, int]) -> tuple[Pixels | None, int]:
    """(frames, height, width, 3) those of a file that are looked at, upright; None if it ends before. And how many
    frames were decoded.

    Args:
        decoding: All of them, in their order.
        indices: Which of them, in ascending order.
        size: Width and height that the file says they have.

    Raises:
        InvalidRequestError: One of them has another size.
    """
    left, found, place = list(reversed(indices)), np.empty((0, 0, 0, 3), dtype=np.uint8), -1
    for place, frame in enumerate(decoding):
        check_awaited()
        if (frame.width, frame.height) != size:
            own = f"{frame.width} x {frame.height}"
            raise InvalidRequestError(f"a video's frame {place} has {own} pixels; its file says {size[0]} x {size[1]}")
        if left and left[-1] == place:
            turns = round(frame.rotation / 90) % 4
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), turns)
            if not len(found):
                found = np.empty((len(indices), *pixels.shape), dtype=np.uint8)
            while left and left[-1] == place:
                found[len(indices) - len(left)] = pixels
                left.pop()
        if not left:
            return found, place + 1
    return None, place + 1
