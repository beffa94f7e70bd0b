"""How a weight of a model that serves is replaced, and put back if that fails half-way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch


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
