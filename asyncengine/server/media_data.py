"""Images and audio in the bodies of requests: as base64, which is all that is taken, and as bytes for the engine.

A body is checked on the event loop, and decoded on a worker thread where there is much to decode. What is in an
image or audio is in no message and no log.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from asyncengine.errors import InvalidRequestError
from asyncengine.media import KINDS, PLURALS, Kind
from asyncengine.server.refusal import Refusal
from asyncengine.server.settings import MediaLimits

IMAGES = ("image_url", "input_image", "image")
"""Types of parts that are images: of OpenAI's chat, of its responses, of Anthropic's messages."""
AUDIO = ("input_audio", "audio_url", "audio")
"""Types of parts that are audio: of OpenAI's chat, of what other servers take besides, and of this engine."""

_DATA_URL = re.compile(r"data:(?P<kind>[^,;]{0,100})(;[^,;]{0,100}){0,8},", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}(?=:)", re.IGNORECASE)
_OF_ITEM = re.compile(r"(?P<what>images|audio)\[(?P<index>\d{1,9})\]: (?P<said>.*)", re.DOTALL)
"""What the engine says of one image or audio of a prompt."""
_PIECE = 1 << 18
"""Characters of base64 that are decoded at a time: nobody else runs meanwhile. A multiple of four."""


@dataclass(frozen=True, slots=True, repr=False)
class EncodedFile:
    """One image or audio of a request's body, not decoded yet.

    Attributes:
        text: Base64, from `begin` on.
        begin: Where it begins.
        field: Where it stands in the body.
    """

    text: str
    begin: int
    field: str

    def data(self) -> bytes:
        """The file.

        Raises:
            Refusal: It is not base64.
        """
        try:
            return b"".join(self._pieces())
        except ValueError as error:
            raise _refusal(self.field, f"is not base64: {error}") from error

    def _pieces(self) -> Iterator[bytes]:
        for begin in range(self.begin, len(self.text), _PIECE):
            piece = base64.b64decode(self.text[begin : begin + _PIECE], validate=True)
            if begin + _PIECE < len(self.text) and len(piece) < _PIECE // 4 * 3:
                raise binascii.Error("Excess data after padding")
            yield piece


def media_part(part: dict[str, Any], where: str, most: MediaLimits) -> dict[str, Any]:
    """An image or audio, out of a part of a message whose type is one of `IMAGES` and `AUDIO`.

    Args:
        part: It. What it says of ``detail`` or ``format`` has no effect: a file says itself what it is.
        where: Where it stands in the body.
        most: Sizes of the largest that are taken.

    Raises:
        Refusal: It is none, it is too large, or it is somewhere else.
    """
    kind: Kind = "audio" if part["type"] in AUDIO else "image"
    if isinstance(part.get(kind), EncodedFile):  # another route has read it
        return part
    encoded = _audio(part, where) if kind == "audio" else _image(part, where)
    size = (len(encoded.text) - encoded.begin) // 4 * 3 - encoded.text.count("=", -2)
    most_bytes, name = (most.audio, "max_audio_bytes") if kind == "audio" else (most.image, "max_image_bytes")
    if size > most_bytes:
        raise _refusal(encoded.field, f"has {size} bytes; allowed: {name} = {most_bytes}")
    if encoded.begin == len(encoded.text):
        raise _refusal(encoded.field, f"is an {kind} of 0 bytes")
    return {"type": kind, kind: encoded}


async def decoded(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their images and audio as bytes. Cancelling does not stop a worker thread.

    Raises:
        Refusal: One is not base64.
    """
    if sum(len(file.text) for kind in KINDS for file in _files(messages, kind)) <= _PIECE:
        return _decoded(messages)
    return await anyio.to_thread.run_sync(_decoded, messages, abandon_on_cancel=True)


@contextmanager
def told_apart(messages: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Where the engine says that an image or audio is wrong, names the field that it came in.

    Args:
        messages: As they were before they were `decoded`.

    Raises:
        Refusal: It does.
    """
    fields = {PLURALS[kind]: [file.field for file in _files(messages, kind)] for kind in KINDS}
    try:
        yield
    except InvalidRequestError as error:
        found = _OF_ITEM.match(str(error))
        if found is None or int(found["index"]) >= len(fields[found["what"]]):
            raise
        raise _refusal(fields[found["what"]][int(found["index"])], f"cannot be taken: {found['said']}") from error


def _files(messages: Sequence[dict[str, Any]], kind: Kind) -> list[EncodedFile]:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part[kind] for content in contents for part in content if part["type"] == kind]


def _decoded(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [
                {"type": kind, kind: part[kind].data()} if (kind := part["type"]) in KINDS else part for part in content
            ]
            message = {**message, "content": content}
        found.append(message)
    return found


def _image(part: dict[str, Any], where: str) -> EncodedFile:
    if part["type"] == "image":
        return _of_source(part.get("source"), f"{where}.source")
    if part.get("file_id") is not None:
        path = f"{where}.file_id"
        message = f"{path} cannot be honoured: no files are kept here; send the image itself as image_url"
        raise Refusal(400, message, "unsupported_field", path)
    field, url = f"{where}.image_url", part.get("image_url")
    if isinstance(url, dict):
        field, url = f"{field}.url", url.get("url")
    return _of_url(url, field)


def _audio(part: dict[str, Any], where: str) -> EncodedFile:
    if part["type"] == "audio_url":
        field, url = f"{where}.audio_url", part.get("audio_url")
        if isinstance(url, dict):
            field, url = f"{field}.url", url.get("url")
        return _of_url(url, field, "audio")
    field, given = f"{where}.{part['type']}", part.get(part["type"])
    if not isinstance(given, dict) or not isinstance(given.get("data"), str):
        raise _refusal(field, "is missing; expected an object with data, which is base64, and format")
    return EncodedFile(given["data"], 0, f"{field}.data")


def _of_url(url: object, field: str, kind: Kind = "image") -> EncodedFile:
    expected = f"data:{kind}/...;base64,..."
    if not isinstance(url, str) or not url:
        raise _refusal(field, f"is missing; expected {expected}")
    head = _DATA_URL.match(url)
    if head is None:
        scheme = _SCHEME.match(url)
        if scheme and scheme[0].lower() == "data":
            raise _refusal(field, f"is a data: URL that cannot be read; expected {expected}")
        what = f"has the scheme {scheme[0].lower()!r}" if scheme else "is not a data: URL"
        what_is = "images are" if kind == "image" else "audio is"
        advice = f"{what_is} not fetched here, so send the {kind} itself as {expected}"
        raise _refusal(field, f"{what}; {advice}", "unsupported_field")
    if not head["kind"].lower().startswith(f"{kind}/"):
        raise _refusal(field, f"is data of the type {head['kind']!r}; expected {expected}")
    if not head[0].lower().endswith(";base64,"):
        raise _refusal(field, f"is a data: URL without ;base64; expected {expected}")
    return EncodedFile(url, head.end(), field)


def _of_source(source: object, field: str) -> EncodedFile:
    """An image as Anthropic's clients send it."""
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or kind is None:
        raise _refusal(field, "is missing; expected an object with type, media_type and data")
    if kind == "url":
        return _of_url(source.get("url"), f"{field}.url")
    if kind != "base64":
        message = f"{field}.type is {kind!r:.80}; allowed: 'base64', and 'url' of a data: URL"
        raise Refusal(400, message, "unsupported_field", f"{field}.type")
    media_type, data = source.get("media_type"), source.get("data")
    if not isinstance(media_type, str) or not media_type.lower().startswith("image/"):
        raise _refusal(f"{field}.media_type", f"is {media_type!r:.80}; expected that of an image, such as 'image/png'")
    if not isinstance(data, str):
        raise _refusal(f"{field}.data", f"is {data!r:.80}; expected base64")
    return EncodedFile(data, 0, f"{field}.data")


def _refusal(field: str, message: str, code: str = "invalid_field") -> Refusal:
    return Refusal(400, f"{field} {message}", code, field)
