"""transformers' video processors where torchvision is not installed: which frames are looked at, and as what numbers.

They take three operations from torchvision: an image is resized, mean and deviation are normalized, grey becomes RGB.
The first two are a few lines over torch, which give the same numbers, bit for bit; frames here are RGB. Processors
whose module itself imports torchvision are not to be had without it, but for that of Qwen2-VL, of which there is one
here.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers.image_processing_backends import TorchvisionBackend
from transformers.video_processing_utils import VideoProcessorMixin

_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Of `torch.nn.functional.interpolate`, by Pillow's numbers."""


class VideoSettings(VideoProcessorMixin):  # type: ignore[misc]
    """The settings of a video processor that is not to be had, of which those not told are None.

    Attributes:
        refusal: Why it is not, in words.
    """

    refusal = "its checkpoint has no settings of a video processor"

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class TorchBackend(TorchvisionBackend):  # type: ignore[misc]
    """torchvision's part in a video processor, by torch alone."""

    def resize(self, image: torch.Tensor, size: Any, resample: Any = None, **_: Any) -> torch.Tensor:
        """(..., channels, height, width) of bytes, to a height and a width.

        Raises:
            ValueError: It is asked for something else.
        """
        mode = _MODES.get(2 if resample is None else int(resample))
        if mode is None or not (size.height and size.width):
            raise ValueError(f"without torchvision, frames are not resized to {size} by filter {resample}")
        return resized(image, (size.height, size.width), mode)

    def normalize(
        self, image: torch.Tensor, mean: Iterable[float], std: Iterable[float], inplace: bool = False, **_: Any
    ) -> torch.Tensor:
        """(..., channels, height, width) of floats, less the mean of each channel and over its deviation."""
        mean, std = (torch.as_tensor(each, dtype=image.dtype).reshape(-1, 1, 1) for each in (mean, std))
        return (image.sub_(mean) if inplace else image.sub(mean)).div_(std)


class _InRgb:
    """Frames here are RGB before a processor sees them."""

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        return video


def video_processor(path: Path) -> Any:
    """The video processor of a checkpoint without torchvision, or its settings alone."""
    try:
        settings, _ = VideoSettings.get_video_processor_dict(path, local_files_only=True)
    except OSError:
        return VideoSettings()
    name = settings.get("video_processor_type")
    if name is None:  # older files have the name of what prepares images
        of_images = settings.get("image_processor_type") or "its video processor"
        name = of_images.removesuffix("Fast").replace("ImageProcessor", "VideoProcessor")
    try:
        return over_torch(_class(name)).from_pretrained(path, local_files_only=True)
    except (AttributeError, ImportError, NameError):
        found = VideoSettings.from_pretrained(path, local_files_only=True)
        found.refusal = f"{name} needs torchvision, of the same build as torch"
        return found


def _class(name: str) -> Any:
    """A class of transformers', which hides those that need torchvision, but says in which module they are."""
    if name == "Qwen2VLVideoProcessor":
        from asyncengine.model.media.qwen2_videos import Qwen2VLVideoProcessor

        return Qwen2VLVideoProcessor
    return getattr(importlib.import_module(getattr(transformers, name).__module__), name)


def over_torch(kind: Any) -> Any:
    """A video processor's class with `TorchBackend` in torchvision's place: right before that, and behind all else."""
    return type(kind.__name__, (_InRgb, kind, TorchBackend), {"__module__": kind.__module__})


def resized(image: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """(..., channels, height, width) of bytes in another size, as torchvision's resize with antialias has it."""
    if tuple(image.shape[-2:]) == size:
        return image
    frames = image.reshape(-1, *image.shape[-3:])
    smooth = mode != "nearest"
    in_bytes = not smooth or mode == "bicubic" or _bilinear_bytes()
    found = functional.interpolate(
        frames if in_bytes else frames.float(),
        size=size,
        mode=mode,
        align_corners=False if smooth else None,
        antialias=smooth,
    )
    if not in_bytes:
        found = found.round_().to(image.dtype)
    return found.reshape(*image.shape[:-2], *size)


def _bilinear_bytes() -> bool:
    """Whether torchvision has bytes resized as they are on this machine."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")
