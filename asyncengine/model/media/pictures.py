"""Whatever a caller gives for an image, as a picture of Pillow's. On worker threads."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np

from asyncengine.errors import InvalidRequestError
from asyncengine.media import ImageSource
from asyncengine.model.media.data_urls import data_of

MOST_PIXELS = 1 << 26
"""Of one image, before any is decoded."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Of files. Pillow knows others that start programs, or that nobody has looked at for long."""

_EXPECTED = "expected a PIL image, a (height, width, 3) array of uint8, bytes of a file, a pathlib.Path or a data: URL"
_LOADING = threading.Lock()
"""A picture that was opened and not read yet may be given to several requests."""


def picture_of(source: ImageSource) -> Any:
    """A picture, upright and in RGB.

    Raises:
        InvalidRequestError: It is no image, or has too many pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, np.ndarray):
        channels = source.shape[2:]
        if source.dtype != np.uint8 or source.ndim < 2 or channels not in ((), (3,), (4,)):
            raise InvalidRequestError(f"an image is an array of {source.shape} {source.dtype}; {_EXPECTED}")
        _check_size(source.shape[1], source.shape[0])
        return Image.fromarray(source).convert("RGB")
    try:
        if isinstance(source, Image.Image):
            _check_size(*source.size)
            with _LOADING:
                source.load()
            return _in_rgb(ImageOps.exif_transpose(source))
        with Image.open(_opened(source), formats=FORMATS) as picture:
            _check_size(*picture.size)
            return _in_rgb(ImageOps.exif_transpose(picture))
    except InvalidRequestError:
        raise
    except UnidentifiedImageError as error:
        raise InvalidRequestError(f"an image is damaged or none of {', '.join(FORMATS)}") from error
    except Exception as error:  # each decoder has errors of its own
        raise InvalidRequestError(f"an image cannot be read: {error}") from error


def _in_rgb(picture: Any) -> Any:
    from PIL import Image

    if picture.mode.startswith("I;16"):  # Pillow would cut it off at 255
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise InvalidRequestError(f"an image has numbers of mode {picture.mode!r}, of which nobody knows what is white")
    return picture.convert("RGB")


def _opened(source: ImageSource) -> Any:
    if isinstance(source, Path):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, str):
        return io.BytesIO(data_of(source, "an image", "image"))
    raise InvalidRequestError(f"an image is {source!r:.80}; {_EXPECTED}")


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MOST_PIXELS:
        raise InvalidRequestError(f"an image has {width} x {height} pixels; allowed: 1..{MOST_PIXELS}")
