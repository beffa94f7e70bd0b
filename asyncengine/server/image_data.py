"""Images in the bodies of requests: as base64, which is all that is taken, and as the bytes that the engine takes.

A body is checked on the event loop, and decoded on a worker thread where there is much to decode. What an image shows
is in no message and no log.
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
from asyncengine.server.refusal import Refusal

KINDS = ("image_url", "input_image", "image")
"""Types of parts that are images: of OpenAI's chat, of its responses, of Anthropic's messages."""

_DATA_URL = re.compile(r"data:(?P<kind>[^,;]{0,100})(;[^,;]{0,100}){0,8},", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}(?=:)", re.IGNORECASE)
_OF_IMAGE = re.compile(r"images\[(?P<index>\d{1,9})\]: (?P<said>.*)", re.DOTALL)
"""What the engine says of one image of a prompt."""
_PIECE = 1 << 18
"""Characters of base64 that are decoded at a time: nobody else runs meanwhile. A multiple of four."""


@dataclass(frozen=True, slots=True, repr=False)
class EncodedImage:
    """One image of a request's body, not decoded yet.

    Attributes:
        text: Base64, from `begin` on.
        begin: Where it begins.
        field: Where it stands in the body.
    """

    text: str
    begin: int
    field: str

    def data(self) -> bytes:
        """The image's file.

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


def image_part(part: dict[str, Any], where: str, most_bytes: int) -> dict[str, Any]:
    """An image, out of a part of a message whose type is one of `KINDS`.

    Args:
        part: It. What it says of ``detail`` has no effect.
        where: Where it stands in the body.
        most_bytes: Size of the largest image that is taken.

    Raises:
        Refusal: It is none, it is too large, or it is somewhere else.
    """
    if isinstance(part.get("image"), EncodedImage):  # another route has read it
        return part
    if part["type"] == "image":
        encoded = _of_source(part.get("source"), f"{where}.source")
    else:
        if part.get("file_id") is not None:
            path = f"{where}.file_id"
            message = f"{path} cannot be honoured: no files are kept here; send the image itself as image_url"
            raise Refusal(400, message, "unsupported_field", path)
        field, url = f"{where}.image_url", part.get("image_url")
        if isinstance(url, dict):
            field, url = f"{field}.url", url.get("url")
        encoded = _of_url(url, field)
    size = (len(encoded.text) - encoded.begin) // 4 * 3 - encoded.text.count("=", -2)
    if size > most_bytes:
        raise _refusal(encoded.field, f"has {size} bytes; allowed: max_image_bytes = {most_bytes}")
    if encoded.begin == len(encoded.text):
        raise _refusal(encoded.field, "is an image of 0 bytes")
    return {"type": "image", "image": encoded}


async def decoded(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their images as bytes. Cancelling does not stop a worker thread.

    Raises:
        Refusal: An image is not base64.
    """
    if sum(len(image.text) for image in _images(messages)) <= _PIECE:
        return _decoded(messages)
    return await anyio.to_thread.run_sync(_decoded, messages, abandon_on_cancel=True)


@contextmanager
def told_apart(messages: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Where the engine says that an image is wrong, names the field that it came in.

    Args:
        messages: As they were before they were `decoded`.

    Raises:
        Refusal: It does.
    """
    fields = [image.field for image in _images(messages)]
    try:
        yield
    except InvalidRequestError as error:
        found = _OF_IMAGE.match(str(error))
        if found is None or int(found["index"]) >= len(fields):
            raise
        raise _refusal(fields[int(found["index"])], f"cannot be taken: {found['said']}") from error


def _images(messages: Sequence[dict[str, Any]]) -> list[EncodedImage]:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def _decoded(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [
                {"type": "image", "image": part["image"].data()} if part["type"] == "image" else part
                for part in content
            ]
            message = {**message, "content": content}
        found.append(message)
    return found


def _of_url(url: object, field: str) -> EncodedImage:
    if not isinstance(url, str) or not url:
        raise _refusal(field, "is missing; expected data:image/...;base64,...")
    head = _DATA_URL.match(url)
    if head is None:
        scheme = _SCHEME.match(url)
        if scheme and scheme[0].lower() == "data":
            raise _refusal(field, "is a data: URL that cannot be read; expected data:image/...;base64,...")
        what = f"has the scheme {scheme[0].lower()!r}" if scheme else "is not a data: URL"
        advice = "images are not fetched here, so send the image itself as data:image/...;base64,..."
        raise _refusal(field, f"{what}; {advice}", "unsupported_field")
    if not head["kind"].lower().startswith("image/"):
        raise _refusal(field, f"is data of the type {head['kind']!r}; expected data:image/...;base64,...")
    if not head[0].lower().endswith(";base64,"):
        raise _refusal(field, "is a data: URL without ;base64; expected data:image/...;base64,...")
    return EncodedImage(url, head.end(), field)


def _of_source(source: object, field: str) -> EncodedImage:
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
    return EncodedImage(data, 0, f"{field}.data")


def _refusal(field: str, message: str, code: str = "invalid_field") -> Refusal:
    return Refusal(400, f"{field} {message}", code, field)
