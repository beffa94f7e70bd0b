"""Prefix caches as values and as files: safetensors, written by one rename. On worker threads; knows no torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from asyncengine.errors import PrefixCacheError
from asyncengine.step.batch import Int32

_FORMAT = "asyncengine prefix cache 1"
_CONTENT = "content."
_DTYPES = {"I32": np.int32, "U8": np.uint8}
_LONGEST_HEADER = 1 << 24
_PAGE = 4096
"""Bytes that a system reads at once, at least."""


@dataclass(frozen=True, slots=True, eq=False)
class Catalogue:
    """Whole blocks of computed prompts. Those of which one follows another come after it, and what was used last first.

    Attributes:
        tokens: (blocks, page size) int32: their tokens.
        before: (blocks,) int32: which block each follows; -1 for the first of a prompt.
        parts: By name, how many bytes each part of the KV cache has for a block.
    """

    tokens: Int32
    before: Int32
    parts: Mapping[str, int]

    @property
    def num_tokens(self) -> int:
        """How many tokens there are in all."""
        return self.tokens.size


@dataclass(frozen=True, slots=True, eq=False)
class KeptPrefixes:
    """A catalogue, and what it is of.

    Attributes:
        catalogue: It.
        content: By name, (blocks, bytes) uint8: what a part of the KV cache has for each.
    """

    catalogue: Catalogue
    content: Mapping[str, NDArray[np.uint8]]


class PrefixWriter:
    """Writes a file part by part, so that one part at a time is in memory; it is there once it is whole.

    Nothing is written before the first `add`. Whoever gives up calls `discard`, from any thread: where another one is
    just writing, that one leaves nothing behind.

    Args:
        path: Where; a file that is there is replaced.
        catalogue: What goes into it.
        identity: As `asyncengine.step.model.LoadedModel.prefix_identity` gives it.
    """

    def __init__(self, path: Path, catalogue: Catalogue, identity: Mapping[str, str]) -> None:
        self._path = path
        self._begin = [_header(catalogue, identity), catalogue.tokens, catalogue.before]
        self._file: BinaryIO | None = None
        self._name = ""
        self._writing = threading.Lock()
        self._discarded = False

    def add(self, rows: NDArray[Any]) -> None:
        """Writes the next part.

        Raises:
            PrefixCacheError: It cannot be written.
        """
        with self._told():
            if self._file is None:
                number, self._name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
                self._file = os.fdopen(number, "wb")
            for array in (*self._begin, rows):
                self._file.write(np.ascontiguousarray(array).data)
            self._begin = []

    def commit(self) -> None:
        """Puts the file into its place.

        Raises:
            PrefixCacheError: It cannot be written.
        """
        with self._told():
            assert self._file is not None
            self._file.close()
            if not self._discarded:
                os.replace(self._name, self._path)

    def discard(self) -> None:
        """Leaves nothing behind, unless the file is in its place."""
        self._discarded = True
        self._clear()

    def _clear(self) -> None:
        if self._discarded and self._file is not None and self._writing.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError):
                    self._file.close()
                    os.unlink(self._name)
            finally:
                self._writing.release()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with self._writing:
                yield
        except OSError as error:
            raise PrefixCacheError(f"cannot write {self._path}: {error.strerror or error}") from error
        finally:
            self._clear()  # who has discarded it meanwhile could not


def _header(catalogue: Catalogue, identity: Mapping[str, str]) -> NDArray[np.uint8]:
    """What a file of safetensors begins with: the library has no way to write one part by part."""
    count = len(catalogue.before)
    arrays: dict[str, tuple[str, tuple[int, ...], int]] = {
        name: ("I32", array.shape, array.nbytes)
        for name, array in (("tokens", catalogue.tokens), ("before", catalogue.before))
    }
    arrays |= {f"{_CONTENT}{name}": ("U8", (count, size), count * size) for name, size in catalogue.parts.items()}
    about: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "identity": json.dumps(dict(identity))}}
    at = 0
    for name, (dtype, shape, size) in arrays.items():
        about[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)
    return np.frombuffer(len(text).to_bytes(8, "little") + text, dtype=np.uint8)


def read(path: Path, identity: Mapping[str, str]) -> KeptPrefixes:
    """Reads a file; what it has of keys and values stays where the system has it in memory.

    Args:
        path: Which.
        identity: That of the model that it is for.

    Raises:
        PrefixCacheError: It is missing or damaged, or of another model.
    """
    try:
        with path.open("rb") as file:
            arrays, about = _arrays(file)
            if about.get("format") != _FORMAT:
                raise PrefixCacheError(f"{path} is not a prefix cache that this version writes")
            _check(path, dict(json.loads(about["identity"])), identity)
            return _kept(arrays)
    except FileNotFoundError as error:
        raise PrefixCacheError(f"there is no file {path}") from error
    except OSError as error:
        raise PrefixCacheError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PrefixCacheError(f"{path} is damaged, or not a prefix cache: {error}") from error


def _arrays(file: BinaryIO) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The arrays of a file of safetensors, mapped into memory, and what it says of itself."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError("it ends before its header")
    entries = json.loads(file.read(length))
    about = entries.pop("__metadata__", {})
    arrays = dict[str, NDArray[Any]]()
    for name, entry in entries.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is malformed")
        dtype, shape, (start, end) = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        if not 0 <= start <= end <= size - 8 - length or math.prod(shape) * dtype.itemsize != end - start:
            raise ValueError(f"{name} is cut off")
        rows = np.empty(shape, dtype)
        if end > start:
            rows = np.memmap(file, dtype, "r", 8 + length + start, shape)
            rows.reshape(-1)[:: _PAGE // dtype.itemsize].max()  # it is read here, and not where steps wait for it
        arrays[name] = rows
    return arrays, about


def _check(path: Path, stated: Mapping[str, str], identity: Mapping[str, str]) -> None:
    other = [name for name, value in identity.items() if stated.get(name) != value]
    if other:
        raise PrefixCacheError(
            f"{path} is of other keys and values than the loaded model's: it differs in {', '.join(other)}"
        )


def _kept(arrays: dict[str, NDArray[Any]]) -> KeptPrefixes:
    tokens, before = np.array(arrays.pop("tokens")), np.array(arrays.pop("before"))
    content = {name.removeprefix(_CONTENT): rows for name, rows in arrays.items()}
    count = len(before)
    if tokens.dtype != np.int32 or before.dtype != np.int32 or tokens.ndim != 2 or before.shape != (count,):
        raise ValueError("its tokens are malformed")
    if len(tokens) != count or (before < -1).any() or (before >= np.arange(count)).any() or (tokens < 0).any():
        raise ValueError("its blocks are in no order")
    if any(rows.dtype != np.uint8 or rows.ndim != 2 or len(rows) != count for rows in content.values()):
        raise ValueError("its content is malformed")
    return KeptPrefixes(Catalogue(tokens, before, {name: rows.shape[1] for name, rows in content.items()}), content)
