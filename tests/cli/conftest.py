from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from typer import testing
from typer.main import get_command

pytest.importorskip("httpx")
pytest.importorskip("starlette")


@pytest.fixture(autouse=True, scope="session")
def commands_are_made_once() -> Iterator[None]:
    """Of an application, not for each line that a test gives it: looking at all the options takes some 15 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "_get_command", functools.cache(get_command))
        yield


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Of a server without a key, which several tests ask."""
    from tests.cli.programs import server

    with server() as (_, found, _):
        yield found


@pytest.fixture(scope="session")
def guarded() -> Iterator[str]:
    """Of one with the key "secret" and the admin's routes, whose model is called "mine"."""
    from tests.cli.programs import server

    with server("--api-key", "secret", "--admin", "--served-model-name", "mine") as (_, found, _):
        yield found
