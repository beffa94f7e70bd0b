"""Images and audio in the messages of a conversation. Runs on the caller."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from asyncengine.errors import InvalidRequestError
from asyncengine.media import AudioSource, ImageSource, Kind
from asyncengine.tokenizer import Message

_IMAGES = ("image", "image_url", "input_image")
_IMAGE_SOURCES = ("image", "image_url", "url", "base64")
_IMAGE_FORMS = "{'type': 'image', 'image': ...} or {'type': 'image_url', 'image_url': {'url': 'data:...'}}"
_AUDIO = ("audio", "audio_url", "input_audio")
_AUDIO_SOURCES = ("audio", "audio_url", "input_audio", "url", "base64")
_AUDIO_FORMS = "{'type': 'audio', 'audio': ...} or {'type': 'input_audio', 'input_audio': {'data': ..., 'format': ...}}"
_OTHERS = ("video", "video_url", "input_video")

Media = dict[Kind, list[Any]]


def take_media(messages: Sequence[Message]) -> tuple[Sequence[Message], Media]:
    """Takes the images and the audio out of messages.

    Returns:
        The messages, in which ``{"type": "image"}`` stands for each image and ``{"type": "audio"}`` for each audio, and
        these by kind, in their order; the same messages if there are none.

    Raises:
        InvalidRequestError: A part has an image or audio in no form that is known, or is something that no model here
            takes.
    """
    found: Media = {}
    taken: list[Message] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            message = {**message, "content": [_taken(part, found) for part in content]}
        taken.append(message)
    return (taken, found) if found else (messages, {})


def _taken(part: Any, found: Media) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _OTHERS:
        raise InvalidRequestError(f"messages has a part of type {kind!r}; allowed: text, images and audio")
    if kind in _IMAGES:
        found.setdefault("image", []).append(_image(part))
        return {"type": "image"}
    if kind in _AUDIO:
        found.setdefault("audio", []).append(_audio(part))
        return {"type": "audio"}
    return part


def _image(part: Mapping[str, Any]) -> ImageSource:
    name, value = _only(part, _IMAGE_SOURCES, "image", _IMAGE_FORMS)
    if isinstance(value, Mapping):
        value = value.get("url")
    if name == "base64" and isinstance(value, str):
        return _bytes(value, "image")
    if value is None:
        raise InvalidRequestError(f"messages has an image part without an image; expected {_IMAGE_FORMS}")
    return value


def _audio(part: Mapping[str, Any]) -> AudioSource:
    name, value = _only(part, _AUDIO_SOURCES, "audio", _AUDIO_FORMS)
    if name == "audio_url" and isinstance(value, Mapping):
        value = value.get("url")
    if name == "input_audio" and isinstance(value, Mapping):
        name, value = "base64", value.get("data")  # a file says itself which format it has
    if value is None:
        raise InvalidRequestError(f"messages has an audio part without audio; expected {_AUDIO_FORMS}")
    if name == "base64" and isinstance(value, str):
        return _bytes(value, "audio")
    if isinstance(part.get("sampling_rate"), int) and not isinstance(value, (Mapping, tuple)):
        return value, part["sampling_rate"]
    return value


def _only(part: Mapping[str, Any], names: Sequence[str], kind: Kind, forms: str) -> tuple[str, Any]:
    given = [(name, part[name]) for name in names if part.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequestError(f"messages has an {kind} part with {sorted(map(str, part))}; expected {forms}")
    return given[0]


def _bytes(value: str, kind: Kind) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"messages has an {kind} part whose base64 is none: {error}") from error
