"""`serve`: an engine and its HTTP layer in one event loop, from start to a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn

from asyncengine.config import EngineConfig
from asyncengine.errors import AsyncEngineError, ConfigError
from asyncengine.loop.engine import AsyncEngine
from asyncengine.reranking import RerankPrompt
from asyncengine.server.app import create_app
from asyncengine.server.naming import check_names
from asyncengine.server.prefix_file import PrefixFile
from asyncengine.server.service import Service
from asyncengine.server.settings import (
    MAX_AUDIO_BYTES,
    MAX_BODY_BYTES,
    MAX_IMAGE_BYTES,
    MAX_VIDEO_BYTES,
    ServerSettings,
)
from asyncengine.state import EngineState
from asyncengine.step.model import Loader

logger = logging.getLogger("asyncengine.server")

_CLOSE_SECONDS = 2
"""How long connections get to send what is left once the engine has ended."""


def serve(
    config: EngineConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    served_model_name: str | None = None,
    admin: bool = False,
    cors_origins: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    max_audio_bytes: int = MAX_AUDIO_BYTES,
    max_video_bytes: int = MAX_VIDEO_BYTES,
    allowed_media_domains: Sequence[str] = (),
    max_concurrency: int | None = None,
    rerank_prompt: RerankPrompt | None = None,
    drain_seconds: float = 5.0,
    prefix_cache_file: str | os.PathLike[str] | None = None,
    loader: Loader | None = None,
    on_listening: Callable[[str], None] | None = None,
    prepare: Callable[[AsyncEngine], object] | None = None,
) -> int:
    """Serves a model until SIGINT or SIGTERM; listens at once and answers 503 while it loads.

    The first signal lets requests finish for `drain_seconds` while new ones get a 503; a second one ends them at once.
    Blocks; to be called on the main thread, where signals arrive.

    Args:
        config: What to load.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key: As in `ServerSettings`, like the nine that follow.
        served_model_name: See there.
        admin: See there.
        cors_origins: See there.
        max_body_bytes: See there.
        max_image_bytes: See there.
        max_audio_bytes: See there.
        max_video_bytes: See there.
        allowed_media_domains: See there.
        max_concurrency: See there.
        rerank_prompt: See there.
        drain_seconds: How long requests get to finish after a signal.
        prefix_cache_file: Where the prefix cache is kept from one run to the next: read before the server is ready, and
            written when requests have ended, unless there was a second signal. A file that is missing, or refused, is
            none at all, but a model that can have none is not served. None keeps nothing.
        loader: As in `AsyncEngine`.
        on_listening: Told the address once there is one.
        prepare: Called with the engine before it loads anything, as `asyncengine.otel.instrument`.

    Returns:
        A process's exit code: 0 after a signal, 1 if the model could not be loaded, the address not be had, or the
        model have no `prefix_cache_file`.

    Raises:
        ConfigError: A setting is wrong.
    """
    settings = ServerSettings(
        api_key=api_key,
        served_model_name=served_model_name,
        admin=admin,
        cors_origins=cors_origins,
        max_body_bytes=max_body_bytes,
        max_image_bytes=max_image_bytes,
        max_audio_bytes=max_audio_bytes,
        max_video_bytes=max_video_bytes,
        allowed_media_domains=allowed_media_domains,
        max_concurrency=max_concurrency,
        rerank_prompt=rerank_prompt,
    )
    check_names(config, settings)
    if isinstance(drain_seconds, bool) or not isinstance(drain_seconds, (int, float)) or not drain_seconds >= 0:
        raise ConfigError(f"drain_seconds is {drain_seconds!r}; expected seconds >= 0")
    engine = AsyncEngine(config, loader=loader)
    kept = None if prefix_cache_file is None else PrefixFile(engine, prefix_cache_file)
    try:
        listener = _listen(host, port)
    except OSError as error:
        # Python adds to the system's words that it attempted to bind.
        words = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror or error
        logger.error("cannot listen on %s port %s: %s", host, port, words)
        return 1
    with listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        if prepare is not None:
            prepare(engine)
        running = _Running(engine, config, settings, listener, drain_seconds, kept, imports=loader is None)
        address = _address(listener)
        logger.info("listening on %s; loading %s", address, config.model)
        if on_listening is not None:
            on_listening(address)
        try:
            return runner.run(running.run())
        finally:
            if loader is None:  # it was frozen here; some extension modules would complain of leaks in the end
                gc.unfreeze()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: what a signal means is decided here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Running:
    """One run of a server."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: EngineConfig,
        settings: ServerSettings,
        listener: socket.socket,
        drain_seconds: float,
        kept: PrefixFile | None,
        imports: bool,
    ) -> None:
        self._engine = engine
        self._kept = kept
        self._config = config
        self._imports = imports
        self._listener = listener
        self._drain_seconds = drain_seconds
        app = create_app(engine, settings)
        self._service: Service = app.state.service
        self._server = _Server(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        with self._signals():
            serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
            loading = asyncio.ensure_future(self._load())
            stopping = asyncio.ensure_future(self._stop.wait())
            try:
                await asyncio.wait([serving, stopping, loading], return_when=asyncio.FIRST_COMPLETED)
                loaded = not loading.done() or loading.result()
                if loaded:
                    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
                    loaded = not loading.done() or loading.result()
                await self._end()
                self._server.should_exit = True
                await serving
                await loading
            finally:
                for task in (serving, loading, stopping):
                    task.cancel()
                await asyncio.gather(serving, loading, stopping, return_exceptions=True)
        return 0 if loaded else 1

    async def _load(self) -> bool:
        """Loads the model; says whether there is one."""
        self._service.problem = "the model is being loaded (just begun)"
        if self._kept is not None:
            self._service.stage = EngineState.LOADING  # until its prefix cache is there, too
        try:
            if self._imports:
                await asyncio.to_thread(_import_for_good, self._config)
            complete = await self._engine.reload(self._config)
            if self._kept is not None:
                await self._kept.load(complete)
        except AsyncEngineError as error:
            if self._stop.is_set():
                return True  # the load was given up because of a signal
            logger.error("%s cannot be loaded: %s", self._config.model, error)
            self._service.problem = f"{self._service.settings.served_model_name or 'the model'} could not be loaded"
            return False
        finally:
            if self._service.stage is EngineState.LOADING:
                self._service.stage = None
        self._service.problem = None
        logger.info(
            "ready: %s on %s in %s, at most %s sequences",
            self._service.name,
            complete.device,
            complete.dtype,
            complete.max_num_sequence,
        )
        return True

    async def _end(self) -> None:
        """Lets requests finish, or not if somebody is in a hurry."""
        now = self._engine.metrics()
        left = now.num_requests_running + now.num_requests_waiting
        if left:
            logger.info("waiting up to %g s for %d requests; another signal ends them", self._drain_seconds, left)
        loop = asyncio.get_running_loop()
        due = loop.time() + self._drain_seconds
        hurrying = asyncio.ensure_future(self._hurry.wait())
        drained = None
        if self._kept is not None and self._kept.is_due and self._engine.state is EngineState.READY:
            drained = await self._save(self._kept, hurrying)
        draining = asyncio.ensure_future(self._engine.shutdown(drain=max(due - loop.time(), 0.0)))
        await asyncio.wait([draining, hurrying], return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not draining.done():
            await self._engine.shutdown()
        ended = await draining
        if drained is not None:
            await asyncio.gather(drained, return_exceptions=True)
        if ended:
            logger.info("%d requests did not finish in time", len(ended))

    async def _save(self, kept: PrefixFile, hurrying: asyncio.Future[Any]) -> asyncio.Future[None]:
        """Saves the prefix cache once requests have ended or their time is over; not if somebody is in a hurry.

        Returns:
            The end of what was under way, which may be still to come.
        """
        self._service.stage = EngineState.DRAINING  # also once the engine has drained, and would take requests again
        drained = asyncio.ensure_future(self._engine.drain())
        seconds = None if math.isinf(self._drain_seconds) else self._drain_seconds
        await asyncio.wait([drained, hurrying], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        saving = asyncio.ensure_future(kept.save())
        await asyncio.wait([saving, hurrying], return_when=asyncio.FIRST_COMPLETED)
        if not saving.done():
            saving.cancel()
            await asyncio.wait([saving])
            logger.warning("the prefix cache is not saved: there was a second signal")
        return drained

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Hears SIGINT and SIGTERM, and gives them back."""

        def heard() -> None:
            (self._hurry if self._stop.is_set() else self._stop).set()

        loop = asyncio.get_running_loop()
        before: dict[signal.Signals, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
            try:
                loop.add_signal_handler(number, heard)
            except (NotImplementedError, RuntimeError, ValueError):  # not on this platform, or not the main thread
                del before[number]
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)


def _import_for_good(config: EngineConfig) -> None:
    """Imports what the load will need, and takes it out of what full garbage collections look at.

    Hundreds of thousands of objects come with torch and transformers and stay until the process ends; looking at all
    of them stops every thread for tens of milliseconds. It is done before anything is loaded, so that models are
    collected as ever. Only a program that is ours may do this to a process.

    Raises:
        AsyncEngineError: A model is not there, or cannot be loaded.
    """
    importlib.import_module("asyncengine.model.location").check_there(config)
    collects = gc.isenabled()
    gc.disable()  # what an import leaves behind stays, and to look for what does not takes a quarter of the time
    try:
        importlib.import_module("asyncengine.model.loader")
        if not importlib.import_module("asyncengine.model.load_check").is_known(config):
            for name in ("transformers.models.auto.modeling_auto", "transformers.modeling_utils"):
                importlib.import_module(name)
    finally:
        if collects:
            gc.enable()
    gc.collect()
    gc.freeze()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where there is one."""
    if sys.platform == "win32":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
