"""What a model is tried with: random pictures, sounds and films, always the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from asyncengine.media import Kind, Video
from asyncengine.model.media.frames import Frames, Stated
from asyncengine.model.media.preparation import listening_part
from asyncengine.model.media.video_preparation import told

_SIZES = (48, 32), (40, 56)
"""Width and height of pictures, and of the frames of films."""
_FRAMES, _FPS = 4, 0.8
"""Of films, of which a second is no unit of what models count time in."""
_SECONDS = 0.5, 0.81
"""Length of sounds."""
_LARGE = 1024, 1024
_LARGE_FRAMES = 512, 512, 16
"""Width, height and number of frames."""
_LONG_SECONDS = 30.0


def samples(kind: Kind, number: int, processor: Any) -> tuple[list[Any], dict[str, Any]]:
    """One or two of a kind, and what a processor of transformers' is given to see or hear the same."""
    if kind == "image":
        pictures = [_picture(*size) for size in _SIZES[:number]]
        return pictures, {"images": [pictures], "images_kwargs": {"return_tensors": "pt"}}
    if kind == "video":
        films = [_film(*size, _FRAMES) for size in _SIZES[:number]]
        given = {"videos": [film.shown for film in films], "videos_kwargs": told(films) | {"return_tensors": "pt"}}
        return [Video(film.shown, fps=_FPS) for film in films], given
    rate = int(listening_part(processor).sampling_rate)
    sounds = [_sound(seconds, rate) for seconds in _SECONDS[:number]]
    given = {"audio": sounds, "audio_kwargs": {"return_tensors": "pt", "sampling_rate": rate}}
    return [(sound, rate) for sound in sounds], given


def large(kind: Kind, processor: Any) -> Iterator[Any]:
    """One for whose computation a device must have room; should a processor refuse it, the next."""
    if kind == "image":
        yield _picture(*_LARGE)
    elif kind == "video":
        yield Video(_film(*_LARGE_FRAMES).shown, fps=_FPS)
    else:
        rate = int(listening_part(processor).sampling_rate)
        for seconds in (_LONG_SECONDS, _LONG_SECONDS / 2, 1.0):
            yield _sound(seconds, rate), rate


def _sound(seconds: float, rate: int) -> Any:
    samples = int(seconds * rate)
    return np.random.default_rng(samples).uniform(-0.5, 0.5, samples).astype(np.float32)


def _picture(width: int, height: int) -> Any:
    from PIL import Image

    drawn = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def _film(width: int, height: int, frames: int) -> Frames:
    shown = np.random.default_rng(height).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Frames(shown, list(range(frames)), Stated(frames, _FPS, width, height))
