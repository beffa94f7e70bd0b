"""What goes over the wire: bodies read, checked and written. msgspec both ways; the field policy is here.

The policy: a field is honoured, or known and ignored (then the response names it in ``x-ignored-fields``), or known and
refused by name, or unknown and refused with the nearest known name. None is passed over in silence.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import anyio
import msgspec
from starlette.requests import Request

from asyncengine.server.refusal import Refusal

if TYPE_CHECKING:
    from asyncengine.server.settings import ServerSettings

T = TypeVar("T")

IGNORED_HEADER = "x-ignored-fields"

_encoder = msgspec.json.Encoder()
encode = _encoder.encode
"""Anything to JSON."""


@dataclass(frozen=True)
class Body(Generic[T]):
    """What a route takes.

    Attributes:
        shape: A `msgspec.Struct` of the fields that are honoured.
        ignored: Fields that change nothing here, and are reported.
        refused: Fields that would change the answer and cannot be honoured, with the reason.
        harmless: Values of refused fields that ask for nothing.
    """

    shape: type[T]
    ignored: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    harmless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def read(self, payload: object) -> tuple[T, dict[str, str]]:
        """The checked body and the headers that report what is ignored.

        Raises:
            Refusal: A field is unknown, cannot be honoured, or has the wrong type.
        """
        if not isinstance(payload, dict):
            raise Refusal(400, f"the body is a JSON {type(payload).__name__}; expected an object", "invalid_body")
        known = self.shape.__struct_encode_fields__  # type: ignore[attr-defined]
        values, ignored = {}, []
        for name, value in payload.items():
            if name in known:
                if value is not None:  # null is as good as absent
                    values[name] = value
            elif name in self.ignored:
                if value is not None:
                    ignored.append(name)
            elif name in self.refused:
                if value is not None and value not in self.harmless.get(name, ()):
                    message = f"{name} cannot be honoured: {self.refused[name]}"
                    raise Refusal(400, message, "unsupported_field", name)
            else:
                raise Refusal(400, f"unknown field {name!r}{self._hint(name)}", "unknown_field", name)
        try:
            body = msgspec.convert(values, self.shape)
        except msgspec.ValidationError as error:
            message, param = _told(str(error))
            if "enum value" in message and (allowed := _choices(get_type_hints(self.shape).get(param or ""))):
                message += f"; allowed: {', '.join(map(repr, allowed))}"
            raise Refusal(400, message, "invalid_field", param) from error
        return body, {IGNORED_HEADER: ", ".join(sorted(ignored))} if ignored else {}

    def _hint(self, name: str) -> str:
        known = [*self.shape.__struct_encode_fields__, *self.refused, *self.ignored]  # type: ignore[attr-defined]
        near = difflib.get_close_matches(name, known, n=1)
        return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known)) or 'none'}"


async def read_json(request: Request, settings: ServerSettings) -> Any:
    """The JSON of a request's body.

    Raises:
        Refusal: It is too large, too slow, not JSON, or not said to be JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # Also what keeps other web sites' forms from being posted here: those cannot say so.
        raise Refusal(415, f"the content-type is {kind or 'missing'}; expected application/json", "content_type")
    body = await read_body(request, settings)
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is not JSON: {error}", "invalid_json") from error


async def read_body(request: Request, settings: ServerSettings) -> bytes:
    """A request's body.

    Raises:
        Refusal: It is too large or too slow.
    """
    most = settings.max_body_bytes

    def too_large() -> Refusal:
        return Refusal(413, f"the body has more than max_body_bytes = {most} bytes", "body_too_large")

    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > most:
        raise too_large()
    pieces, size = [], 0
    with anyio.move_on_after(settings.body_seconds):
        async with aclosing(request.stream()) as stream:
            async for piece in stream:
                size += len(piece)
                if size > most:
                    raise too_large()
                pieces.append(piece)
        return b"".join(pieces)
    raise Refusal(408, f"the body did not come within body_seconds = {settings.body_seconds:g}", "body_too_slow")


def _choices(kind: Any) -> list[Any]:
    """The values that a type of literals allows."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for part in get_args(kind) for choice in _choices(part)]


def _told(message: str) -> tuple[str, str | None]:
    """Msgspec's ``Expected `int`, got `str` - at `$.n` `` in the words of the rest of the server."""
    text, at, path = message.partition(" - at `")
    if not at:
        name = message.rpartition("`")[0].rpartition("`")[2] if "missing required field" in message else None
        return message, name
    path = path.rstrip("`").removeprefix("$").removeprefix(".")
    return f"{path}: {text[:1].lower()}{text[1:]}", path
