"""How a weight of a model that serves is replaced, and put back if that fails half-way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncengine.errors import ReloadError
from asyncengine.model.text_names import name_in


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes a parameter's new value into one of its places.

    Attributes:
        write: Takes the whole parameter.
        keep: Returns what puts the present contents back.
    """

    write: Callable[[torch.Tensor], object]
    keep: Callable[[], Callable[[], object]]


def restorer(*tensors: torch.Tensor | None) -> Callable[[], None]:
    """What puts the present contents of tensors back."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors if tensor is not None]

    def restore() -> None:
        for tensor, old in kept:
            tensor.copy_(old)

    return restore


def in_place(target: torch.Tensor) -> Writer:
    """Writes into the parameter itself."""
    return Writer(target.copy_, functools.partial(restorer, target))


def replace_weights(
    model: nn.Module,
    weights: Mapping[str, Any],
    writers: Mapping[int, Sequence[Writer]],
    taken_for: Mapping[int, tuple[torch.Size, torch.dtype]],
) -> None:
    """Replaces weights of a model in place: all of them, or none. The old values are kept until all are there.

    Args:
        model: It.
        weights: The new values, by name.
        writers: Where parameters are kept besides, by the ``id`` of each.
        taken_for: What new values must be like of those that are kept in another form, by the ``id`` of each.

    Raises:
        ReloadError: A name, shape or dtype does not fit, or a value cannot be written.
    """
    if not isinstance(weights, Mapping):
        raise ReloadError(f"weights is a {type(weights).__name__}; expected tensors by their names")
    known: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    known.update(model.named_buffers(remove_duplicate=False))
    for name, value in weights.items():
        target = known.get(name_in(name, known)) if isinstance(name, str) else None
        if target is None:
            raise ReloadError(f"weight {name!r} is not in the model")
        if not isinstance(value, torch.Tensor):
            raise ReloadError(f"weight {name!r} is a {type(value).__name__}; expected a torch.Tensor")
        shape, dtype = taken_for.get(id(target), (target.shape, target.dtype))
        if value.shape != shape or value.dtype != dtype:
            found = f"{tuple(value.shape)} of {value.dtype}"
            raise ReloadError(f"weight {name!r} is {found}; the model's is {tuple(shape)} of {dtype}")
    restores: list[Callable[[], object]] = []
    with torch.inference_mode():
        try:
            for name, value in weights.items():
                target = known[name_in(name, known)]
                for writer in writers.get(id(target)) or [in_place(target)]:
                    restores.append(writer.keep())
                    writer.write(value)
        except Exception as error:
            for restore in reversed(restores):
                restore()
            raise ReloadError(f"replacing weights failed, none was replaced: {error}") from error
