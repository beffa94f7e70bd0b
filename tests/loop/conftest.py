from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from harness import Rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """A loaded engine over a scripted model that echoes, and everything a test may want to look at."""
    async with Rig() as rig:
        yield rig
