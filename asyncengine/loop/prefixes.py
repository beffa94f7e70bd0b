"""`EnginePrefixes`: an engine whose prefix cache can be kept in a file. Lives on event loops."""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import anyio.to_thread

from asyncengine import instructions as ins
from asyncengine.errors import InvalidRequestError, PrefixCacheError
from asyncengine.loop.control import EngineControl
from asyncengine.prefix_file import Catalogue, PrefixWriter, read
from asyncengine.step.model import ModelView


class EnginePrefixes(EngineControl):
    """Keeps what the prefix cache has, and takes it over from another process."""

    async def save_prefix_cache(self, path: str | os.PathLike[str]) -> int:
        """Writes the prefix cache to a file, so that another process need not compute the same prompts again.

        All of it that requests without adapters have computed of text goes into the file: whole blocks, the pinned
        ones too. A file of the same name is replaced once the new one is whole. Keys and values are copied between
        steps, one layer's keys or values at a time, and written on a worker thread; nothing of them is evicted
        meanwhile. The first time on a machine, the weights are read to tell later which checkpoint they were of.

        Args:
            path: Of the file, in a directory that there is.

        Returns:
            How many tokens are in it.

        Raises:
            PrefixCacheError: The model keeps nothing that could be saved, its weights were replaced in place, the
                prefix cache was emptied meanwhile, or the file cannot be written.
            ModelNotLoadedError: There is no model.
            IllegalStateError: Not now: the engine sleeps, or is draining.

        Cancelling it leaves the file that was there, or the new one, whole; what is being written is written first.
        """
        file, pin = _path(path), f"save-{secrets.token_hex(8)}"
        saved = None
        try:
            while saved is None:  # again if another model was loaded meanwhile
                view = await self._view()
                identity = await _identity(view)
                catalogue = await self._call(functools.partial(ins.SavePrefixes, view.epoch, pin))
                if catalogue is not None:
                    saved = await self._save(file, catalogue, identity, view.epoch, pin)
        finally:
            self._put_quietly(ins.Unpin(pin))
        return saved

    async def _save(
        self, file: Path, catalogue: Catalogue, identity: Mapping[str, str], epoch: int, pin: str
    ) -> int | None:
        """Writes what was pinned; returns how many tokens that is, or None if another model was loaded meanwhile."""
        on_a_thread = anyio.to_thread.run_sync
        writer = PrefixWriter(file, catalogue, identity)
        try:
            for part in catalogue.parts:
                rows = await self._call(functools.partial(ins.ReadPrefixes, epoch, pin, part))
                if rows is None:
                    if (await self._view()).epoch != epoch:
                        return None
                    raise PrefixCacheError("the prefix cache was emptied while it was saved")
                await on_a_thread(writer.add, rows)
            await on_a_thread(writer.commit)
        finally:
            writer.discard()
        return catalogue.num_tokens

    async def load_prefix_cache(self, path: str | os.PathLike[str]) -> int:
        """Takes over what `save_prefix_cache` has written, as far as there are free blocks; nothing is evicted for it.

        What requests find there is bit for bit what was saved, and was computed as it would be here: a file of other
        weights or settings, of another kind of processor, or written by another version of the engine or of torch is
        refused.

        Args:
            path: Of the file.

        Returns:
            How many tokens were not in the prefix cache before and are now.

        Raises:
            PrefixCacheError: The file is missing, damaged or of other keys and values, as its message says; or as
                `save_prefix_cache`.
            ModelNotLoadedError: There is no model.
            IllegalStateError: Not now: the engine sleeps, or is draining.

        Cancelling it leaves the prefix cache with the file's prompts or without.
        """
        file = _path(path)
        found = None
        while found is None:
            view = await self._view()
            identity = await _identity(view)
            kept = await anyio.to_thread.run_sync(read, file, identity, abandon_on_cancel=True)
            found = await self._call(functools.partial(ins.LoadPrefixes, kept, view.epoch))
        return int(found)


async def _identity(view: ModelView) -> Mapping[str, str]:
    if view.prefix_identity is None:
        raise PrefixCacheError(f"the prefix cache of {view.config.model!r} cannot be kept: {view.no_keeping}")
    return await anyio.to_thread.run_sync(view.prefix_identity, abandon_on_cancel=True)


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path) or not isinstance(os.fspath(path), str):
        raise InvalidRequestError(f"path is {path!r:.80}; expected the path of a file")
    return Path(path)
