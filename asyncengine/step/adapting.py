"""How a model gets adapters and loses them while it serves. Owned by the step thread."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from asyncengine.instructions import LoadAdapter
from asyncengine.state import Action, next_state
from asyncengine.step.adapters import AdapterTable
from asyncengine.step.model import AdaptableModel, LoadedModel

if TYPE_CHECKING:
    from asyncengine.step.core import Core


class Adapting:
    """The adapters of the core's model."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def table(self) -> AdapterTable:
        """Those that it has, where requests look them up."""
        return self._core.requests.adapters

    def load(self, load: LoadAdapter) -> bool:
        """Has an adapter from now on; False if it was prepared for another model.

        Raises:
            AsyncEngineError: Not in this state, or the model has no memory for it; nothing was changed.
        """
        core = self._core
        next_state(Action.LOAD_ADAPTER, core.state)
        assert core.view is not None
        if load.epoch != core.view.epoch:
            return False
        former, index = self.table.get(load.name), self.table.index_for(load.name)
        self._model.put_adapter(index, load.prepared)
        adapter = self.table.put(load.name, index, load.prepared)
        if former is not None:
            core.requests.replace_adapter(former, adapter)
        self._show()
        return True

    def unload(self, name: str) -> bool:
        """Ends the requests that use an adapter, and lets it go; False if there is none of that name.

        Raises:
            AsyncEngineError: Not in this state.
        """
        next_state(Action.UNLOAD_ADAPTER, self._core.state)
        adapter = self.table.get(name)
        if adapter is None:
            return False
        self._core.requests.abort_adapter(adapter)
        self.table.remove(name)
        self._show()
        self._model.remove_adapter(adapter.index)
        return True

    def take(self, loaded: LoadedModel, kept: AdapterTable | None) -> AdapterTable:
        """The adapters of a model that will take the present one's place.

        Args:
            loaded: The model. One that was served already, and goes on, has those that it has.
            kept: If given, adapters that another load of it had, which it is given; it came with none.
        """
        if loaded is self._core.loaded:
            return self.table
        table = AdapterTable(loaded.adapters)
        for former in kept or ():
            assert loaded.adapting is not None, "the same model took adapters before"
            loaded.adapting.put_adapter(former.index, former.prepared)
            table.put(former.name, former.index, former.prepared)
        return table

    @property
    def _model(self) -> AdaptableModel:
        loaded = self._core.loaded
        assert loaded is not None and loaded.adapting is not None, "an adapter of a model that takes none"
        return loaded.adapting

    def _show(self) -> None:
        """Lets event loops know which adapters there are."""
        assert self._core.view is not None
        self._core.view = dataclasses.replace(self._core.view, adapters=self.table.names)
