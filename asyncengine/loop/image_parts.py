"""Images in the messages of a conversation. Runs on the caller."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from asyncengine.errors import InvalidRequestError
from asyncengine.images import ImageSource
from asyncengine.tokenizer import Message

_SOURCES = ("image", "image_url", "url", "base64")
_IMAGES = ("image", "image_url", "input_image")
_OTHERS = ("audio", "audio_url", "input_audio", "video", "video_url", "input_video")
_FORMS = "{'type': 'image', 'image': ...} or {'type': 'image_url', 'image_url': {'url': 'data:...'}}"


def take_images(messages: Sequence[Message]) -> tuple[Sequence[Message], list[ImageSource]]:
    """Takes the images out of messages.

    Returns:
        The messages, in which ``{"type": "image"}`` stands for each image, and the images in their order; the same
        messages if there are none.

    Raises:
        InvalidRequestError: A part has an image in no form that is known, or is something that no model here takes.
    """
    images: list[ImageSource] = []
    taken: list[Message] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            message = {**message, "content": [_taken(part, images) for part in content]}
        taken.append(message)
    return (taken, images) if images else (messages, [])


def _taken(part: Any, images: list[ImageSource]) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _OTHERS:
        raise InvalidRequestError(f"messages has a part of type {kind!r}; allowed: text and images")
    if kind not in _IMAGES:
        return part
    images.append(_source(part))
    return {"type": "image"}


def _source(part: Mapping[str, Any]) -> ImageSource:
    given = [(name, part[name]) for name in _SOURCES if part.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequestError(f"messages has an image part with {sorted(map(str, part))}; expected {_FORMS}")
    name, value = given[0]
    if isinstance(value, Mapping):
        value = value.get("url")
    if name == "base64" and isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequestError(f"messages has an image part whose base64 is none: {error}") from error
    if value is None:
        raise InvalidRequestError(f"messages has an image part without an image; expected {_FORMS}")
    return value
