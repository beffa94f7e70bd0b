"""Images, audio and videos in the bodies of requests: base64, or URLs of hosts that may be asked; bytes for the engine.

A body is checked on the event loop, and decoded on a worker thread where there is much to decode. What is in a file
is in no message and no log.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from asyncengine.errors import InvalidRequestError
from asyncengine.media import KINDS, NOUNS, PLURALS, Kind, Video
from asyncengine.server.refusal import Refusal
from asyncengine.server.settings import MediaLimits

IMAGES = ("image_url", "input_image", "image")
"""Types of parts that are images: of OpenAI's chat, of its responses, of Anthropic's messages."""
AUDIO = ("input_audio", "audio_url", "audio")
"""Types of parts that are audio: of OpenAI's chat, of what other servers take besides, and of this engine."""
VIDEOS = ("video_url", "input_video", "video")
"""Types of parts that are videos: of what other servers take, and of this engine."""
TYPES: dict[str, Kind] = {
    **dict.fromkeys(IMAGES, "image"), **dict.fromkeys(AUDIO, "audio"), **dict.fromkeys(VIDEOS, "video")
}  # fmt: skip
"""What each type of a part is."""
_OF_FRAMES = ("fps", "num_frames")
"""What is said beside a video of which of its frames are looked at."""
_NOT_FETCHED: dict[Kind, str] = {"image": "images are", "audio": "audio is", "video": "videos are"}

_DATA_URL = re.compile(r"data:(?P<kind>[^,;]{0,100})(;[^,;]{0,100}){0,8},", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}(?=:)", re.IGNORECASE)
_OF_ITEM = re.compile(r"(?P<what>images|audio|videos)\[(?P<index>\d{1,9})\]: (?P<said>.*)", re.DOTALL)
"""What the engine says of one image, audio or video of a prompt."""
_PIECE = 1 << 18
"""Characters of base64 that are decoded at a time: nobody else runs meanwhile. A multiple of four."""


@dataclass(frozen=True, slots=True, repr=False)
class EncodedFile:
    """One image, audio or video of a request's body, not decoded yet.

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
            raise refusal(self.field, f"is not base64: {error}") from error

    def _pieces(self) -> Iterator[bytes]:
        for begin in range(self.begin, len(self.text), _PIECE):
            piece = base64.b64decode(self.text[begin : begin + _PIECE], validate=True)
            if begin + _PIECE < len(self.text) and len(piece) < _PIECE // 4 * 3:
                raise binascii.Error("Excess data after padding")
            yield piece


@dataclass(frozen=True, slots=True, repr=False)
class RemoteFile:
    """One image, audio or video that a request's body has the URL of, not fetched yet.

    Attributes:
        url: Of a host that may be asked.
        field: Where it stands in the body.
        kind: What it is said to be.
        most: How many bytes it may have.
    """

    url: str
    field: str
    kind: Kind
    most: int


MediaFile = EncodedFile | RemoteFile


def media_part(part: dict[str, Any], where: str, most: MediaLimits) -> dict[str, Any]:
    """An image, audio or video, out of a part of a message whose type is one of `TYPES`.

    Args:
        part: It. What it says of ``detail`` or ``format`` has no effect: a file says itself what it is. Beside a video,
            ``fps`` or ``num_frames`` may say what `asyncengine.Video` does.
        where: Where it stands in the body.
        most: Sizes of the largest that are taken.

    Raises:
        Refusal: It is none, it is too large, or it is somewhere else.
    """
    kind = TYPES[part["type"]]
    if isinstance(part.get(kind), MediaFile):  # another route has read it
        return part
    file = {"image": _image, "audio": _audio, "video": _video}[kind](part, where, most)
    if isinstance(file, EncodedFile):
        size = (len(file.text) - file.begin) // 4 * 3 - file.text.count("=", -2)
        if size > most.of(kind):
            raise refusal(file.field, f"has {size} bytes; allowed: max_{kind}_bytes = {most.of(kind)}")
        if file.begin == len(file.text):
            raise refusal(file.field, f"is {NOUNS[kind]} of 0 bytes")
    return {"type": kind, kind: file} | (_of_frames(part, where) if kind == "video" else {})


async def decoded(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with what is base64 in them as bytes. Cancelling does not stop a worker thread.

    Raises:
        Refusal: One is not base64.
    """
    files = _files(messages)
    if sum(len(file.text) for file in files if isinstance(file, EncodedFile)) <= _PIECE:
        return _decoded(messages)
    return await anyio.to_thread.run_sync(_decoded, messages, abandon_on_cancel=True)


def remote_files(messages: Sequence[dict[str, Any]]) -> list[RemoteFile]:
    """What has yet to be fetched."""
    return [file for file in _files(messages) if isinstance(file, RemoteFile)]


def with_fetched(messages: Sequence[dict[str, Any]], fetched: Iterable[bytes]) -> list[dict[str, Any]]:
    """Messages with bytes in the place of their `remote_files`, in their order."""
    data = iter(fetched)
    return _replaced(messages, lambda file: next(data) if isinstance(file, RemoteFile) else file)


@contextmanager
def told_apart(messages: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Where the engine says that an image, audio or video is wrong, names the field that it came in.

    Args:
        messages: As they were before they were `decoded`.

    Raises:
        Refusal: It does.
    """
    fields = {PLURALS[kind]: [part[kind].field for part in _parts(messages) if part["type"] == kind] for kind in KINDS}
    try:
        yield
    except InvalidRequestError as error:
        found = _OF_ITEM.match(str(error))
        if found is None or int(found["index"]) >= len(fields[found["what"]]):
            raise
        raise refusal(fields[found["what"]][int(found["index"])], f"cannot be taken: {found['said']}") from error


def _parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are images, audio or videos."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for content in contents for part in content if part["type"] in KINDS]


def _files(messages: Sequence[dict[str, Any]]) -> list[MediaFile | bytes]:
    return [part[part["type"]] for part in _parts(messages)]


def _decoded(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return _replaced(messages, lambda file: file.data() if isinstance(file, EncodedFile) else file)


def _replaced(
    messages: Sequence[dict[str, Any]], make: Callable[[MediaFile | bytes], MediaFile | bytes]
) -> list[dict[str, Any]]:
    found = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [part | {kind: make(part[kind])} if (kind := part["type"]) in KINDS else part for part in content]
            message = {**message, "content": content}
        found.append(message)
    return found


def _image(part: dict[str, Any], where: str, most: MediaLimits) -> MediaFile:
    if part["type"] == "image":
        return _of_source(part.get("source"), f"{where}.source", most)
    if part.get("file_id") is not None:
        path = f"{where}.file_id"
        message = f"{path} cannot be honoured: no files are kept here; send the image itself as image_url"
        raise Refusal(400, message, "unsupported_field", path)
    field, url = f"{where}.image_url", part.get("image_url")
    if isinstance(url, dict):
        field, url = f"{field}.url", url.get("url")
    return _of_url(url, field, "image", most)


def _audio(part: dict[str, Any], where: str, most: MediaLimits) -> MediaFile:
    if part["type"] == "audio_url":
        field, url = f"{where}.audio_url", part.get("audio_url")
        if isinstance(url, dict):
            field, url = f"{field}.url", url.get("url")
        return _of_url(url, field, "audio", most)
    field, given = f"{where}.{part['type']}", part.get(part["type"])
    if not isinstance(given, dict) or not isinstance(given.get("data"), str):
        raise refusal(field, "is missing; expected an object with data, which is base64, and format")
    return EncodedFile(given["data"], 0, f"{field}.data")


def _video(part: dict[str, Any], where: str, most: MediaLimits) -> MediaFile:
    field, given = f"{where}.{part['type']}", part.get(part["type"])
    within = given if isinstance(given, dict) else {}
    for name in _OF_FRAMES:
        if within.get(name) is not None:
            raise refusal(f"{field}.{name}", f"stands in the wrong place; expected {where}.{name}")
    if part["type"] == "input_video" and isinstance(given, dict) and isinstance(given.get("data"), str):
        return EncodedFile(given["data"], 0, f"{field}.data")
    if isinstance(given, dict):
        field, given = f"{field}.url", given.get("url")
    return _of_url(given, field, "video", most)


def _of_frames(part: dict[str, Any], where: str) -> dict[str, Any]:
    said = {name: part[name] for name in _OF_FRAMES if part.get(name) is not None}
    for name in (*said, None):
        try:
            Video(b"", **(said if name is None else {name: said[name]}))
        except InvalidRequestError as error:
            field = next(iter(said)) if name is None else name
            raise refusal(f"{where}.{field}", f"is not what a video may have: {error}") from error
    return said


def _of_url(url: object, field: str, kind: Kind, most: MediaLimits) -> MediaFile:
    expected = f"data:{kind}/...;base64,..."
    if not isinstance(url, str) or not url:
        raise refusal(field, f"is missing; expected {expected}")
    head = _DATA_URL.match(url)
    if head is None:
        scheme = _SCHEME.match(url)
        if scheme and scheme[0].lower() == "data":
            raise refusal(field, f"is a data: URL that cannot be read; expected {expected}")
        if most.domains and scheme and scheme[0].lower() in ("http", "https"):
            from asyncengine.server.fetch import check_url  # and httpx with it, which nobody else needs

            check_url(url, field, most.domains)
            return RemoteFile(url, field, kind, most.of(kind))
        what = f"has the scheme {scheme[0].lower()!r}" if scheme else "is not a data: URL"
        here = " from there" if most.domains else " here"
        advice = f"{_NOT_FETCHED[kind]} not fetched{here}, so send the {kind} itself as {expected}"
        raise refusal(field, f"{what}; {advice}", "unsupported_field")
    if not head["kind"].lower().startswith(f"{kind}/"):
        raise refusal(field, f"is data of the type {head['kind']!r}; expected {expected}")
    if not head[0].lower().endswith(";base64,"):
        raise refusal(field, f"is a data: URL without ;base64; expected {expected}")
    return EncodedFile(url, head.end(), field)


def _of_source(source: object, field: str, most: MediaLimits) -> MediaFile:
    """An image as Anthropic's clients send it."""
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or kind is None:
        raise refusal(field, "is missing; expected an object with type, media_type and data")
    if kind == "url":
        return _of_url(source.get("url"), f"{field}.url", "image", most)
    if kind != "base64":
        message = f"{field}.type is {kind!r:.80}; allowed: 'base64', 'url'"
        raise Refusal(400, message, "unsupported_field", f"{field}.type")
    media_type, data = source.get("media_type"), source.get("data")
    if not isinstance(media_type, str) or not media_type.lower().startswith("image/"):
        raise refusal(f"{field}.media_type", f"is {media_type!r:.80}; expected that of an image, such as 'image/png'")
    if not isinstance(data, str):
        raise refusal(f"{field}.data", f"is {data!r:.80}; expected base64")
    return EncodedFile(data, 0, f"{field}.data")


def refusal(field: str, message: str, code: str = "invalid_field") -> Refusal:
    """What is said of an image, audio or video that is wrong."""
    return Refusal(400, f"{field} {message}", code, field)
