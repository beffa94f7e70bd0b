"""Files that later loads may read: whole or not at all, and so many at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

_DIGEST_BYTES = hashlib.sha256().digest_size


def read(place: Path) -> bytes | None:
    """What was written there, if it is whole."""
    try:
        content = place.read_bytes()
    except OSError:
        return None
    body = content[_DIGEST_BYTES:]
    return body if hashlib.sha256(body).digest() == content[:_DIGEST_BYTES] else None


def write(place: Path, content: bytes, most_files: int) -> None:
    """Writes a file by one rename. Where that cannot be, nothing is written.

    Args:
        place: Where.
        content: What is in it.
        most_files: As many are left in its directory; the oldest go first.
    """
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix="writing-", dir=place.parent)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(name, place)
        except OSError:
            os.unlink(name)
            raise
        for old in sorted(place.parent.iterdir(), key=lambda file: -file.stat().st_mtime_ns)[most_files:]:
            old.unlink()


@cache
def version(name: str) -> str:
    """Of a distribution; empty if it is not installed."""
    try:
        return installed(name)
    except PackageNotFoundError:
        return ""
