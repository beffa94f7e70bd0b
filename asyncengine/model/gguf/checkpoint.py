"""A GGUF file as a checkpoint: its weights under the names that transformers has for them.

What else a checkpoint has, its configuration and its tokenizer, is written into a directory when the file is first
seen, and kept for the next load.
"""

from __future__ import annotations

from pathlib import Path

from asyncengine.config import Quantization
from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.checkpoint import Checkpoint
from asyncengine.model.gguf.description import directory_of
from asyncengine.model.gguf.facts import Facts
from asyncengine.model.gguf.families import family_of
from asyncengine.model.gguf.header import read_header


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint in a directory, or in a GGUF file.

    Raises:
        CheckpointError: Something is missing, truncated or unreadable.
        UnsupportedModelError: It is stored in a way, or of an architecture, that cannot be read.
    """
    return Checkpoint(path) if path.is_dir() else GgufCheckpoint(path)


def described(path: Path) -> Path:
    """The directory that has configuration and tokenizer of what `checkpoint_at` reads there."""
    return path if path.is_dir() else checkpoint_at(path).path


class GgufCheckpoint(Checkpoint):
    """As `Checkpoint`, of a GGUF file, or of several of which the first is given."""

    complete = True

    def __init__(self, file: Path) -> None:
        self._header = read_header(file)
        try:
            self._family = family_of(self._header)
            super().__init__(directory_of(self._header, self._family))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{file}: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: its metadata does not fit together: {error!r}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error
        self.name = str(file)

    def _read_headers(self) -> None:
        if "token_embd.weight" not in self._header.tensors:
            raise CheckpointError("it has no token_embd.weight, so it is a vocabulary or a part of a model")
        self.weight_files = list(self._header.files)
        placed = self._family.placed(Facts(self._header))
        self.coded = {each.name: each.weight() for each in placed}
        self.tensors = [part for weight in self.coded.values() for part in weight.parts.values()]
        self.plain = []

    def check_unchanged(self) -> None:
        """As the same of `Checkpoint`."""
        self._header.check_unchanged()

    @property
    def narrowest(self) -> Quantization:
        """As the same of `Checkpoint`, but any codes count: beside them all other matrices are kept in eight bits."""
        if any(weight.form == "int4" for weight in self.coded.values()):
            return "int4"
        blocks = any(tensor.blocks.numbers > 1 for tensor in self._header.tensors.values())
        return "int8" if blocks else "none"
