"""The video processor of Qwen2-VL and Qwen2.5-VL without torchvision, which transformers' module of it imports.

It is that of Qwen3-VL but for how frames are chosen and how large they are made.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor


class Qwen2VLVideoProcessor(Qwen3VLVideoProcessor):  # type: ignore[misc]
    """As transformers' class of the name; settings have the names that they have there."""

    size: ClassVar[dict[str, int]] = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    patch_size = 14
    do_sample_frames = False
    fps = None
    max_video_tokens = 128000

    def __init__(self, **settings: Any) -> None:
        size = dict(settings.pop("size", None) or self.size)
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if (pixels := settings.pop(name, None)) is not None:
                size[edge] = pixels
        super().__init__(size=size, **settings)

    def sample_frames(
        self, metadata: Any, num_frames: int | None = None, fps: float | None = None, **_: Any
    ) -> NDArray[np.int64]:
        """Which frames are looked at: so many in a second, or in all, in whole temporal patches.

        Raises:
            ValueError: The video has fewer.
        """
        num_frames, fps = num_frames or self.num_frames, fps or self.fps
        total, patch = int(metadata.total_num_frames), self.temporal_patch_size
        if num_frames is not None:
            wanted = round(num_frames / patch) * patch
        elif fps is not None:
            most = math.floor(min(self.max_frames, total) / patch) * patch
            wanted = min(max(total / metadata.fps * fps, self.min_frames), most, total)
            wanted = math.floor(wanted / patch) * patch
        else:
            return np.arange(total)
        if not 0 < wanted <= total:
            raise ValueError(f"{wanted} frames are wanted of a video that has {total}")
        return torch.arange(0, total, total / wanted).int().numpy().astype(np.int64)

    def resize(
        self,
        videos: torch.Tensor,
        size: SizeDict,
        resample: Any,
        factor: int,
        temporal_factor: int = 2,
        cap_pixels_per_frame: bool | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """(videos, frames, channels, height, width), each frame within so many pixels."""
        most = size.longest_edge
        if cap_pixels_per_frame:
            total = int(self.max_video_tokens * factor * factor * 0.9)
            share = total * temporal_factor // videos.shape[1]
            most = max(min(most, share), int(size.shortest_edge * 1.05))
        height, width = smart_resize(*videos.shape[-2:], factor=factor, min_pixels=size.shortest_edge, max_pixels=most)
        resize = super(Qwen3VLVideoProcessor, self).resize
        found: torch.Tensor = resize(image=videos, size=SizeDict(height=height, width=width), resample=resample)
        return found
