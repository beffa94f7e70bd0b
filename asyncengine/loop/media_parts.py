"""Images, audio and videos in the messages of a conversation. Runs on the caller."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from asyncengine.errors import InvalidRequestError
from asyncengine.media import NOUNS, AudioSource, ImageSource, Kind, Video
from asyncengine.tokenizer import Message

_IMAGES = ("image", "image_url", "input_image")
_IMAGE_SOURCES = ("image", "image_url", "url", "base64")
_IMAGE_FORMS = "{'type': 'image', 'image': ...} or {'type': 'image_url', 'image_url': {'url': 'data:...'}}"
_AUDIO = ("audio", "audio_url", "input_audio")
_AUDIO_SOURCES = ("audio", "audio_url", "input_audio", "url", "base64")
_AUDIO_FORMS = "{'type': 'audio', 'audio': ...} or {'type': 'input_audio', 'input_audio': {'data': ..., 'format': ...}}"
_VIDEO = ("video", "video_url", "input_video")
_VIDEO_SOURCES = ("video", "video_url", "input_video", "url", "base64")
_VIDEO_FORMS = "{'type': 'video', 'video': ...} or {'type': 'video_url', 'video_url': {'url': 'data:...'}}"

Media = dict[Kind, list[Any]]


def take_media(messages: Sequence[Message]) -> tuple[Sequence[Message], Media]:
    """Takes the images, the audio and the videos out of messages.

    Returns:
        The messages, in which ``{"type": "image"}`` stands for each image, and ``{"type": "audio"}`` and ``{"type":
        "video"}`` for the others, and these by kind, in their order; the same messages if there are none.

    Raises:
        InvalidRequestError: A part has one of them in no form that is known.
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
    if kind in _IMAGES:
        found.setdefault("image", []).append(_image(part))
        return {"type": "image"}
    if kind in _AUDIO:
        found.setdefault("audio", []).append(_audio(part))
        return {"type": "audio"}
    if kind in _VIDEO:
        found.setdefault("video", []).append(_video(part))
        return {"type": "video"}
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


def _video(part: Mapping[str, Any]) -> Video:
    name, value = _only(part, _VIDEO_SOURCES, "video", _VIDEO_FORMS)
    if isinstance(value, Mapping):
        if within := [each for each in ("fps", "num_frames") if value.get(each) is not None]:
            raise InvalidRequestError(
                f"messages has a video part with {within[0]} in its {name}; expected it beside that"
            )
        name, value = ("base64", value.get("data")) if name == "input_video" else (name, value.get("url"))
    if value is None:
        raise InvalidRequestError(f"messages has a video part without a video; expected {_VIDEO_FORMS}")
    if name == "base64" and isinstance(value, str):
        value = _bytes(value, "video")
    fps, num_frames = part.get("fps"), part.get("num_frames")
    if isinstance(value, Video):
        if fps is not None or num_frames is not None:
            raise InvalidRequestError("messages has a video part with fps or num_frames beside a Video, which has them")
        return value
    return Video(value, fps, num_frames)


def _only(part: Mapping[str, Any], names: Sequence[str], kind: Kind, forms: str) -> tuple[str, Any]:
    given = [(name, part[name]) for name in names if part.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequestError(f"messages has {NOUNS[kind]} part with {sorted(map(str, part))}; expected {forms}")
    return given[0]


def _bytes(value: str, kind: Kind) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"messages has {NOUNS[kind]} part whose base64 is none: {error}") from error
