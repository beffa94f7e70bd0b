"""The tensors of safetensors files, by their headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from asyncengine.errors import CheckpointError

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Bytes of a number, by what a header calls its type."""
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Those that models compute in."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, by its header.

    Attributes:
        name: Its name.
        dtype: As the file says it.
        shape: Its shape.
        file: The file.
        start: The byte of the file at which it begins.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def aligned(self) -> bool:
        """Whether its numbers may be used where they are."""
        return self.start % SIZES.get(self.dtype, 1) == 0


def tensors_of(file: Path) -> Iterator[StoredTensor]:
    """Reads a safetensors header, and checks that the file is as long as it says."""
    if file.suffix != ".safetensors":
        return
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"{size} bytes; its header describes {end}")
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            each = SIZES.get(entry["dtype"])
            if each is not None and prod(shape) * each != end - begin:
                raise ValueError(f"{name} of shape {shape} in {end - begin} bytes")
            yield StoredTensor(name, entry["dtype"], shape, file, 8 + length + begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{file} is damaged or incomplete: {error}") from error
