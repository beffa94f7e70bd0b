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


def in_place(target: torch.Tensor) -> Writer:
    """Writes into the parameter itself."""
    return Writer(target.copy_, lambda: functools.partial(target.copy_, target.detach().clone()))
