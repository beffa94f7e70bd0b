"""Prefix caches as files: safetensors, piece by piece. On worker threads; knows no torch.

A block is one row of a file, with what each part of the KV cache has for it: so a piece of a file is some whole blocks.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncengine.catalogue import Catalogue
from asyncengine.errors import PrefixCacheError
from asyncengine.step.batch import Int32

_FORMAT = "asyncengine prefix cache 1"
_DTYPES = {"content": "U8", "tokens": "I32", "before": "I32"}
_LONGEST_HEADER = 1 << 20
_LARGEST = 1 << 48
"""Number in a header."""


def name_of(path: object) -> str | None:
    """How a file is called, as the system takes it; None if that is no path of a file."""
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    return name if isinstance(name, str) and name and "\0" not in name else None


class _Lent:
    """An open file that one thread uses at a time, and that whoever waits for it may give up without waiting longer.

    Args:
        let_go: What is done once it has been given up, has been closed, and nobody uses it.
    """

    def __init__(self, let_go: Callable[[], None] = lambda: None) -> None:
        self.file: BinaryIO | None = None
        self._let_go = let_go
        self._in_use = threading.Lock()
        self._given_up = False

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        try:
            with self._in_use:
                yield
        finally:
            self._clear()  # whoever has given it up meanwhile could not

    @property
    def given_up(self) -> bool:
        return self._given_up

    def give_up(self) -> None:
        self._given_up = True
        self._clear()

    def _clear(self) -> None:
        if self._given_up and self.file is not None and self._in_use.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError):  # a disk that is full is so for what it still has to write, too
                    self.file.close()
                self._let_go()
            finally:
                self._in_use.release()


class PrefixWriter:
    """Writes a file piece by piece, so that one piece at a time is in memory; it is there once it is whole.

    Nothing is written before the first `add`. Whoever gives up calls `discard`, from any thread: where another one is
    just writing, that one leaves nothing behind.

    Args:
        path: Where; a file that is there is replaced.
        catalogue: What goes into it.
        identity: As `asyncengine.step.model.LoadedModel.prefix_identity` gives it.
    """

    def __init__(self, path: Path, catalogue: Catalogue, identity: Mapping[str, str]) -> None:
        self._path = path
        self._catalogue = catalogue
        self._identity = identity
        self._there: list[NDArray[np.bool_]] = []
        self._name = ""
        self._lent = _Lent(self._unlink)

    def add(self, there: NDArray[np.bool_], rows: NDArray[np.uint8]) -> None:
        """Writes the next piece.

        Args:
            there: (blocks,) which of its blocks there still are. None of them follows one that is gone.
            rows: (blocks that are there, bytes) uint8: what the KV cache has for them.

        Raises:
            PrefixCacheError: It cannot be written.
        """
        with self._told() as file:
            file.write(np.ascontiguousarray(rows).data)
            self._there.append(there)

    def commit(self) -> int:
        """Puts the file into its place, and returns how many tokens are in it.

        Raises:
            PrefixCacheError: It cannot be written.
        """
        with self._told() as file:
            there, before = np.concatenate(self._there), self._catalogue.before
            tokens, follows = self._catalogue.tokens[there], before[there]
            numbers = np.cumsum(there, dtype=np.int32) - 1
            file.write(np.ascontiguousarray(tokens).data)
            file.write(np.where(follows < 0, np.int32(-1), numbers[follows]).data)
            file.seek(0)
            file.write(self._header(len(tokens)))
            file.flush()
            os.fsync(file.fileno())  # or else a file may be in its place before what is in it, and the power fail
            file.close()
            if not self._lent.given_up:
                os.replace(self._name, self._path)
            return int(tokens.size)

    def discard(self) -> None:
        """Leaves nothing behind, unless the file is in its place."""
        self._lent.give_up()

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._name)

    @contextlib.contextmanager
    def _told(self) -> Iterator[BinaryIO]:
        try:
            with self._lent.used():
                if self._lent.file is None:
                    if self._path.exists() and not self._path.is_file():
                        raise PrefixCacheError(f"cannot write {self._path}: it is no regular file")
                    number, self._name = tempfile.mkstemp(prefix=".prefixes-", dir=self._path.parent)
                    self._lent.file = os.fdopen(number, "wb")
                    self._lent.file.write(self._header(len(self._catalogue.before)))  # one that is as long
                yield self._lent.file
        except OSError as error:
            raise PrefixCacheError(f"cannot write {self._path}: {error.strerror or error}") from error

    def _header(self, count: int) -> bytes:
        """What a file of safetensors with so many blocks begins with, as long as that with all blocks.

        The library has no way to write one piece by piece.
        """
        text = self._about(count)
        length = len(self._about(len(self._catalogue.before)))
        length += -length % 8
        return length.to_bytes(8, "little") + text.ljust(length)

    def _about(self, count: int) -> bytes:
        parts = self._catalogue.parts
        identity, places = json.dumps(dict(self._identity)), json.dumps(dict(parts))
        about: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "identity": identity, "parts": places}}
        at = 0
        for name, shape, itemsize in (
            ("content", (count, sum(parts.values())), 1),
            ("tokens", (count, self._catalogue.tokens.shape[1]), 4),
            ("before", (count,), 4),
        ):
            size = math.prod(shape) * itemsize
            about[name] = {"dtype": _DTYPES[name], "shape": shape, "data_offsets": [at, at + size]}
            at += size
        return json.dumps(about).encode()


class PrefixReader:
    """Reads a file piece by piece: first its `catalogue`. Whoever has done with it calls `close`, from any thread.

    Args:
        path: Which.
        identity: That of the model that it is for.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self._path = path
        self._identity = identity
        self._lent = _Lent()
        self._content = 0, 0  # where it begins, and how many bytes a block has

    def catalogue(self) -> Catalogue:
        """What is in the file.

        Raises:
            PrefixCacheError: It is missing or damaged, or of another model.
        """
        with self._told():
            if self._path.exists() and not self._path.is_file():  # others may keep whoever opens them waiting
                raise PrefixCacheError(f"{self._path} is no regular file")
            file = self._lent.file = self._path.open("rb")
            arrays, about = _layout(file)
            if about.get("format") != _FORMAT:
                raise PrefixCacheError(f"{self._path} is not a prefix cache that this version writes")
            stated = dict(json.loads(about["identity"]))
            if other := [name for name, value in self._identity.items() if stated.get(name) != value]:
                raise PrefixCacheError(
                    f"{self._path} is of other keys and values than the loaded model's: it differs in "
                    f"{', '.join(other)}"
                )
            found = Catalogue(_numbers(file, arrays["tokens"]), _numbers(file, arrays["before"]), _parts(about))
            content = arrays["content"]
            _check(found, content.shape)
            self._content = content.start, content.shape[1]
            return found

    def rows(self, piece: slice) -> NDArray[np.uint8]:
        """(blocks, bytes) what the KV cache has for a piece of the catalogue.

        Raises:
            PrefixCacheError: It cannot be read.
        """
        with self._told():
            start, width = self._content
            assert self._lent.file is not None
            self._lent.file.seek(start + piece.start * width)
            rows = np.empty((piece.stop - piece.start, width), dtype=np.uint8)
            _fill(rows, self._lent.file)
            return rows

    def close(self) -> None:
        """Lets the file go."""
        self._lent.give_up()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with self._lent.used():
                yield
        except FileNotFoundError as error:
            raise PrefixCacheError(f"there is no file {self._path}") from error
        except OSError as error:
            raise PrefixCacheError(f"cannot read {self._path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PrefixCacheError(f"{self._path} is damaged, or not a prefix cache: {error}") from error


class _Array(NamedTuple):
    """Where an array of a file begins, in bytes, and its shape."""

    start: int
    shape: tuple[int, ...]


def _layout(file: BinaryIO) -> tuple[dict[str, _Array], dict[str, str]]:
    """The arrays of a file of safetensors, and what it says of itself."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError("it ends before its header")
    entries = json.loads(file.read(length))
    about = entries.pop("__metadata__", {})
    if entries.keys() != _DTYPES.keys():
        raise ValueError(f"it has {', '.join(sorted(entries))[:80] or 'nothing'}")
    arrays, left = dict[str, _Array](), size - 8 - length
    for name, entry in entries.items():
        shape, (start, end) = entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
        if entry["dtype"] != _DTYPES[name] or len(shape) != (1 if name == "before" else 2):
            raise ValueError(f"{name} is malformed")
        if any(type(number) is not int or not 0 <= number < _LARGEST for number in numbers):
            raise ValueError(f"{name} is malformed")
        nbytes = math.prod(shape) * (1 if name == "content" else 4)
        if end - start != nbytes or end > size - 8 - length:
            raise ValueError(f"{name} is cut off")
        arrays[name], left = _Array(8 + length + start, tuple(shape)), left - nbytes
    if left:
        raise ValueError("its arrays are not all that there is")
    return arrays, about


def _numbers(file: BinaryIO, array: _Array) -> Int32:
    file.seek(array.start)
    numbers = np.empty(array.shape, dtype=np.int32)
    _fill(numbers, file)
    return numbers


def _fill(array: NDArray[Any], file: BinaryIO) -> None:
    if array.size and file.readinto(array.data) != array.nbytes:  # type: ignore[attr-defined]
        raise ValueError("it was cut off while it was read")


def _parts(about: Mapping[str, str]) -> dict[str, int]:
    parts = dict(json.loads(about["parts"]))
    if any(type(size) is not int or not 0 < size < _LARGEST for size in parts.values()):
        raise ValueError("its parts are malformed")
    return parts


def _check(found: Catalogue, content: tuple[int, ...]) -> None:
    tokens, before, count = found.tokens, found.before, len(found.before)
    if len(tokens) != count or content != (count, sum(found.parts.values())):
        raise ValueError("its arrays are of different numbers of blocks")
    if (before < -1).any() or (before >= np.arange(count)).any() or (tokens < 0).any():
        raise ValueError("its blocks are in no order")
