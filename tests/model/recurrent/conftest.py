import functools

import pytest

from asyncengine.builds import BuildError
from asyncengine.model.recurrent import scans
from asyncengine.model.recurrent.scans import Scans


@functools.cache
def _scans() -> Scans:
    return Scans(scans.build())


@pytest.fixture(scope="session")
def compiled_scans() -> Scans:
    try:
        return _scans()
    except BuildError as error:
        pytest.skip(str(error))
