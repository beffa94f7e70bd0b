"""What a checkpoint's own processor makes of videos, for its encoder and for prompts. On worker threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata

from asyncengine.errors import InvalidRequestError
from asyncengine.media import Kind, Video, VideoSource
from asyncengine.model.media.frames import MOST_PIXELS, Frames, Pixels, Stated, frames_of
from asyncengine.model.media.preparation import Prepared, inputs_of, replacements_of

_FPS = 24.0
"""What transformers takes for that of frames of which it is told nothing."""
_SET_ASIDE = {"do_sample_frames", "video_metadata", "device", "input_data_format", "do_convert_rgb"}
"""Settings of processors that have nothing to do with which frames are looked at."""


class VideoPreparation:
    """As `asyncengine.model.media.preparation.Preparation`, of videos.

    Args:
        processor: Of transformers.
        config: The model's.
        encode: Token ids of a piece of text.
        together: As of the protocol.

    Raises:
        ValueError: The processor takes no videos.
    """

    kind: Kind = "video"

    def __init__(self, processor: Any, config: Any, encode: Callable[[str], list[int]], together: bool = False) -> None:
        settings = processor.video_processor
        if (refusal := getattr(settings, "refusal", None)) is not None:
            raise ValueError(refusal)
        self.mark: str = processor.video_token
        self.together = together
        self.most: int | None = None
        self.whole = False
        self._processor = processor
        self._settings = settings
        self._usual_fps = float(settings.fps or _FPS)
        self.token_id = int(config.image_token_id)
        own = getattr(config, "video_token_id", None)
        if own is not None and own in encode(self._processed([_gray()]).texts[0]):
            self.token_id = int(own)  # else pieces of frames stand where pieces of images do

    def prepared(self, sources: Sequence[VideoSource], group: range) -> Prepared:
        """As the protocol says."""
        several: list[Frames] = []
        for index in group:
            try:
                several.append(frames_of(sources[index], self._chosen, self._usual_fps))
            except InvalidRequestError as error:
                raise InvalidRequestError(f"videos[{index}]: {error}") from error
            if sum(frames.shown.size for frames in several) > 3 * MOST_PIXELS:
                raise InvalidRequestError(
                    f"videos[{index}]: up to it their frames have more than {MOST_PIXELS} pixels, and this model must "
                    "have all of a prompt's videos prepared at once"
                )
        try:
            return self._processed(several)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"videos[{group.start}]: {error}") from error

    def _processed(self, several: Sequence[Frames]) -> Prepared:
        try:
            made = self._processor(
                text=[self.mark * len(several)],
                videos=[frames.shown for frames in several],
                return_text_replacement_offsets=True,
                videos_kwargs=told(several) | {"return_tensors": "pt"},
            )
        except Exception as error:  # it may refuse a shape, say
            shapes = (frames.shown.shape for frames in several)
            sizes = ", ".join(f"{count} frames of {width} x {height} pixels" for count, height, width, _ in shapes)
            raise InvalidRequestError(f"{sizes} are refused by the model's processor: {error}") from error
        return Prepared(inputs_of(made), replacements_of(made))

    def _chosen(self, stated: Stated, video: Video) -> Sequence[int]:
        """Which frames of a file are looked at, as the model's processor says."""
        settings = self._settings
        given = {name: getattr(settings, name, None) for name in settings.valid_kwargs.__annotations__}
        given = {name: value for name, value in given.items() if name not in _SET_ASIDE}
        if video.fps is not None or video.num_frames is not None:
            given |= {"fps": video.fps, "num_frames": video.num_frames}
        elif not settings.do_sample_frames:
            return range(stated.frames)
        try:
            chosen = settings.sample_frames(metadata=_metadata(stated), **given)
        except Exception as error:
            raise InvalidRequestError(
                f"the model's processor chooses none of its {stated.frames} frames: {error}"
            ) from error
        indices: list[int] = np.asarray(chosen).astype(int).tolist()
        return indices


def told(several: Sequence[Frames]) -> dict[str, Any]:
    """What transformers is told of videos of whose frames it is not to choose."""
    metadata = [dict(_metadata(frames.of, list(frames.indices))) for frames in several]
    return {"video_metadata": metadata, "do_sample_frames": False, "input_data_format": "channels_last"}


def _metadata(stated: Stated, indices: list[int] | None = None) -> Any:
    return VideoMetadata(
        total_num_frames=stated.frames,
        fps=stated.fps,
        duration=stated.frames / stated.fps,
        width=stated.width,
        height=stated.height,
        frames_indices=indices,
    )


def _gray() -> Frames:
    """A video of which only is asked which tokens stand for it."""
    shown: Pixels = np.full((4, 64, 64, 3), 128, dtype=np.uint8)
    return Frames(shown, [0, 1, 2, 3], Stated(4, 2.0, 64, 64))
