"""`PrefixFile`: where a server's prefix cache is while the server is not."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from asyncengine.config import EngineConfig
from asyncengine.errors import AsyncEngineError, ConfigError, PrefixCacheError
from asyncengine.loop.engine import AsyncEngine
from asyncengine.prefix_file import name_of

logger = logging.getLogger("asyncengine.server")


class PrefixFile:
    """One file, of the model that the server was started with.

    Args:
        engine: Whose prefix cache.
        path: Of the file, in a directory that there is.

    Raises:
        ConfigError: There can be no such file.
    """

    def __init__(self, engine: AsyncEngine, path: str | os.PathLike[str]) -> None:
        self._engine = engine
        self._path = _checked(path)
        self._config: EngineConfig | None = None  # of the model that it is of, once what was in it is in the cache

    async def load(self, complete: EngineConfig) -> None:
        """Takes over what is in the file, if there is one. What is refused is logged, and does no harm.

        Args:
            complete: The configuration of the model that is loaded.

        Raises:
            PrefixCacheError: The model can have no such file.
        """
        if why := self._engine.no_prefix_file:
            raise PrefixCacheError(
                f"prefix_cache_file is {str(self._path)!r}, and its prefix cache cannot be kept in a file: {why}"
            )
        try:
            count = await self._engine.load_prefix_cache(self._path)
            logger.info("the prefix cache begins with %d tokens of %s", count, self._path)
        except PrefixCacheError as error:
            there = not isinstance(error.__cause__, FileNotFoundError)
            logger.log(logging.WARNING if there else logging.INFO, "the prefix cache begins empty: %s", error)
        self._config = complete

    @property
    def is_due(self) -> bool:
        """Whether there is something to be saved: what the model has computed that the file is of."""
        now = self._engine.metrics()
        return self._engine.complete_engine_config == self._config and now.kv_blocks_free < now.kv_blocks_total

    async def save(self) -> None:
        """Writes what the prefix cache has. Where that cannot be, it is logged, and a file that was there stays.

        Cancelling it leaves the file that was there, or the new one.
        """
        try:
            count = await self._engine.save_prefix_cache(self._path)
        except AsyncEngineError as error:
            logger.warning("the prefix cache is not saved: %s", error)
        else:
            logger.info("%d tokens of the prefix cache are in %s", count, self._path)


def _checked(path: str | os.PathLike[str]) -> Path:
    if (name := name_of(path)) is None:
        raise ConfigError(f"prefix_cache_file is {path!r:.80}; expected the path of a file")
    found = Path(name)
    if not found.parent.is_dir():
        raise ConfigError(f"prefix_cache_file is {name!r}; there is no directory {str(found.parent)!r}")
    if found.exists() and not found.is_file():
        raise ConfigError(f"prefix_cache_file is {name!r}, which is no regular file")
    return found
