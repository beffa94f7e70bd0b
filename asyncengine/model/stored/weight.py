"""A weight that a checkpoint stores as codes, in several tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open

from asyncengine.errors import CheckpointError
from asyncengine.model.quantised.eight_bits import EightBits
from asyncengine.model.quantised.four_bits import GROUP, FourBits
from asyncengine.model.stored.tensor import SIZES, StoredTensor

Parts = Mapping[str, torch.Tensor]
Decoded = torch.Tensor | FourBits | EightBits
"""Numbers in float32, or codes and what they stand for."""
Form = Literal["none", "int4", "int8", "fp8"]
"""What codes can be kept as, by the names of `EngineConfig.quantization`."""
_Made = TypeVar("_Made")
OF_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")
"""The names of the weights of experts that are stored one by one."""


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """One parameter of a model.

    Attributes:
        name: Of the parameter.
        shape: Its shape.
        parts: The tensors that it is stored in, by what they are.
        decode: Makes of their contents numbers in float32 of that shape, or codes.
        form: What it can be expected to be kept as.
        rounded: Whether it is rounded once more where it is kept so.
        experts: How many matrices there are, one after the other in what `decode` returns; 0 if it is one.
        transposed: Whether each of them, or the one, has its dimensions the other way round in the parameter.
        scale_nbytes: Bytes of scales and zeros of 32 codes where it is multiplied on the CPU; 0 if only `parts` tell.
        decode_bytes: Makes of their contents codes of eight bits, where the form is "int8" and `decode` makes numbers.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, StoredTensor]
    decode: Callable[[Parts], Decoded]
    form: Form = "none"
    rounded: bool = False
    experts: int = 0
    transposed: bool = False
    scale_nbytes: int = 0
    decode_bytes: Callable[[Parts], EightBits] | None = None

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it is stored in."""
        return sum(prod(part.shape) * SIZES.get(part.dtype, 1) for part in self.parts.values())

    def belongs_to(self, names: Collection[str]) -> bool:
        """Whether it is one of these parameters; a checkpoint may leave the beginning of a name out."""
        return self.name in names or any(name.endswith(f".{self.name}") for name in names)

    def turned(self) -> CodedWeight:
        """The same for a parameter with inputs and outputs the other way round, which can have no codes."""
        return dataclasses.replace(self, shape=self.shape[::-1], transposed=True, form="none")

    @property
    def kept_nbytes(self) -> int:
        """Bytes that it takes where it stays codes."""
        return self.size + self.size // GROUP * self.scale_nbytes if self.form == "int8" else self.nbytes

    def stays(self, forms: Collection[str]) -> bool:
        """Whether it stays codes, where those of some forms do, as `Checkpoint.kept_forms` says them."""
        single = OF_EXPERT.fullmatch(self.name) is not None
        return self.form != "none" and self.form in forms and (self.form == "int4" or not single)

    def read(self, files: OpenFiles) -> Decoded:
        """What `decode` makes of it.

        Raises:
            CheckpointError: Its tensors do not fit each other.
        """
        return self._made(self.decode, files)

    def read_bytes(self, files: OpenFiles) -> EightBits:
        """What `decode_bytes` makes of it, where the form is "int8".

        Raises:
            CheckpointError: As `read`.
        """
        assert self.decode_bytes is not None
        return self._made(self.decode_bytes, files)

    def _made(self, decode: Callable[[Parts], _Made], files: OpenFiles) -> _Made:
        try:
            return decode({what: files.tensor(part) for what, part in self.parts.items()})
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            shapes = ", ".join(f"{part.name} {part.shape} {part.dtype}" for part in self.parts.values())
            raise CheckpointError(f"{self.name} cannot be made of what is stored: {shapes}: {error}") from error

    def numbers(self, files: OpenFiles, dtype: torch.dtype) -> torch.Tensor:
        """The parameter in `dtype`, rounded once."""
        read = self.read(files)
        found = read.to(dtype) if isinstance(read, torch.Tensor) else read.weight(dtype)
        if self.experts:
            found = found.view(self.experts, -1, found.shape[-1])
        if self.transposed:
            found = found.transpose(-1, -2).contiguous()
        if tuple(found.shape) != self.shape:
            raise CheckpointError(f"{self.name} is {tuple(found.shape)} as it is stored; expected {self.shape}")
        return found


class OpenFiles:
    """Weight files, mapped; several threads may read."""

    def __init__(self) -> None:
        self._files: dict[Any, Any] = {}

    def tensor(self, part: StoredTensor) -> torch.Tensor:
        """A tensor's contents."""
        if part.file.suffix != ".safetensors":
            return self._bytes(part)
        if part.file not in self._files:
            self._files[part.file] = safe_open(part.file, framework="pt")
        found: torch.Tensor = self._files[part.file].get_tensor(part.name)
        return found

    def _bytes(self, part: StoredTensor) -> torch.Tensor:
        """Of a file that has no names for its bytes."""
        if part.file not in self._files:
            try:
                size = part.file.stat().st_size
                self._files[part.file] = torch.from_file(str(part.file), shared=False, size=size, dtype=torch.uint8)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"{part.file} cannot be read: {error}") from error
        found: torch.Tensor = self._files[part.file]
        return found[part.start : part.start + prod(part.shape)].view(part.shape)


class Lazy:
    """Stands for a tensor in what transformers loads from, and is read when that asks for it, on whatever thread.

    Args:
        read: Returns the tensor.
        shape: Its shape.
    """

    def __init__(self, read: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> None:
        self._read = read
        self.shape = torch.Size(shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The whole tensor, or some of it."""
        return self._read()[index]


def state_of(plain: Sequence[StoredTensor], coded: Iterable[CodedWeight], dtype: torch.dtype) -> dict[str, Lazy]:
    """All parameters by name, each of them read when it is asked for."""
    files = OpenFiles()
    state = {part.name: Lazy(partial(files.tensor, part), part.shape) for part in plain}
    return state | {weight.name: Lazy(partial(weight.numbers, files, dtype), weight.shape) for weight in coded}
