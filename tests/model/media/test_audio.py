"""Audio in prompts, to models that listen: what they say of it is what they say in transformers alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncengine import (
    AsyncEngine,
    AudioPrompt,
    EngineConfig,
    GenerationConfig,
    InvalidRequestError,
)
from tests.model.media import listening
from tests.model.media.checkpoints import picture
from tests.model.media.listening import LISTENING, RATE, sound

pytestmark = pytest.mark.loops("either")

FIRST, SECOND = sound(1, 0.7), sound(2, 1.13)
TOKENS = 10


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random checkpoint once and returns its directory."""
    written: dict[object, Path] = {}

    def get(architecture: str, seed: int = 0) -> Path:
        key = architecture, seed
        if key not in written:
            written[key] = listening.write(tmp_path_factory.mktemp(architecture), architecture, seed)
        return written[key]

    return get


def engine(path: Path, **changes: Any) -> AsyncEngine:
    values: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "prefill_chunk_size": 8, "kv_cache_page_size": 4, "max_num_sequence": 4,
        "max_single_sequence_length": 400, "max_total_sequence_length": 800, "audio": True,
    }  # fmt: skip
    return AsyncEngine(EngineConfig(str(path), **(values | changes)))


def greedy(tokens: int = TOKENS, **more: Any) -> GenerationConfig:
    return GenerationConfig(temperature=0.0, max_tokens=tokens, ignore_eos=True, **more)


def asking(*parts: Any) -> list[dict[str, Any]]:
    """One message of texts, sounds and pictures."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, np.ndarray):
            content.append({"type": "audio", "audio": (part, RATE)})
        else:
            content.append({"type": "image", "image": part})
    return [{"role": "user", "content": content}]


def told(path: Path, messages: list[dict[str, Any]]) -> list[int]:
    """What transformers says."""
    parts = messages[0]["content"]
    sounds = [part["audio"][0] for part in parts if part["type"] == "audio"]
    images = [part["image"] for part in parts if part["type"] == "image"]
    marks = [part if part["type"] == "text" else {"type": part["type"]} for part in parts]
    return listening.reference(path, [{"role": "user", "content": marks}], sounds, TOKENS, images)


def encoded(serving: AsyncEngine) -> int:
    loaded = serving._thread.core.loaded
    assert loaded is not None
    return loaded.model._media.encoded  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("architecture", LISTENING)
async def test_greedy_equals_transformers(architecture: str, hearing: Callable[..., Path]) -> None:
    """Two in one step, one in two branches, in chunks that part them, and again where all of it is cached."""
    path = hearing(architecture)
    asked = [asking("hear ", FIRST, " what?"), asking(SECOND, "and?")]
    expected = [told(path, each) for each in asked]
    assert expected[0] != expected[1]
    for backend in ("auto", "transformers") if architecture == "qwen2_audio" else ("auto",):
        async with engine(path, decoder_backend=backend) as serving:
            assert serving.takes_audio
            several = [serving.chat(each, greedy(n=2)) for each in asked]
            for result, wanted in zip(await asyncio.gather(*several), expected, strict=True):
                assert [list(branch.token_ids) for branch in result.outputs] == [wanted] * 2
            assert encoded(serving) == 2
            again = await serving.chat(asked[0], greedy())
            assert list(again.token_ids) == expected[0]
            assert again.usage.cached_tokens == (again.usage.prompt_tokens - 1) // 4 * 4
            assert encoded(serving) == 2


@pytest.mark.parametrize("backend", ["auto", "transformers"])
async def test_several_in_one_prompt(backend: str, hearing: Callable[..., Path]) -> None:
    path = hearing("qwen2_audio")
    asked = asking("hear ", SECOND, " and ", FIRST, " and ", SECOND)
    async with engine(path, decoder_backend=backend) as serving:
        result = await serving.chat(asked, greedy())
        assert list(result.token_ids) == told(path, asked)
        assert encoded(serving) == 2  # one of them is there twice
        counters = serving.metrics().counters
        assert counters.image_tokens == 0 < counters.audio_tokens < counters.prompt_tokens


async def test_beside_images(hearing: Callable[..., Path]) -> None:
    path, image = hearing("gemma4"), picture(1, 40, 32)
    asked = [asking("see ", image, " hear ", FIRST, "?"), asking(SECOND, image), asking(image, "?")]
    async with engine(path, images=True, prefill_chunk_size=16) as serving:
        found = await asyncio.gather(*(serving.chat(each, greedy()) for each in asked))
        assert [list(each.token_ids) for each in found] == [told(path, each) for each in asked]
        text = "<|audio|><|image|>?"
        prompt = AudioPrompt(text, [(FIRST, RATE)], [image])
        with pytest.raises(InvalidRequestError, match=r"2 marks of audio .*; expected 3|0 marks of images"):
            await serving.generate(AudioPrompt("<|audio|>", [(FIRST, RATE)], [image]))
        assert len((await serving.generate(prompt, greedy(3))).token_ids) == 3
