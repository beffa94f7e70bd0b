"""Files that are in a ``data:`` URL."""

from __future__ import annotations

import base64
import binascii

from asyncengine.errors import InvalidRequestError


def data_of(url: str, what: str, kind: str) -> bytes:
    """The bytes of a file.

    Args:
        url: It.
        what: It is, in words.
        kind: Of its media type.

    Raises:
        InvalidRequestError: It is another URL, or not base64.
    """
    described, found, data = url.partition(",")
    if not url.startswith("data:") or not found or not described.endswith(";base64"):
        raise InvalidRequestError(
            f"{what} is at {url!r:.80}; nothing is fetched: allowed are data:{kind}/...;base64,... URLs, bytes, paths"
        )
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise InvalidRequestError(f"{what}'s data: URL is not base64: {error}") from error
