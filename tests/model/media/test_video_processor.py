"""Video processors without torchvision: the same numbers as with it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.video_utils import VideoMetadata

from asyncengine.model.media.processor import processor, without_torchvision
from asyncengine.model.media.qwen2_videos import Qwen2VLVideoProcessor
from asyncengine.model.media.video_processor import VideoSettings, over_torch, resized, video_processor
from tests.model.media.checkpoints import film

WITH_TORCHVISION = importlib.util.find_spec("torchvision") is not None
needs_torchvision = pytest.mark.skipif(not WITH_TORCHVISION, reason="needs torchvision")


def made(processor: Any, frames: Any, **more: Any) -> Any:
    return processor(videos=[frames], do_sample_frames=False, return_tensors="pt", **more)


def test_frames_are_resized_nearly_as_pillow_does() -> None:
    frames = torch.from_numpy(film(0, 2, 48, 32).frames).permute(0, 3, 1, 2).contiguous()
    for mode, filter in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        found = resized(frames, (24, 20), mode)
        assert found.dtype == torch.uint8
        for frame, small in zip(frames, found, strict=True):
            whole = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((20, 24), filter)
            off = np.abs(np.asarray(whole).astype(int) - small.permute(1, 2, 0).numpy())
            assert off.max() <= 1
    assert resized(frames, (32, 48), "bicubic") is frames


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen3_vl"])
def test_a_video_of_one_picture_is_as_the_picture(architecture: str, sighted: Callable[..., Path]) -> None:
    """In these models, an image is two frames that are the same."""
    prepares = without_torchvision(type(processor(sighted(architecture))), sighted(architecture))
    picture = film(0, 1, 48, 40).frames[0]
    seen = prepares.image_processor(images=[Image.fromarray(picture)], return_tensors="pt")
    alike = {name: getattr(prepares.image_processor, name) for name in ("image_mean", "image_std")}
    size = {"shortest_edge": 256, "longest_edge": 10000}
    shown = made(prepares.video_processor, np.stack([picture] * 2), size=size, **alike)
    assert shown["video_grid_thw"].tolist() == seen["image_grid_thw"].tolist()
    assert (shown["pixel_values_videos"] - seen["pixel_values"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("told", "frames", "wanted"),
    [
        ({}, 10, [*range(10)]),
        ({"num_frames": 4}, 10, [0, 2, 5, 7]),
        ({"num_frames": 5}, 10, [0, 2, 5, 7]),
        ({"fps": 2.0}, 60, [0, 15, 30, 45]),
        ({"fps": 0.1}, 60, [0, 15, 30, 45]),
        ({"fps": 30.0}, 7, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_which_frames_qwen2_looks_at(told: dict[str, Any], frames: int, wanted: list[int]) -> None:
    """Whole temporal patches of two, at least four frames (30 in a second)."""
    own = over_torch(Qwen2VLVideoProcessor)()
    found = own.sample_frames(VideoMetadata(total_num_frames=frames, fps=30.0), **told).tolist()
    assert len(found) == len(wanted)
    assert np.abs(np.array(found) - wanted).max() <= 1
    with pytest.raises(ValueError, match="12 frames are wanted of a video that has 10"):
        own.sample_frames(VideoMetadata(total_num_frames=10, fps=30.0), num_frames=12)


def test_older_files_name_what_prepares_images(sighted: Callable[..., Path], tmp_path: Path) -> None:
    path = shutil.copytree(sighted("qwen2_5_vl"), tmp_path / "older")
    settings = json.loads((path / "processor_config.json").read_text())
    for name in ("image_processor", "video_processor"):
        settings.pop(name)
    (path / "processor_config.json").write_text(json.dumps(settings))
    of_images = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "max_pixels": 2560}
    (path / "preprocessor_config.json").write_text(json.dumps(of_images))
    found = video_processor(path)
    assert isinstance(found, Qwen2VLVideoProcessor)
    assert (found.patch_size, found.size["longest_edge"]) == (4, 2560)


def test_what_is_not_to_be_had_says_why(sighted: Callable[..., Path], tmp_path: Path) -> None:
    path = shutil.copytree(sighted("qwen3_vl"), tmp_path / "another")
    settings = json.loads((path / "processor_config.json").read_text())
    settings["video_processor"]["video_processor_type"] = "NoSuchVideoProcessor"
    (path / "processor_config.json").write_text(json.dumps(settings))
    found = video_processor(path)
    assert isinstance(found, VideoSettings)
    assert found.refusal == "NoSuchVideoProcessor needs torchvision, of the same build as torch"
    assert found.patch_size == 4
    assert found.fps is None
    assert video_processor(tmp_path).refusal == "its checkpoint has no settings of a video processor"


@needs_torchvision
@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "glm4v"])
@pytest.mark.parametrize("size", [(48, 32), (97, 61), (20, 70)])
def test_the_numbers_are_those_of_torchvision(
    architecture: str, size: tuple[int, int], sighted: Callable[..., Path]
) -> None:
    path, frames = sighted(architecture), film(0, 5, *size).frames
    own, theirs = video_processor(path), processor(path).video_processor
    assert type(theirs).__module__.startswith("transformers.")
    found, wanted = made(own, frames), made(theirs, frames)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(wanted[name])) for name in wanted)


@needs_torchvision
@pytest.mark.parametrize("told", [{}, {"num_frames": 6}, {"fps": 1.5}, {"fps": 60.0}])
@pytest.mark.parametrize("frames", [5, 40, 301])
def test_frames_are_chosen_as_transformers_does(told: dict[str, Any], frames: int) -> None:
    metadata = VideoMetadata(total_num_frames=frames, fps=29.97)
    wanted: Any
    try:
        wanted = transformers.Qwen2VLVideoProcessor().sample_frames(metadata, **told).tolist()
    except (ValueError, TypeError):
        wanted = None if told else [*range(frames)]
    try:
        found = over_torch(Qwen2VLVideoProcessor)().sample_frames(metadata, **told).tolist()
    except ValueError:
        found = None
    assert found == wanted
