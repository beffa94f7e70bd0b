from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from harness import Rig

from asyncengine.builds import BuildError
from asyncengine.loop import delivery


@pytest.fixture(scope="session")
def compiled_delivery() -> bool:
    """Whether the compiled delivery is to be had here."""
    try:
        delivery.use_compiled()
    except BuildError:
        return False
    finally:
        delivery.use_python()
    return True


@pytest.fixture(autouse=True)
def _alternate_delivery(request: pytest.FixtureRequest, compiled_delivery: bool) -> Iterator[None]:
    """What runs on uvloop is delivered by compiled code, and what runs on asyncio by Python."""
    callspec = getattr(request.node, "callspec", None)
    if compiled_delivery and callspec is not None and "uvloop" in callspec.id.split("-"):
        delivery.use_compiled()
    yield
    delivery.use_python()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """A loaded engine over a scripted model that echoes, and everything a test may want to look at."""
    async with Rig() as rig:
        yield rig
