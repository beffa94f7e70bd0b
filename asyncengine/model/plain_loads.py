"""What is the same in loads of models that run as transformers has them: encoders, and those that hear."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig

from asyncengine.config import EngineConfig
from asyncengine.errors import InsufficientMemoryError, ReloadError, UnsupportedModelError
from asyncengine.model import memory
from asyncengine.model.letting_go import take_apart
from asyncengine.model.load_check import Details
from asyncengine.model.load_report import cannot_load, check_weights, loaded
from asyncengine.model.rehearsal import rehearsed


def stated_config(checkpoint: Any, what: str) -> Any:
    """A checkpoint's configuration, as transformers reads it.

    Args:
        checkpoint: An `asyncengine.model.checkpoint.Checkpoint`.
        what: Kind of its model, with an article.

    Raises:
        UnsupportedModelError: transformers does not read it, or the weights are codes.
    """
    try:
        found = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except Exception as error:
        raise UnsupportedModelError(
            f"{checkpoint.name}: transformers cannot read its configuration: {error}"
        ) from error
    if checkpoint.coded:
        raise UnsupportedModelError(f"{checkpoint.name} is {what}; quantised ones cannot be served")
    return found


def rehearse(details: Details, kind: Any, **arguments: Any) -> None:
    """Refuses weights that are not those of a model, as far as headers tell.

    Args:
        details: Of the load.
        kind: transformers' class.
        arguments: Further ones of `from_pretrained`.

    Raises:
        CheckpointError: As it says.
    """
    checkpoint = details.checkpoint
    if checkpoint.tensors:  # there are no headers in pickles
        found = rehearsed(checkpoint, kind, checkpoint.shapes, details.hf_config, details.dtype, **arguments)
        if found is not None:
            check_weights(checkpoint, found[1])


def with_weights(details: Details, kind: Any, **arguments: Any) -> Any:
    """A model with its weights, on its device; arguments and errors as those of `rehearse`."""
    checkpoint = details.checkpoint
    try:
        model, report = loaded(kind, checkpoint.path, config=details.hf_config, dtype=details.dtype, **arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise cannot_load(checkpoint, error) from error
    check_weights(checkpoint, report)
    checkpoint.check_unchanged()
    return model.to(details.device).eval().requires_grad_(False)


@contextmanager
def loading(config: EngineConfig, checkpoint: Any) -> Iterator[list[Any]]:
    """Loads a model within the block, which appends it to the list as soon as it is there.

    Raises:
        ReloadError: The block has raised something; the model is let go.
    """
    made: list[Any] = []
    try:
        yield made
    except BaseException as error:
        for model in made:
            take_apart(model)
        if isinstance(error, torch.OutOfMemoryError):
            raise InsufficientMemoryError(f"loading {config.model!r}: {error}") from error
        if isinstance(error, ReloadError) or not isinstance(error, Exception):
            raise
        raise ReloadError(f"loading {config.model!r} failed: {error}") from error
    finally:
        checkpoint.stop_reading_ahead()
        memory.give_back()
