"""Files of videos: which frames are taken of them, and what is refused before it is decoded."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncengine import InvalidRequestError, Video
from asyncengine.model.media import video_file
from asyncengine.model.media.frames import Frames, Stated
from asyncengine.model.media.processor import processor
from asyncengine.model.media.video_preparation import VideoPreparation
from asyncengine.waiting import NobodyWaits
from tests.model.media.checkpoints import loaded
from tests.model.media.filmed import av, file_of, ramp, turned
from tests.model.media.test_videos import engine, greedy

pytestmark = pytest.mark.loops("either")

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
        (FILE[:600], "damaged or no file that is read here|can be decoded"),
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
    with pytest.raises(InvalidRequestError, match="in a codec that FFmpeg does not know, which is not decoded here"):
        taken(file_of(ramp(3), codec="libvpx-vp9", format="matroska").replace(b"V_VP9", b"V_XYZ"), 0)


@pytest.mark.parametrize("format", ["nut", "flv"])
def test_what_is_in_a_format_that_is_not_read_here(format: str) -> None:
    with pytest.raises(InvalidRequestError, match="no file that is read here"):
        taken(file_of(ramp(3), format=format), 0)


def test_a_frame_that_is_not_there() -> None:
    with pytest.raises(InvalidRequestError, match="a video is damaged: 24 of its 24 frames can be decoded"):
        taken(FILE, 0, 24)


def test_packets_of_which_nothing_is_to_be_shown_are_not_counted() -> None:
    """As a film has that was cut without being encoded again."""
    sizes = [(9, True), (9, False), (9, False), (0, False)]
    packets = [type("Packet", (), {"size": size, "is_discard": discard})() for size, discard in sizes]
    container = type("Container", (), {"demux": lambda self, stream: iter(packets)})()
    assert video_file._count(container, None) == 2


def test_packets_without_a_frame_are_no_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some files have such packets, at the end, say; frames are chosen among those that there are."""
    monkeypatch.setattr(video_file, "_count", lambda *given: 26)
    found = video_file.decoded(Video(FILE), lambda stated, video: [0, stated.frames - 1])
    assert found.of.frames == 24
    assert found.indices == [0, 23]
    assert found.shown[1, 40, 8].min() > 200


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


@pytest.mark.parametrize(
    ("said", "rate", "message"),
    [
        ({"fps": 1e9}, None, "a video's fps is 1e.09, in all more than the 1048576 frames that a file may have"),
        ({"num_frames": 1 << 31}, None, "2147483648 frames of a video are to be looked at"),
        ({}, 1e-7, "a video of 24 frames, 1e-07 in a second, is 2.4e.08 s long; allowed: 1048576"),
    ],
)
def test_what_is_asked_is_looked_at_before_any_frame_is_chosen(
    said: dict[str, Any], rate: float | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some processors list as many as they are asked for before they find that they are too many."""
    if rate is not None:
        stated = video_file.Stated
        monkeypatch.setattr(video_file, "Stated", lambda frames, fps, *size: stated(frames, rate, *size))
    with pytest.raises(InvalidRequestError, match=message):
        video_file.decoded(Video(FILE, **said), lambda stated, video: pytest.fail("frames were chosen"))


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


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("qwen3_vl", {}),
        ("qwen3_vl", {"fps": 4}),
        ("qwen3_vl", {"num_frames": 6}),
        ("qwen2_5_vl", {}),
        ("qwen2_5_vl", {"fps": 2.5}),
        ("qwen2_5_vl", {"num_frames": 4}),
    ],
)
async def test_which_frames_of_a_file_are_looked_at(
    architecture: str, said: dict[str, Any], sighted: Callable[..., Path]
) -> None:
    """As many as transformers takes of all frames."""
    path, every = sighted(architecture), taken(FILE, *range(24)).shown
    metadata = {"total_num_frames": 24, "fps": 8.0, "duration": 3.0, "width": 64, "height": 48}
    told = {"video_metadata": [metadata], "do_sample_frames": bool(said) or architecture == "qwen3_vl", **said}
    if "num_frames" in said:
        told["fps"] = None  # the processor has one, and wants one of the two
    prepares = processor(path)
    wanted = prepares(text=["<|video_pad|>"], videos=[every], videos_kwargs=told, return_tensors="pt")
    if not told["do_sample_frames"]:
        prepares.video_processor.fps = 2.0  # which it does not look at, as it does not choose
    preparation = VideoPreparation(prepares, loaded(path).config, prepares.tokenizer.encode)
    found = preparation.prepared([Video(FILE, **said)], range(1))
    assert torch.equal(found.inputs["video_grid_thw"], wanted["video_grid_thw"])
    assert torch.equal(found.inputs["pixel_values_videos"], wanted["pixel_values_videos"])
    assert prepares.tokenizer.encode("".join(found.texts)) == wanted["input_ids"][0].tolist()


async def test_what_is_said_of_a_file_is_what_is_said_of_its_frames(
    sighted: Callable[..., Path], tmp_path: Path
) -> None:
    path = sighted("qwen3_vl")
    (tmp_path / "film.mp4").write_bytes(FILE)
    chosen = np.linspace(0, 23, 6).round().astype(int)
    shown = taken(FILE, *chosen)
    part = {"type": "video", "video": tmp_path / "film.mp4"}
    messages = [{"role": "user", "content": [{"type": "text", "text": "See "}, part]}]
    given = processor(path)(
        text=["user: See <|vision_start|><|video_pad|><|vision_end|>\nassistant: "],
        videos=[shown.shown],
        videos_kwargs={
            "video_metadata": [{"total_num_frames": 24, "fps": 8.0, "frames_indices": chosen.tolist()}],
            "do_sample_frames": False,
        },
        return_tensors="pt",
    )
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    wanted = loaded(path).generate(**given, **settings)[0, given["input_ids"].shape[1] :].tolist()
    async with engine(path, decoder_backend="transformers") as serving:
        found = await serving.chat(messages, greedy(6))
        assert list(found.token_ids) == wanted
        damaged = {"type": "video", "video": FILE[:600]}
        with pytest.raises(InvalidRequestError, match=r"videos\[1\]: a video is damaged"):
            await serving.chat([{"role": "user", "content": [part, damaged]}], greedy(1))


async def test_whoever_leaves_while_a_file_is_read_ends_that_and_leaves_nothing(
    sighted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, given_up, decoded = threading.Event(), threading.Event(), threading.Event(), video_file.decoded

    def slowly(*given: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        try:
            return decoded(*given)
        except NobodyWaits:
            given_up.set()
            raise

    monkeypatch.setattr(video_file, "decoded", slowly)
    messages = [{"role": "user", "content": [{"type": "video", "video": FILE}]}]
    async with engine(sighted("qwen3_vl"), decoder_backend="transformers") as serving:
        try:
            asking = asyncio.ensure_future(_asked(serving, messages))
            assert await asyncio.to_thread(begun.wait, 30)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        finally:
            go_on.set()
        assert await asyncio.to_thread(given_up.wait, 30)
        assert len(serving._thread.core.requests) == 0
        assert (await serving.chat(messages, greedy(1))).text is not None


async def _asked(serving: Any, messages: Any) -> Any:
    return await serving.chat(messages, greedy(1))
