"""The header of a GGUF file: what its metadata says, and where its tensors are. Reads no tensor."""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.gguf.blocks import TYPES, BlockType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
"""The first counted in 32 bits, and no file of it is about."""
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The letters of `struct` for kinds of values."""
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_MOST_VALUES = 1 << 22
"""Of an array: a vocabulary has some hundred thousand tokens, and as many merges."""
_Stamp = tuple[int, int, int, int]
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """One tensor.

    Attributes:
        name: As llama.cpp calls it.
        type_id: What its blocks are, as ggml numbers the kinds.
        shape: As torch has it: the last dimension is the one along which numbers lie side by side.
        file: Where it is.
        start: Its first byte there.
        scale: What its numbers are to be multiplied with, one number or one for each of its first dimension.
    """

    name: str
    type_id: int
    shape: tuple[int, ...]
    file: Path
    start: int
    scale: BlockTensor | None = None

    @property
    def blocks(self) -> BlockType:
        """What its blocks are."""
        return TYPES[self.type_id]

    @property
    def row_bytes(self) -> int:
        """Bytes of what lies along the last dimension."""
        return self.shape[-1] // self.blocks.numbers * self.blocks.nbytes

    @property
    def rows(self) -> int:
        """How many of those there are."""
        return prod(self.shape[:-1])

    def part(self, first: int, count: int) -> BlockTensor:
        """Some of what lies along the first dimension.

        Raises:
            CheckpointError: There are not so many.
        """
        if min(first, count) < 0 or first + count > self.shape[0]:
            raise CheckpointError(f"{self.name} of shape {self.shape} has no {count} from {first}")
        nbytes = self.rows * self.row_bytes // self.shape[0]
        return dataclasses.replace(self, shape=(count, *self.shape[1:]), start=self.start + first * nbytes)


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a model in one or several GGUF files.

    Attributes:
        metadata: By key, of the first file; arrays are lists.
        tensors: Of all files, by name.
        files: All of them, with what changes when one does.
        digest: Of all that their headers say.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, BlockTensor]
    files: Mapping[Path, _Stamp]
    digest: str

    def check_unchanged(self) -> None:
        """Whether the files are those that it was read from.

        Raises:
            CheckpointError: One was replaced, written to or removed.
        """
        for file, stamp in self.files.items():
            try:
                same = _stamp(file.stat()) == stamp
            except OSError as error:
                raise CheckpointError(f"{file} was removed while it was loaded: {error}") from error
            if not same:
                raise CheckpointError(f"{file} was replaced or written to while it was loaded")


def read_header(file: Path) -> Header:
    """Reads the header of a file, and those of the others if it is the first of several.

    Raises:
        CheckpointError: One of them is missing, damaged or shorter than it says, or it is not the first.
        UnsupportedModelError: It has tensors of a kind that is not known here.
    """
    files = _parts(file)
    metadata, tensors, stamp, digest = _read(files[0])
    stamps, digests = {files[0]: stamp}, [digest]
    if (count := metadata.get("split.count", 1)) not in (0, len(files)):
        raise CheckpointError(f"{file} is one of {count} files, and is not called as such")
    for other in files[1:]:
        _, of_other, stamps[other], digest = _read(other)
        digests.append(digest)
        if twice := tensors.keys() & of_other.keys():
            raise CheckpointError(f"{other} has tensors that an earlier file has: {min(twice)}, ...")
        tensors |= of_other
    if (stated := metadata.get("split.tensors.count", len(tensors))) != len(tensors):
        raise CheckpointError(f"{file} and those that follow have {len(tensors)} tensors, where it says {stated}")
    return Header(metadata, tensors, stamps, hashlib.sha256("".join(digests).encode()).hexdigest())


def _parts(file: Path) -> tuple[Path, ...]:
    """The files of a model, of which the first is given."""
    if (found := _PART.fullmatch(file.name)) is None:
        return (file,)
    name, index, count = found[1], int(found[2]), int(found[3])
    if index != 1:
        raise CheckpointError(f"{file} is part {index} of {count}; name the first, {name}-00001-of-{found[3]}.gguf")
    files = tuple(file.with_name(f"{name}-{part:05}-of-{found[3]}.gguf") for part in range(1, count + 1))
    if missing := [part.name for part in files if not part.exists()]:
        raise CheckpointError(f"{file.parent}: {len(missing)} of {count} files are missing: {missing[0]}, ...")
    return files


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(file: Path) -> tuple[dict[str, Any], dict[str, BlockTensor], _Stamp, str]:
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            metadata, tensors, digest = _Reader(file, content).header()
            return metadata, tensors, _stamp(os.fstat(stream.fileno())), digest
    except (OSError, ValueError, LookupError, struct.error, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{file} is damaged or incomplete: {error}") from error


class _Reader:
    """Reads one file from its beginning."""

    def __init__(self, file: Path, content: mmap.mmap) -> None:
        self._file = file
        self._content = content
        self._at = 0

    def header(self) -> tuple[dict[str, Any], dict[str, BlockTensor], str]:
        if self._content[:4] != _MAGIC:
            raise CheckpointError(f"{self._file} is not a GGUF file: it begins with {self._content[:4]!r}")
        self._at = 4
        (version,) = self._numbers("I")
        if version not in _VERSIONS:
            what = "in the byte order of another processor" if version >> 16 else f"of version {version}"
            raise UnsupportedModelError(f"{self._file} is a GGUF file {what}; versions 2 and 3 can be read")
        tensors, values = self._numbers("QQ")
        metadata = {}
        for _ in range(values):
            key = self._string()
            metadata[key] = self._value(*self._numbers("I"))
        entries = [(self._string(), self._dimensions(), *self._numbers("IQ")) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        found = {name: self._tensor(name, shape, kind, start + offset) for name, shape, kind, offset in entries}
        if len(found) != tensors:
            raise ValueError("tensors of the same name")
        return metadata, found, hashlib.sha256(self._content[: self._at]).hexdigest()

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> BlockTensor:
        if kind not in TYPES:
            known = ", ".join(sorted(each.name for each in TYPES.values()))
            raise UnsupportedModelError(
                f"{self._file}: {name} is of ggml's type {kind}, which is not known here; known: {known}"
            )
        tensor = BlockTensor(name, kind, shape, self._file, start)
        if shape[-1] % tensor.blocks.numbers:
            raise ValueError(f"{name} of shape {shape} in blocks of {tensor.blocks.numbers}")
        if start + tensor.rows * tensor.row_bytes > len(self._content):
            raise ValueError(f"{len(self._content)} bytes; {name} would end behind them")
        return tensor

    def _numbers(self, letters: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{letters}", self._content, self._at)
        self._at += struct.calcsize(f"<{letters}")
        return found

    def _string(self) -> str:
        (length,) = self._numbers("Q")
        end = self._at + length
        if end > len(self._content):
            raise ValueError(f"a string of {length} bytes in a file of {len(self._content)}")
        text, self._at = self._content[self._at : end].decode("utf-8", "replace"), end
        return text

    def _dimensions(self) -> tuple[int, ...]:
        (count,) = self._numbers("I")
        if not 0 < count <= _MOST_DIMENSIONS:
            raise ValueError(f"a tensor with {count} dimensions")
        return self._numbers(f"{count}Q")[::-1]

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"a value of kind {kind}")
        of, count = self._numbers("IQ")
        if count > _MOST_VALUES:
            raise ValueError(f"an array of {count} values")
        if of in _NUMBERS:
            return list(self._numbers(f"{count}{_NUMBERS[of]}"))
        if of != _STRING:
            raise ValueError(f"an array of values of kind {of}")
        return self._strings(count)

    def _strings(self, count: int) -> list[str]:
        """As many strings, one after the other: a vocabulary has hundreds of thousands."""
        found, at, content, unpack = [], self._at, self._content, struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = at + 8
            at = start + unpack(content, at)[0]
            found.append(content[start:at].decode("utf-8", "replace"))
        if at > len(content):
            raise ValueError(f"strings end behind its {len(content)} bytes")
        self._at = at
        return found
