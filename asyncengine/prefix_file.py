"""Prefix caches as values and as files: safetensors, written by one rename. On worker threads; knows no torch."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncengine.errors import PrefixCacheError
from asyncengine.step.batch import Int32

_FORMAT = "asyncengine prefix cache 1"


@dataclass(frozen=True, slots=True, eq=False)
class KeptPrefixes:
    """Whole blocks of computed prompts. Those of which one follows another come after it, and what was used last first.

    Attributes:
        tokens: (blocks, page size) int32: their tokens.
        before: (blocks,) int32: which block each follows; -1 for the first of a prompt.
        content: By name, (blocks, bytes) uint8: what a part of the KV cache has for each.
    """

    tokens: Int32
    before: Int32
    content: Mapping[str, NDArray[np.uint8]]

    @property
    def num_tokens(self) -> int:
        """How many tokens there are in all."""
        return self.tokens.size


def write(path: Path, kept: KeptPrefixes, identity: Mapping[str, str]) -> None:
    """Writes a file, in place of one that is there.

    Args:
        path: Where.
        kept: What goes into it.
        identity: As `asyncengine.step.model.KeepingModel.identity`.

    Raises:
        PrefixCacheError: It cannot be written.
    """
    from safetensors.numpy import save_file

    arrays: dict[str, Any] = {"tokens": kept.tokens, "before": kept.before}
    arrays |= {f"content.{name}": rows for name, rows in kept.content.items()}
    about = {"format": _FORMAT, "identity": json.dumps(dict(identity))}
    try:
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(number)
        try:
            save_file(arrays, name, about)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise PrefixCacheError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: Path, identity: Mapping[str, str]) -> KeptPrefixes:
    """Reads a file.

    Args:
        path: Which.
        identity: That of the model that it is for.

    Raises:
        PrefixCacheError: It is missing or damaged, or of another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise PrefixCacheError(f"{path} is not a prefix cache that this version writes")
            _check(path, dict(json.loads(about["identity"])), identity)
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _kept(arrays)
    except FileNotFoundError as error:
        raise PrefixCacheError(f"there is no file {path}") from error
    except OSError as error:
        raise PrefixCacheError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PrefixCacheError(f"{path} is damaged, or not a prefix cache: {error}") from error


def _check(path: Path, stated: Mapping[str, str], identity: Mapping[str, str]) -> None:
    other = [name for name, value in identity.items() if stated.get(name) != value]
    if other:
        raise PrefixCacheError(
            f"{path} is of other keys and values than the loaded model's: it differs in {', '.join(other)}"
        )


def _kept(arrays: dict[str, Any]) -> KeptPrefixes:
    tokens, before = arrays.pop("tokens"), arrays.pop("before")
    content = {name.removeprefix("content."): rows for name, rows in arrays.items()}
    count = len(before)
    order = np.arange(count)
    if tokens.dtype != np.int32 or before.dtype != np.int32 or tokens.ndim != 2 or before.shape != (count,):
        raise ValueError("its tokens are malformed")
    if len(tokens) != count or (before < -1).any() or (before >= order).any() or (tokens < 0).any():
        raise ValueError("its blocks are in no order")
    if any(rows.dtype != np.uint8 or rows.ndim != 2 or len(rows) != count for rows in content.values()):
        raise ValueError("its content is malformed")
    return KeptPrefixes(tokens, before, content)
