"""The text files of a checkpoint: what each of them must be. transformers' own errors do not say in which it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from asyncengine.errors import CheckpointError

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
"""Large ones, which are not read twice without need."""
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def check_settings(path: Path) -> None:
    """Refuses a directory whose tokenizer could not be loaded, as far as its small files tell.

    Raises:
        CheckpointError: One is damaged.
    """
    _check(path, (*_SETTINGS, *_TEMPLATES))


def check_processors(path: Path) -> None:
    """The same of what prepares images, audio and videos."""
    _check(path, PROCESSORS)


def check_tokenizer(path: Path) -> None:
    """The same of all that a tokenizer is made of. Takes as long as reading its vocabulary."""
    _check(path, (*_SETTINGS, *_TEMPLATES, *_VOCABULARIES))
    file = path / "tokenizer.json"
    if file.exists() and not part_of(file, "model"):
        raise CheckpointError(f"{file} has no model, as one of the tokenizers library has")


def part_of(path: Path, name: str) -> dict[str, Any]:
    """An object within a file; an empty one if there is none.

    Raises:
        CheckpointError: There is something else.
    """
    found = json_in(path, {}).get(name) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {name} is a JSON {type(found).__name__}; expected an object")
    return found


def json_in(path: Path, otherwise: Any) -> Any:
    """What a file has, of the type of `otherwise`, which is what stands for a file that is not there.

    Raises:
        CheckpointError: It cannot be read, or has something else.
    """
    text = _text_in(path)
    if text is None:
        return otherwise
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if type(values) is not type(otherwise):
        raise CheckpointError(f"{path} is a JSON {type(values).__name__}; expected a {type(otherwise).__name__}")
    return values


def _text_in(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {words}") from error


def _check(path: Path, names: Iterable[str]) -> None:
    for name in names:
        for file in path.glob(name):
            if file.suffix == ".json":
                json_in(file, {})
            else:
                _text_in(file)
