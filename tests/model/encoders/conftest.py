"""Checkpoints of encoders, each written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.model.encoders import checkpoints


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random checkpoint once and returns its directory."""
    written: dict[object, Path] = {}

    def get(kind: str, labels: int = 0, seed: int = 0, **settings: Any) -> Path:
        key = (kind, labels, seed, repr(sorted(settings.items())))
        if key not in written:
            written[key] = checkpoints.write(tmp_path_factory.mktemp(kind), kind, labels, seed, **settings)
        return written[key]

    return get
