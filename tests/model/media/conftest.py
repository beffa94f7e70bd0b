"""Checkpoints of models that take images, each written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

try:
    from tests.model.media import checkpoints
except ImportError:  # transformers is too old for images
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def sighted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random checkpoint once and returns its directory."""
    written: dict[object, Path] = {}

    def get(architecture: str, seed: int = 0, **changes: Any) -> Path:
        if not checkpoints.runs(architecture):
            pytest.skip(f"needs {' and '.join(checkpoints.VISION[architecture].needs)}")
        key = (architecture, seed, repr(sorted(changes.items())))
        if key not in written:
            written[key] = checkpoints.write(tmp_path_factory.mktemp(architecture), architecture, seed, **changes)
        return written[key]

    return get
