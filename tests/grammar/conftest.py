from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from asyncengine import AsyncEngine, EngineConfig, tiny
from tests.model import checkpoints

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "max_num_sequence": 16,
    "max_total_sequence_length": 8192,
    "kv_cache_page_size": 16,
}


@pytest.fixture(autouse=True, scope="session")
def quiet() -> Iterator[None]:
    """transformers' bars and hints are of no use here; tiny products gain nothing from several threads."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and the embedded model's tokenizer."""
    path = tmp_path_factory.mktemp("random")
    checkpoints.write(path, "llama", vocab_size=1024, eos_token_id=2, num_hidden_layers=1, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_text((tiny.PATH / name).read_text("utf-8"), "utf-8")
    return path


@pytest.fixture(scope="package")
def lasting_engine(random_model: Path) -> Iterator[AsyncEngine]:
    """An engine over it for all tests: it is used from one event loop after the other."""
    engine = AsyncEngine(EngineConfig(str(random_model), **CONFIG))
    engine.reload_nowait()
    yield engine
    engine.shutdown_nowait()


@pytest.fixture
async def engine(lasting_engine: AsyncEngine) -> AsyncEngine:
    """The same, as if nobody had used it before."""
    await lasting_engine.reset()
    lasting_engine._grammars = None
    return lasting_engine
