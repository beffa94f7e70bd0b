"""The adapters of the loaded model: by which number the model knows each, and whose part of the prefix cache is which.

Owned by the step thread. What an adapter is to the model, this does not know.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

NO_SPACE = 0
"""The part of the prefix cache that was computed without an adapter."""
NO_ADAPTER = -1
"""Stands for the index of an adapter where there is none."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, as it was loaded last.

    Attributes:
        name: What requests call it.
        index: What the model calls it: 0, 1, ..., and the same after it was loaded anew.
        space: The part of the prefix cache that was computed with it; another one after it was loaded anew.
        prepared: It, as the model takes it.
    """

    name: str
    index: int
    space: int
    prepared: Any


class AdapterTable:
    """The adapters of one model.

    Args:
        loaded: Name and `Adapter.prepared` of those that came with the model, which knows them as 0, 1, and so on.
    """

    def __init__(self, loaded: Iterable[tuple[str, Any]] = ()) -> None:
        self._spaces = itertools.count(NO_SPACE + 1)
        self._adapters: dict[str, Adapter] = {}
        for index, (name, prepared) in enumerate(loaded):
            self.put(name, index, prepared)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in the order in which they were loaded first."""
        return tuple(self._adapters)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def get(self, name: str | None) -> Adapter | None:
        """The adapter of that name, if there is one."""
        return None if name is None else self._adapters.get(name)

    def index_for(self, name: str) -> int:
        """The index of an adapter that is to be loaded: its own if it is loaded already, else the lowest free one."""
        if name in self._adapters:
            return self._adapters[name].index
        taken = {adapter.index for adapter in self._adapters.values()}
        return next(index for index in itertools.count() if index not in taken)

    def put(self, name: str, index: int, prepared: Any) -> Adapter:
        """Notes that the model has an adapter; returns it."""
        adapter = self._adapters[name] = Adapter(name, index, next(self._spaces), prepared)
        return adapter

    def remove(self, name: str) -> None:
        """Notes that the model has it no longer."""
        del self._adapters[name]


def unknown_adapter(name: str, loaded: tuple[str, ...]) -> str:
    """What to say of a request for an adapter that is not there."""
    return f"adapter is {name!r}; loaded: {', '.join(map(repr, loaded)) or 'none'}"
