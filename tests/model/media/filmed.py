"""Files of videos, encoded by PyAV."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="needs PyAV")


def ramp(frames: int, width: int = 64, height: int = 48) -> Any:
    """(frames, height, width, 3): each is lighter than the one before, and its upper half is dark."""
    found = np.zeros((frames, height, width, 3), dtype=np.uint8)
    found[:, height // 2 :] = (np.arange(frames) * 240 // frames)[:, None, None, None]
    return found


def file_of(
    frames: Any, fps: int = 8, codec: str = "libx264", format: str = "mp4", sound: bool = False, times: Any = None
) -> bytes:
    """A file with frames, and with a sound beside them.

    Args:
        frames: (frames, height, width, 3).
        fps: In a second.
        codec: FFmpeg's name of the encoder.
        format: FFmpeg's name of the container.
        sound: Whether there is one.
        times: At which of the `fps` each frame is shown; at each if None.
    """
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        pictures = container.add_stream(codec, rate=fps)
        pictures.width, pictures.height, pictures.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        heard = container.add_stream("aac", rate=16000) if sound else None
        for place, frame in enumerate(frames):
            shown = av.VideoFrame.from_ndarray(frame, format="rgb24")
            shown.pts = place if times is None else times[place]
            container.mux(pictures.encode(shown))
        container.mux(pictures.encode(None))
        if heard is not None:
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            tone.sample_rate = 16000
            container.mux(heard.encode(tone))
            container.mux(heard.encode(None))
    return out.getvalue()


def turned(file: bytes) -> bytes:
    """An MP4 file that says that its pictures are to be turned clockwise, as telephones write them."""
    at = file.index(b"tkhd") + 4 + 40  # the matrix of the version 0 of a track's header
    one, minus = (0x00010000).to_bytes(4, "big"), (0xFFFF0000).to_bytes(4, "big")
    matrix = bytes(4) + one + bytes(4) + minus + bytes(16) + (1 << 30).to_bytes(4, "big")
    return file[:at] + matrix + file[at + 36 :]
