"""Bodies that are forms with a file in them, as ``/v1/audio/transcriptions`` takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

import anyio.to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from asyncengine.server.refusal import Refusal
from asyncengine.server.settings import ServerSettings
from asyncengine.server.wire import read_body

_FORM = "multipart/form-data"
_MOST_PARTS = 64
_MOST_OF_A_FIELD = 1 << 16


@dataclass(slots=True)
class _Part:
    name: str = ""
    is_file: bool = False
    header: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    headers: dict[str, bytes] = field(default_factory=dict)


Fields = dict[str, str | list[str]]
"""Those whose name ends in ``[]`` are lists, as clients mean them; of others the last counts."""


async def read_form(request: Request, settings: ServerSettings, file: str) -> tuple[Fields, bytes]:
    """The fields of a form, and its one file.

    Args:
        request: The request.
        settings: What bounds its body.
        file: Name of the field that has the file.

    Raises:
        Refusal: It is no form, of another web site, too large, too slow, or has other files or no such.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind.decode("latin-1") != _FORM or not boundary:
        shown = kind.decode("latin-1") or "missing"
        raise Refusal(415, f"the content-type is {shown}; expected {_FORM} with a boundary", "content_type")
    _check_origin(request, settings)
    body = await read_body(request, settings)
    parts = await anyio.to_thread.run_sync(_parts, body, boundary, abandon_on_cancel=True)
    files = [part for part in parts if part.is_file]
    if [part.name for part in files] != [file]:
        named = ", ".join(repr(part.name) for part in files) or "none"
        raise Refusal(400, f"the form has the files {named}; expected one, {file!r}", "invalid_field", file)
    fields: Fields = {}
    for part in parts:
        text = part.value.decode("utf-8", "replace")
        if part.name.endswith("[]") and not part.is_file:
            several = fields.setdefault(part.name, [])
            assert isinstance(several, list)
            several.append(text)
        elif not part.is_file:
            fields[part.name] = text
    return fields, bytes(files[0].value)


def _check_origin(request: Request, settings: ServerSettings) -> None:
    """Refuses forms that a browser posts for another web site: it asks nobody before, as it does with JSON."""
    origin = request.headers.get("origin")
    if origin is None or origin in settings.cors_origins or "*" in settings.cors_origins:
        return
    if urlsplit(origin).netloc != request.headers.get("host"):
        raise Refusal(403, f"the origin {origin!r:.200} may not post forms here; see cors_origins", "origin")


def _parts(body: bytes, boundary: bytes) -> list[_Part]:
    """Raises Refusal if the body is no form, or one of too many or too large fields."""
    parts: list[_Part] = []
    name = bytearray()

    def begin() -> None:
        parts.append(_Part())
        if len(parts) > _MOST_PARTS:
            raise Refusal(400, f"the form has more than {_MOST_PARTS} parts", "invalid_body")

    def header_name(data: bytes, start: int, end: int) -> None:
        name.extend(data[start:end])

    def header_value(data: bytes, start: int, end: int) -> None:
        parts[-1].header.extend(data[start:end])

    def header_end() -> None:
        parts[-1].headers[name.decode("latin-1").lower()] = bytes(parts[-1].header)
        name.clear()
        parts[-1].header.clear()

    def headers_finished() -> None:
        _, options = parse_options_header(parts[-1].headers.get("content-disposition", b""))
        parts[-1].name = options.get(b"name", b"").decode("utf-8", "replace")
        parts[-1].is_file = b"filename" in options

    def data_of(data: bytes, start: int, end: int) -> None:
        part = parts[-1]
        part.value.extend(memoryview(data)[start:end])
        if not part.is_file and len(part.value) > _MOST_OF_A_FIELD:
            raise Refusal(400, f"{part.name} has more than {_MOST_OF_A_FIELD} bytes", "invalid_field", part.name)

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": begin,
            "on_header_field": header_name,
            "on_header_value": header_value,
            "on_header_end": header_end,
            "on_headers_finished": headers_finished,
            "on_part_data": data_of,
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Refusal(400, f"the body is not a form: {error}", "invalid_body") from error
    return parts
