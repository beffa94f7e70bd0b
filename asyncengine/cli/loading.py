"""`loaded`: an engine with a model, and the event loop on which a command uses it."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from asyncengine.config import EngineConfig
from asyncengine.loop.engine import AsyncEngine

_LOOK_SECONDS = 0.1
"""How often a load is looked at."""


@contextmanager
def loaded(config: EngineConfig, loader: Any) -> Iterator[tuple[AsyncEngine, asyncio.Runner]]:
    """Loads a model, saying so on standard error; on leaving, ends the engine.

    Ctrl-C while the runner runs something cancels that and raises `KeyboardInterrupt`; the engine goes on.

    Args:
        config: What to load.
        loader: How, as in `AsyncEngine`.

    Raises:
        ReloadError: It cannot be loaded.
    """
    quiet()
    with runner() as running:
        engine = AsyncEngine(loader=loader)
        try:
            running.run(_load(engine, config))
        except KeyboardInterrupt:  # a load cannot be stopped, and nobody wants to wait for its end
            engine.shutdown_nowait(timeout=0)
            raise
        except BaseException:
            running.run(engine.shutdown())
            raise
        try:
            yield engine, running
        finally:
            running.run(engine.shutdown())


def quiet() -> None:
    """Keeps transformers' own progress bars off this process's terminal. To be called before it is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def runner() -> asyncio.Runner:
    """A runner on uvloop, where there is one."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    try:
        import uvloop
    except ImportError:
        pass
    else:
        factory = uvloop.new_event_loop
    return asyncio.Runner(loop_factory=factory)


async def _load(engine: AsyncEngine, config: EngineConfig) -> None:
    begun = time.perf_counter()
    live = sys.stderr.isatty()
    load = asyncio.ensure_future(engine.reload(config))
    try:
        while not load.done():
            if live:
                doing = engine.health().loading or "beginning"
                _overwrite(f"{config.model}: {doing}, {time.perf_counter() - begun:.1f} s")
            await asyncio.wait([load], timeout=_LOOK_SECONDS)
    finally:
        if live:
            _overwrite("")
        load.add_done_callback(_retrieve)
    complete = load.result()
    print(
        f"{config.model} loaded in {time.perf_counter() - begun:.1f} s: {complete.dtype} on {complete.device}, "
        f"{complete.max_num_sequence} sequences, {complete.max_total_sequence_length} tokens of KV cache",
        file=sys.stderr,
        flush=True,
    )
    for note in engine.health().notes:
        print(f"  {note}", file=sys.stderr, flush=True)


def _retrieve(load: asyncio.Future[Any]) -> None:
    if not load.cancelled():
        load.exception()  # whoever waited has been told, or has left


def _overwrite(text: str) -> None:
    """Writes a line of a terminal in place of what stood there."""
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()
