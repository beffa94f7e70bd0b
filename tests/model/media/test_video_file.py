"""Files of videos: which frames are taken of them, and what is refused before it is decoded."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncengine import InvalidRequestError, Video
from asyncengine.model.media import video_file
from asyncengine.model.media.frames import Frames, Stated
from tests.model.media.filmed import av, file_of, ramp, turned

FILE = file_of(ramp(24), sound=True)


def choosing(*indices: int) -> Any:
    return lambda stated, video: list(indices)


def taken(source: Any, *indices: int) -> Frames:
    return video_file.decoded(Video(source), choosing(*indices))


def test_forms_of_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "https:film").write_bytes(FILE)
    url = f"data:video/mp4;base64,{base64.b64encode(FILE).decode()}"
    for source in (FILE, bytearray(FILE), memoryview(FILE), tmp_path / "https:film", url):
        found = taken(source, 0, 5, 5, 23)
        assert found.of == Stated(24, 8.0, 64, 48)  # its sound is passed over
        assert found.indices == [0, 5, 5, 23]
        assert found.shown.shape == (4, 48, 64, 3)
        assert np.abs(found.shown[:, 40, 8].astype(int) - ramp(24)[[0, 5, 5, 23], 40, 8]).max() <= 6


@pytest.mark.parametrize(
    ("codec", "format"), [("libvpx-vp9", "webm"), ("libvpx", "matroska"), ("mpeg4", "avi"), ("mpeg2video", "mpegts")]
)
def test_other_formats(codec: str, format: str) -> None:
    found = taken(file_of(ramp(12), 25, codec, format), 0, 3, 11)
    assert found.of == Stated(12, 25.0, 64, 48)
    assert np.abs(found.shown[:, 40, 8].astype(int) - ramp(12)[[0, 3, 11], 40, 8]).max() <= 8


def test_what_lies_on_its_side_is_turned_upright() -> None:
    found = taken(turned(FILE), 23)
    assert (found.of.width, found.of.height) == (48, 64)
    assert found.shown.shape == (1, 64, 48, 3)
    assert found.shown[0, 8, 40].max() < 20  # the upper half is at the right now
    assert found.shown[0, 8, 8].min() > 200


def test_a_file_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(FILE)
    for index in (0, 99):
        try:
            taken(tmp_path / "film.mp4", index)
        except InvalidRequestError:
            assert index == 99
    opened = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if name.isdigit()
              and os.path.exists(f"/proc/self/fd/{name}")] if os.path.isdir("/proc/self/fd") else []  # fmt: skip
    assert not any("film.mp4" in name for name in opened)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "damaged or no file that is read here"),
        (b"no video at all" * 100, "damaged or no file that is read here"),
        (FILE[:600], "damaged or no file that is read here|cannot be decoded"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "no file that is read"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "no file that is read here"),
        ("data:video/mp4;base64,!!!", "a video's data: URL is not base64"),
        ("https://example.org/film.mp4", "nothing is fetched"),
        ("film.mp4", "nothing is fetched"),
        (Path("/nowhere/film.mp4"), "a video cannot be read: .*No such file"),
        (Path("/"), "a video cannot be read: .*Is a directory"),
    ],
)
def test_what_is_no_video(source: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        taken(source, 0)


def test_a_playlist_opens_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(FILE)
    for listed in (f"ffconcat version 1.0\nfile 'file:{tmp_path}/film.mp4'\n", f"#EXTM3U\n{tmp_path}/film.mp4\n"):
        (tmp_path / "list").write_text(listed)
        with pytest.raises(InvalidRequestError, match="no file that is read here"):
            taken(tmp_path / "list", 0)


def test_sound_alone_is_no_video() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        heard = container.add_stream("aac", rate=16000)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 16000
        container.mux(heard.encode(tone))
        container.mux(heard.encode(None))
    with pytest.raises(InvalidRequestError, match="has no video in it"):
        taken(out.getvalue(), 0)


def test_what_is_in_a_codec_that_is_not_decoded_here() -> None:
    file = file_of(ramp(3), codec="ffv1", format="matroska")
    with pytest.raises(InvalidRequestError, match="a video is in ffv1, which is not decoded here"):
        taken(file, 0)


def test_a_frame_that_is_not_there() -> None:
    with pytest.raises(InvalidRequestError, match="a video is damaged: its frame 24 cannot be decoded"):
        taken(FILE, 0, 24)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_file, "_shown", lambda *given: pytest.fail("it was decoded"))
    with monkeypatch.context() as patch:
        patch.setattr(video_file.pictures, "MOST_PIXELS", 64 * 48 - 1)
        with pytest.raises(InvalidRequestError, match=r"a video has 64 x 48 pixels; allowed: 1\.\.3071"):
            taken(FILE, 0)
    with monkeypatch.context() as patch:
        patch.setattr(video_file, "MOST_FILE_FRAMES", 23)
        with pytest.raises(InvalidRequestError, match="a video has more than 23 frames"):
            taken(FILE, 0)
    with monkeypatch.context() as patch:
        patch.setattr(video_file, "MOST_DECODED_PIXELS", 64 * 48 * 20)
        with pytest.raises(InvalidRequestError, match="a video has 21 frames of 64 x 48 pixels; allowed: 61440 pixels"):
            taken(FILE, 0, 20)
    with pytest.raises(InvalidRequestError, match="5000 frames of a video are to be looked at"):
        taken(FILE, *[0] * 5000)


def test_a_file_that_lies_about_its_size() -> None:
    """FFmpeg itself allows no larger pictures than the limit, and none may have another size than is stated."""
    frames = iter([type("Frame", (), {"width": 8000, "height": 8000})()])
    with pytest.raises(InvalidRequestError, match="frame 0 has 8000 x 8000 pixels; its file says 64 x 48"):
        video_file._shown(frames, [0], (64, 48))
    limit = dict(video_file._OPTIONS, max_pixels="3000")
    with av.open(io.BytesIO(FILE), options=limit) as container:
        container.streams.video[0].codec_context.options = {"max_pixels": "3000"}
        with pytest.raises(av.FFmpegError):
            next(container.decode(video=0))
