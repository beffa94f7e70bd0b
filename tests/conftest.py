"""Every async test runs on asyncio and on uvloop; no test may leave anything behind.

Tests of what models compute, to which the loop is all the same, are marked to run on one of the two.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import re
import sys
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

if not Path("/dev/nvidiactl").exists():
    # Kernels in Triton are interpreted where no GPU can run them. Triton wants to know before it is imported, and
    # transformers imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import uvloop
except ImportError:  # not there on every platform
    uvloop = None

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
if uvloop is not None:
    LOOPS["uvloop"] = uvloop.new_event_loop

settings.register_profile("long", max_examples=5000)
settings.register_profile("short", max_examples=30)  # for each run; `--hypothesis-profile=long` is for a night
settings.load_profile("short")


def pytest_configure(config: pytest.Config) -> None:
    """What is compiled and kept lies in pytest's cache, so that runs share it and the user's own stays as it is."""
    if (cache := getattr(config, "cache", None)) is not None:
        os.environ["XDG_CACHE_HOME"] = str(cache.mkdir("asyncengine"))
    _keep_again_what_a_test_lets_go()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """What the engine refuses because transformers is too old for it cannot be tested there."""
    report = yield
    if report.failed and call.excinfo is not None and _older_than_tried():  # most do not: reading a version takes long
        said = "\n".join(str(error) for error in _chain(call.excinfo.value))
        if (too_old := re.search(_TOO_OLD, said)) is not None:
            report.outcome, report.longrepr = "skipped", (str(item.path), item.reportinfo()[1] or 0, too_old[0])
    return report


_TRIED = (5, 24)
"""The transformers that has all that is tested."""
_TOO_OLD = r"needs? transformers 5\.\d+ or later; there is [\d.]+|module transformers has no attribute \w+Config"


@functools.cache
def _older_than_tried() -> bool:
    return tuple(map(int, version("transformers").split(".")[:2])) < _TRIED


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extension modules complain of what is not collected in the end


_watched: list[asyncio.AbstractEventLoop] = []
_reported: list[Mapping[str, Any]] = []


def _watch(factory: Callable[[], asyncio.AbstractEventLoop]) -> Callable[[], asyncio.AbstractEventLoop]:
    def make() -> asyncio.AbstractEventLoop:
        loop = factory()
        loop.set_exception_handler(lambda loop, context: _reported.append(context))
        _watched.append(loop)
        return loop

    return make


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    names = list(LOOPS)
    marker = item.get_closest_marker("loops")
    if marker is not None and marker.args == ("either",):
        names = [names[zlib.crc32(item.nodeid.encode()) % len(names)]]  # always the same, and another for other tests
    return {name: _watch(LOOPS[name]) for name in names}


@pytest.fixture(params=list(LOOPS), ids=list(LOOPS))
def loop_factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    """For tests that are not async themselves and run event loops of their own."""
    return LOOPS[request.param]


MANY_MODULES = 200
_kept_modules = 0


def keep() -> None:
    """What is imported is there to stay: no collection of garbage looks at it, now or later."""
    global _kept_modules
    gc.collect()
    gc.freeze()
    _kept_modules = len(sys.modules)


def _keep_again_what_a_test_lets_go() -> None:
    """A server that ends in this process does: every full collection after it would look at half a million objects."""
    unfreeze = gc.unfreeze

    def unfreeze_until_the_test_ends() -> None:
        global _kept_modules
        unfreeze()
        _kept_modules = -MANY_MODULES

    gc.unfreeze = unfreeze_until_the_test_ends


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks as long what `in_short` does not name, before it is seen what is to be run."""
    cases = defaultdict[tuple[str, tuple[str, ...]], set[str]](set)
    for item in items:
        if isinstance(item, pytest.Function) and (mark := item.get_closest_marker("in_short")) is not None:
            named = {name for name in mark.args if f"-{name}-" in f"-{item.callspec.id}-"}
            if not named:
                item.add_marker("long")
            cases[item.nodeid.split("[")[0], mark.args] |= named
    unknown = {test: missing for (test, names), found in cases.items() if (missing := {*names} - found)}
    if unknown and not any("[" in argument for argument in config.args):
        raise pytest.UsageError(f"in_short names cases that are not there: {unknown}")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        keep()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    if len(sys.modules) >= _kept_modules + MANY_MODULES:  # tests import torch and models when they need them
        keep()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    _reported.clear()
    result = yield
    for loop in _watched:
        if not loop.is_closed():
            left = [task for task in asyncio.all_tasks(loop) if not task.done()]
            assert not left, f"the test left tasks behind: {left}"
    assert not _reported, f"the event loop reported: {_reported}"
    return result


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = set(engine_threads())
    yield
    _watched[:] = [loop for loop in _watched if not loop.is_closed()]
    if set(engine_threads()) - before:
        gc.collect()  # an engine in a reference cycle
    until = time.monotonic() + 5.0
    while (left := set(engine_threads()) - before) and time.monotonic() < until:
        next(iter(left)).join(0.01)
    assert not left, f"the test left threads behind: {left}"
    gc.collect(1)  # what cannot be finalized is reported in the test that made it
    assert not _reported, f"the event loop reported: {_reported}"


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("asyncengine")]
