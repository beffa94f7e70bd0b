"""`EngineControl`: an engine but for its requests. Lives on event loops; gives instructions and waits for replies."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import anyio.to_thread

from asyncengine import instructions as ins
from asyncengine.config import EngineConfig
from asyncengine.errors import AdapterError, ConfigError, EngineClosedError, InvalidRequestError, ModelNotLoadedError
from asyncengine.generation import GenerationConfig
from asyncengine.instructions import InFlight, Instruction, NewRequests, ReplyTo
from asyncengine.loop.default_loader import DefaultLoader
from asyncengine.loop.health import Health, health_of
from asyncengine.loop.observer import RequestObserver
from asyncengine.loop.router import Router
from asyncengine.metrics import EngineMetrics
from asyncengine.state import EngineState
from asyncengine.step.model import Loader, ModelView
from asyncengine.step.thread import StepThread
from asyncengine.tokenizer import Tokenizer
from asyncengine.trace import Trace


class EngineControl:
    """What an engine is, the life of its model, and its line to the step thread. `AsyncEngine` adds requests."""

    def __init__(self, config: EngineConfig | str | None, loader: Loader | None) -> None:
        self._config = None if config is None else _config(config)
        self._load_was_asked = False
        self.trace = Trace()
        self.observer: RequestObserver | None = None
        self._thread = StepThread(DefaultLoader() if loader is None else loader, self.trace)
        self._routers: dict[asyncio.AbstractEventLoop, Router] = {}
        self._routers_lock = threading.Lock()
        # An engine that is dropped ends its thread. The finalizer must not hold the engine itself.
        self._finalizer = weakref.finalize(self, _shut_down, self._thread)
        self._finalizer.atexit = False

    # What it is

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life."""
        return self._thread.core.state

    @property
    def complete_engine_config(self) -> EngineConfig | None:
        """The loaded model's configuration with every default filled in; None without a model."""
        view = self._thread.core.view
        return None if view is None else view.config

    @property
    def default_generation_config(self) -> GenerationConfig:
        """What the loaded model generates with where a request does not say.

        Raises:
            ModelNotLoadedError: There is no model.
        """
        return self._model.default_generation_config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The loaded model's tokenizer; None if it has none.

        Raises:
            ModelNotLoadedError: There is no model.
        """
        return self._model.tokenizer

    @property
    def vocab_size(self) -> int:
        """Token ids of the loaded model lie below it.

        Raises:
            ModelNotLoadedError: There is no model.
        """
        return self._model.vocab_size

    @property
    def takes_images(self) -> bool:
        """Whether the loaded model takes images in prompts; False without a model."""
        view = self._thread.core.view
        return view is not None and view.media_reader is not None and "image" in view.media_reader.kinds

    @property
    def takes_audio(self) -> bool:
        """Whether the loaded model takes audio in prompts; False without a model."""
        view = self._thread.core.view
        return view is not None and view.media_reader is not None and "audio" in view.media_reader.kinds

    @property
    def takes_videos(self) -> bool:
        """Whether the loaded model takes videos in prompts; False without a model."""
        view = self._thread.core.view
        return view is not None and view.media_reader is not None and "video" in view.media_reader.kinds

    @property
    def _model(self) -> ModelView:
        view = self._thread.core.view
        if view is None:
            raise ModelNotLoadedError("there is no model; call reload first")
        return view

    def metrics(self) -> EngineMetrics:
        """A snapshot of counts and latencies. Never waits for a step."""
        metrics = self._thread.core.metrics()
        try:
            router = self._routers.get(asyncio.get_running_loop())
        except RuntimeError:
            router = None
        if router is None:
            return metrics
        back = router.stream_back
        return metrics.on_loop(back.wakeups, back.handoff_seconds, back.handoff_max_seconds, router.merged)

    def health(self) -> Health:
        """Whether the engine is well, and if not, why. Never waits for a step."""
        return health_of(self._thread)

    # Life cycle

    async def reload(
        self, config: EngineConfig | str, in_flight: InFlight = "abort", new_requests: NewRequests = "wait"
    ) -> EngineConfig:
        """Loads a model in place of the present one, if there is one; returns its completed configuration.

        Everything that can be checked is checked before the present model is let go, and where both fit in memory,
        it serves until the new one is ready.

        Args:
            config: An `EngineConfig`, or its JSON.
            in_flight: What happens to requests that were given before: ``"abort"`` ends them at the swap, ``"wait"``
                lets them finish first, ``"carry"`` goes on with them on the new model, which must have the same
                tokenizer.
            new_requests: What happens to requests that are given after the reload: ``"wait"`` keeps the order, they
                wait for the new model; ``"serve"`` lets the present model serve them as long as it is there, and
                then `in_flight` holds for them as well.

        Raises:
            ConfigError: The configuration is wrong; nothing was changed.
            ReloadError: It cannot be loaded. `state` tells whether the former model still serves.
            IllegalStateError: Not now: the engine is draining.
            EngineClosedError: The engine was shut down.

        Cancelling it does not stop the load.
        """
        complete = _config(config)
        if in_flight not in ("abort", "wait", "carry"):
            raise ConfigError(f"in_flight is {in_flight!r}; allowed: 'abort', 'wait', 'carry'")
        if new_requests not in ("wait", "serve"):
            raise ConfigError(f"new_requests is {new_requests!r}; allowed: 'wait', 'serve'")
        self._load_was_asked = True
        loaded: EngineConfig = await self._call(lambda to: ins.Reload(complete, in_flight, to, new_requests))
        return loaded

    async def unload(self) -> None:
        """Ends all requests and lets the model go; returns once readers have their ends and the memory is free."""
        await self._call(ins.Unload)

    async def reset(self) -> None:
        """Ends all requests, empties the prefix cache (pins included) and zeroes the metrics."""
        await self._call(ins.Reset)

    async def pause(self) -> None:
        """Stops stepping after the present step; requests keep their place and new ones wait."""
        await self._call(ins.Pause)

    async def resume(self) -> None:
        """Steps again after `pause`."""
        await self._call(ins.Resume)

    async def sleep(self) -> None:
        """Gives the KV cache's memory back; requests keep their tokens and are computed again after `wake`."""
        await self._call(ins.Sleep)

    async def wake(self) -> None:
        """Goes on after `sleep`."""
        await self._call(ins.Wake)

    async def update_weights(self, weights: Mapping[str, Any]) -> int:
        """Replaces weights in place between two steps; requests go on with the new ones.

        Args:
            weights: Tensors by their names in the checkpoint. Names, shapes and dtypes are checked first; either all
                are replaced or none. A draft model keeps its own.

        Returns:
            The new weight version. The prefix cache begins anew with it.

        Raises:
            ReloadError: A name, shape or dtype does not fit; nothing was changed.
        """
        return int(await self._call(lambda to: ins.UpdateWeights(weights, to)))

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for; none without a model."""
        view = self._thread.core.view
        return () if view is None else view.adapters

    async def load_adapter(
        self, name: str, source: str | os.PathLike[str] | Mapping[str, Any], config: Mapping[str, Any] | None = None
    ) -> None:
        """Loads a LoRA adapter (Hu et al., 2021) beside the model, for requests with ``RequestOptions(adapter=name)``.

        It is read and checked on a worker thread, and taken up between two steps. An adapter of the same name is
        replaced: requests that use it go on with the new one, and its part of the prefix cache begins anew.

        Args:
            name: What requests call it.
            source: A directory as PEFT saves it, or its tensors by their names there, as
                ``peft.get_peft_model_state_dict`` gives them. Tensors are copied.
            config: What ``adapter_config.json`` says, as ``peft_config.to_dict()`` gives it; for tensors alone.

        Raises:
            InvalidRequestError: `name` is not a non-empty string.
            AdapterError: The adapter is missing or damaged, of a kind that is not served, or does not fit the model.
            InsufficientMemoryError: The device has no memory for it; what there was before is still served.
            ModelNotLoadedError: There is no model.
            IllegalStateError: Not now: the engine sleeps, or is draining.

        Cancelling it leaves the engine with the adapter or without it.
        """
        if not isinstance(name, str) or not name:
            raise InvalidRequestError(f"name is {name!r:.80}; expected a non-empty string")
        loaded = False
        while not loaded:  # again if another model was loaded meanwhile
            view = await self._view()
            if view.adapter_format is None:
                raise AdapterError(f"{view.config.model!r} takes no adapters")
            prepared = await anyio.to_thread.run_sync(
                view.adapter_format.prepare, source, config, abandon_on_cancel=True
            )
            loaded = await self._call(functools.partial(ins.LoadAdapter, name, prepared, view.epoch))

    async def unload_adapter(self, name: str) -> bool:
        """Ends the requests that use an adapter, with reason "abort", and lets it go.

        Returns:
            Whether there was one of that name.

        Raises:
            InvalidRequestError: `name` is not a string.
            ModelNotLoadedError: There is no model.
            IllegalStateError: Not now: the engine sleeps, or is draining.
        """
        if not isinstance(name, str):
            raise InvalidRequestError(f"name is {name!r:.80}; expected a string")
        return bool(await self._call(lambda to: ins.UnloadAdapter(name, to)))

    async def drain(self) -> None:
        """Refuses new requests until all that there are have ended, then takes them again."""
        await self._call(ins.Drain)

    async def restart(self) -> EngineConfig:
        """Loads the model again after its device was lost; waiting requests go on.

        Raises:
            IllegalStateError: The engine has not failed.
            ReloadError: It cannot be loaded.
        """
        loaded: EngineConfig = await self._call(ins.Restart)
        return loaded

    async def debug_call_func_on_all_workers(self, name: str, *args: Any) -> list[Any]:
        """Calls a function beside the model, between two steps; returns one result per worker.

        Args:
            name: One of the model's own debug functions, or ``"package.module:function"``, which is called with the
                model first.
            *args: Passed on.

        Raises:
            ModelNotLoadedError: There is no model.
            Exception: Whatever the function raises.
        """
        results: list[Any] = await self._call(lambda to: ins.DebugCall(name, args, to))
        return results

    async def shutdown(self, drain: float = 0.0) -> tuple[str, ...]:
        """Ends the engine. May be called in any state, and again.

        Args:
            drain: Seconds that requests get to finish; new ones are refused meanwhile. May be infinite.

        Returns:
            Ids of the requests that had to be ended.

        Raises:
            ConfigError: `drain` is not a number >= 0.

        Cancelling it does not stop it.
        """
        if isinstance(drain, bool) or not isinstance(drain, (int, float)) or not drain >= 0:
            raise ConfigError(f"drain is {drain!r}; allowed: seconds >= 0")
        try:
            left: tuple[str, ...] = await self._call(lambda to: ins.Shutdown(drain, to))
        except EngineClosedError:
            return ()
        finally:
            if self._thread.core.closed:
                # The thread has nothing left to do but return.
                self._thread.join(1.0)
        return left

    def reload_nowait(self) -> None:
        """Begins to load the engine's configuration; what is given next waits for it. Needs no event loop.

        A load that fails leaves the engine unloaded: whoever waits gets `ModelNotLoadedError`.
        """
        if self._config is None:
            raise ConfigError("the engine was made without a configuration")
        self._load_was_asked = True
        self._thread.put(ins.Reload(self._config))

    def shutdown_nowait(self, timeout: float = 10.0) -> None:
        """Ends the engine and blocks until its thread has ended, at most `timeout` seconds. Needs no event loop."""
        self._put_quietly(ins.Shutdown())
        self._thread.join(timeout)

    async def __aenter__(self) -> Self:
        if self._config is not None:
            try:
                await self.reload(self._config)
            except BaseException:
                _shut_down(self._thread)
                raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.shutdown()

    # How

    def _router(self) -> Router:
        """The running loop's router."""
        loop = asyncio.get_running_loop()
        router = self._routers.get(loop)
        if router is None:
            with self._routers_lock:
                for other, known in list(self._routers.items()):
                    # Loops need not be closed. One that goes on later gets another router.
                    if other.is_closed() or (known.idle and not other.is_running()):
                        del self._routers[other]
                router = self._routers[loop] = Router(loop)
        return router

    async def _call(self, make: Callable[[ReplyTo], Instruction]) -> Any:
        """Gives an instruction, synchronously, then awaits its reply."""
        router = self._router()
        reply_to, future = router.expect_reply()
        try:
            self._thread.put(make(reply_to))
        except BaseException:
            router.expect_no_reply(reply_to)
            raise
        return await future

    def _put_quietly(self, instruction: Instruction) -> None:
        try:
            self._thread.put(instruction)
        except EngineClosedError:
            pass  # it has ended everything

    async def _view(self) -> ModelView:
        """The loaded model, after a reload that is under way."""
        core, router = self._thread.core, self._router()
        view = None if core.state is EngineState.LOADING else core.view
        while view is None:
            # No requests, for no model: the reply comes when a reload that was given before is through. It raises if
            # there is no model then; there may be none either when the reply has arrived.
            try:
                await self._call(lambda to: ins.AddRequests((), -1, router.stream_back, to))
            except ModelNotLoadedError as error:
                if self._config is None or self._load_was_asked:
                    raise
                raise ModelNotLoadedError(
                    f"there is no model yet: 'async with engine' loads {self._config.model!r}, or call reload first"
                ) from error
            view = core.view
        return view


def _config(config: EngineConfig | str) -> EngineConfig:
    if isinstance(config, str):
        return EngineConfig.from_json(config)
    if not isinstance(config, EngineConfig):
        raise ConfigError(f"config is {config!r:.80}; expected EngineConfig(...) or its JSON")
    return config


def _shut_down(thread: StepThread) -> None:
    if thread.alive:
        thread.stop()
