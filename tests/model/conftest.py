from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from tests.model import checkpoints


@pytest.fixture(autouse=True, scope="session")
def quiet() -> Iterator[None]:
    """transformers' bars and hints are of no use here; tiny products gain nothing from several threads."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Whoever draws numbers without saying how gets the same ones in each run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random checkpoint once and returns its directory."""
    made: dict[object, Path] = {}

    def make(architecture: str, seed: int = 0, **changes: Any) -> Path:
        key = (architecture, seed, repr(sorted(changes.items())))
        if key not in made:
            made[key] = checkpoints.write(tmp_path_factory.mktemp(architecture), architecture, seed, **changes)
        return made[key]

    return make
