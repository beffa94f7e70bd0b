from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("httpx")
pytest.importorskip("starlette")


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Of a server without a key, which several tests ask."""
    from tests.cli.programs import server

    with server() as (_, found, _):
        yield found
