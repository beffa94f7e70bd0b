"""pytest fixtures, found by pytest as soon as asyncengine is installed.

The fixtures are plain functions, so they work under pytest-asyncio, under anyio's plugin, and without either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from asyncengine.loop.engine import AsyncEngine


@pytest.fixture
def scripted_engine() -> Iterator[Callable[..., AsyncEngine]]:
    """Makes engines with known answers, which load at once and are shut down after the test.

    ``engine = scripted_engine({"capital of France": "Paris"})``; arguments as in `asyncengine.testing.scripted_engine`.
    """
    from asyncengine.testing import engines

    made: list[AsyncEngine] = []

    def make(answers: object, **arguments: object) -> AsyncEngine:
        engine = engines.scripted_engine(answers, **arguments)  # type: ignore[arg-type]
        engine.reload_nowait()
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.shutdown_nowait()


@pytest.fixture
def echo_engine(scripted_engine: Callable[..., AsyncEngine]) -> AsyncEngine:
    """An engine that answers every prompt with the prompt."""
    from asyncengine.testing.scripted import echo

    return scripted_engine(echo)
