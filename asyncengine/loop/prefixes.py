"""`EnginePrefixes`: an engine whose prefix cache can be kept in a file. Lives on event loops."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path

import anyio.to_thread

from asyncengine import instructions as ins
from asyncengine.catalogue import Inventory, KeptPrefixes
from asyncengine.errors import InvalidRequestError, PrefixCacheError
from asyncengine.loop.control import EngineControl
from asyncengine.prefix_file import PrefixReader, PrefixWriter, name_of
from asyncengine.step.model import ModelView


class EnginePrefixes(EngineControl):
    """Keeps what the prefix cache has, and takes it over from another process."""

    @property
    def no_prefix_file(self) -> str:
        """Why the loaded model's prefix cache cannot be kept in a file, in words; empty if it can.

        Raises:
            ModelNotLoadedError: There is no model.
        """
        view = self._model
        return view.no_keeping if view.prefix_identity is None else ""

    async def save_prefix_cache(self, path: str | os.PathLike[str]) -> int:
        """Writes the prefix cache to a file, so that another process need not compute the same prompts again.

        All of it that requests without adapters have computed of text goes into the file: whole blocks, the pinned
        ones too. A file of the same name is replaced once the new one is whole. Keys and values are copied between
        steps, at most 32 MB of them at a time, and written on a worker thread. Requests have all the room that they
        had: what is evicted before it was copied stays out. The first time on a machine, the weights are read to tell
        later which checkpoint they were of.

        Args:
            path: Of the file, in a directory that there is.

        Returns:
            How many tokens are in it.

        Raises:
            PrefixCacheError: The model keeps nothing that could be saved, its weights were replaced in place, or the
                file cannot be written.
            ModelNotLoadedError: There is no model.
            IllegalStateError: Not now: the engine sleeps.

        Cancelling it leaves the file that was there, or the new one, whole, and nothing else once the thread that
        is just writing has noticed.
        """
        file, saved = _path(path), None
        while saved is None:  # again if another model was loaded meanwhile
            view = await self._view()
            identity = await _identity(view)
            inventory = await self._call(functools.partial(ins.SavePrefixes, view.epoch))
            if inventory is not None:
                saved = await self._save(PrefixWriter(file, inventory.catalogue, identity), inventory, view.epoch)
        return saved

    async def _save(self, writer: PrefixWriter, inventory: Inventory, epoch: int) -> int | None:
        """Writes what was found; returns how many tokens that is, or None if another model was loaded meanwhile."""
        on_a_thread = anyio.to_thread.run_sync
        try:
            for piece in inventory.catalogue.pieces():
                blocks, adopted = inventory.blocks[piece], inventory.adopted[piece]
                found = await self._call(functools.partial(ins.ReadPrefixes, epoch, blocks, adopted))
                if found is None:
                    return None
                await on_a_thread(writer.add, *found)
            return await on_a_thread(writer.commit)
        finally:
            writer.discard()

    async def load_prefix_cache(self, path: str | os.PathLike[str]) -> int:
        """Takes over what `save_prefix_cache` has written, as far as there are free blocks; nothing is evicted for it.

        It is read on a worker thread and copied between steps, at most 32 MB at a time, what was used last first, and
        no more of it than there is room for. It counts as used before all that is in the cache already.

        What requests find there is bit for bit what was saved, and was computed as it would be here: a file of other
        weights or settings, of another kind of processor, or written by another version of the engine or of torch is
        refused.

        Args:
            path: Of the file.

        Returns:
            How many tokens were not in the prefix cache before and are now.

        Raises:
            PrefixCacheError: The file is missing, damaged or of other keys and values, as its message says; or the
                model keeps nothing, or its weights were replaced in place.
            ModelNotLoadedError: There is no model.
            IllegalStateError: Not now: the engine sleeps, or is draining.

        Cancelling it leaves the prefix cache with as many of the file's prompts as it had taken over.
        """
        file, loaded = _path(path), None
        while loaded is None:
            view = await self._view()
            loaded = await self._load(PrefixReader(file, await _identity(view)), view.epoch)
        return loaded

    async def _load(self, reader: PrefixReader, epoch: int) -> int | None:
        """Puts what is in a file into the cache; as `_save`."""
        on_a_thread = functools.partial(anyio.to_thread.run_sync, abandon_on_cancel=True)
        loaded = 0
        try:
            catalogue = await on_a_thread(reader.catalogue)
            for piece in catalogue.pieces():
                kept = KeptPrefixes(catalogue, piece.start, await on_a_thread(reader.rows, piece))
                taken = await self._call(functools.partial(ins.LoadPrefixes, kept, epoch))
                if taken is None:
                    return None
                loaded += taken.tokens
                if not taken.room:
                    break
            return loaded
        finally:
            reader.close()


async def _identity(view: ModelView) -> Mapping[str, str]:
    if view.prefix_identity is None:
        raise PrefixCacheError(f"the prefix cache of {view.config.model!r} cannot be kept: {view.no_keeping}")
    return await anyio.to_thread.run_sync(view.prefix_identity, abandon_on_cancel=True)


def _path(path: object) -> Path:
    if (name := name_of(path)) is None:
        raise InvalidRequestError(f"path is {path!r:.80}; expected the path of a file")
    return Path(name)
