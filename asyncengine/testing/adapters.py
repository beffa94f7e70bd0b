"""Adapters of a scripted model: each is a script of its own. What is prepared is immutable."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncengine.errors import AdapterError
from asyncengine.step.adapters import NO_ADAPTER

Script = Callable[[Sequence[int], int], Iterable[int]]
"""Prompt and branch to the tokens that the branch generates; after them comes the end-of-sequence token."""

_stamps = itertools.count(1)


@dataclass(frozen=True, slots=True)
class ScriptedAdapter:
    """One adapter.

    Attributes:
        script: What is generated with it.
        stamp: Marks what was computed with it; no other adapter has it.
    """

    script: Script
    stamp: int = field(default_factory=lambda: next(_stamps))


class ScriptedFormat:
    """As `asyncengine.step.model.AdapterFormat`.

    Args:
        scripts: What there is in each "directory".
    """

    def __init__(self, scripts: Mapping[str, Script]) -> None:
        self._scripts = scripts

    def prepare(self, source: Any, config: Mapping[str, Any] | None) -> ScriptedAdapter:
        """As the protocol says. A script may stand for tensors."""
        script = source if callable(source) else self._scripts.get(source) if isinstance(source, str) else None
        if script is None:
            raise AdapterError(
                f"there is no scripted adapter {source!r:.80}; known: {', '.join(self._scripts) or 'none'}"
            )
        return ScriptedAdapter(script)


class ScriptedAdapters:
    """Those that a scripted model has, and what they computed. Owned by the step thread while an engine uses it."""

    def __init__(self) -> None:
        self._adapters: dict[int, ScriptedAdapter] = {}
        self._stamps: dict[int, set[int]] = {NO_ADAPTER: {0}}

    def put(self, index: int, adapter: ScriptedAdapter) -> None:
        """As `AdaptableModel.put_adapter`."""
        self._adapters[index] = adapter
        self._stamps.setdefault(index, set()).add(adapter.stamp)

    def remove(self, index: int) -> None:
        """As `AdaptableModel.remove_adapter`."""
        del self._adapters[index], self._stamps[index]

    def script(self, index: int, otherwise: Script) -> Script:
        """What is generated with an adapter, or without."""
        return otherwise if index == NO_ADAPTER else self._adapters[index].script

    def stamp(self, index: int) -> int:
        """The mark of what is computed with an adapter now; 0 for none."""
        return 0 if index == NO_ADAPTER else self._adapters[index].stamp

    def may_read(self, index: int, stamps: Iterable[int]) -> bool:
        """Whether something was computed with that adapter alone, as it is or as it was before it was loaded anew."""
        return set(stamps) <= self._stamps[index]
