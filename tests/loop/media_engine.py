"""An engine whose answers tell each piece of an image or of audio that stands in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.testing import ScriptedLoader

LONG = b"a longer file"  # seven pieces


def script(prompt: Sequence[int], branch: int) -> list[int]:
    """An answer in which each token of the prompt has its part."""
    return [1 + sum((place + branch) * token for place, token in enumerate(prompt, 1)) % 250, *b"end"]


def engine(loader: ScriptedLoader, **changes: Any) -> AsyncEngine:
    values: dict[str, Any] = {"prefill_chunk_size": 8, "kv_cache_page_size": 4, "max_num_sequence": 3}
    return AsyncEngine(EngineConfig("scripted", **(values | changes)), loader=loader)
