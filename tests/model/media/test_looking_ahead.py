"""Models in which tokens of an image attend to later ones of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.runner import TorchModel
from asyncengine.step.model import LoadedModel
from tests.model.media.checkpoints import picture, reference, write


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name), name) for name in ("gemma3", "gemma4_moe", "gemma4")}


@contextlib.contextmanager
def loaded(path: Path, **changes: Any) -> Iterator[LoadedModel]:
    config = EngineConfig(str(path), **({"device": "cpu", "dtype": "float32"} | changes))
    loader = TransformersLoader()
    found = loader.load(loader.check(config, None))
    yield found
    found.model.close()


@pytest.mark.parametrize(
    ("name", "ahead"),
    [("gemma3", [True] * 4), ("gemma4_moe", [True, False] * 2), ("gemma4", [False] * 4)],
)
@pytest.mark.in_short("gemma3", "gemma4")
def test_which_layers_do_is_seen_in_transformers(name: str, ahead: list[bool], paths: dict[str, Path]) -> None:
    with loaded(paths[name]) as found:
        assert isinstance(found.model, TorchModel)
        specs = [layer.spec for layer in found.model._layers._layers]
        assert [spec.looks_ahead for spec in specs] == ahead[: len(specs)]
        assert found.media_reader is not None
        prompt = found.media_reader.read(
            {"image": [picture(1, 48, 32)]},
            lambda encode: encode(found.media_reader.marks["image"]),
            lambda text: found.tokenizer.encode(text),
            1000,
        )
        assert prompt.media.whole == any(ahead)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("gemma3", {"decoder_backend": "compiled"}, marks=pytest.mark.long),
        ("gemma3", {"attention_backend": "torch"}),
        ("gemma4_moe", {}),
    ],
    ids=str,
)
@pytest.mark.in_short("gemma3")
def test_they_say_what_they_say_in_transformers(name: str, changes: dict[str, Any], paths: dict[str, Path]) -> None:
    parts = ["Look: ", picture(1, 48, 32), " and ", picture(2, 40, 24), " which?"]

    def conversation(**image: Any) -> list[dict[str, Any]]:
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image"} | {name: part for name in image}
            for part in parts
        ]
        return [{"role": "user", "content": content}]

    expected = reference(paths[name], conversation(), parts[1::2], 8)
    config = EngineConfig(str(paths[name]), device="cpu", dtype="float32", **changes)

    async def answer() -> list[int]:
        async with AsyncEngine(config) as engine:
            chosen = GenerationConfig(temperature=0.0, max_tokens=8, ignore_eos=True)
            return list((await engine.chat(conversation(image=True), chosen)).token_ids)

    assert asyncio.run(answer()) == expected


def test_one_that_looks_ahead_otherwise_takes_no_images(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.gemma3 import modeling_gemma3

    groups = modeling_gemma3.get_block_sequence_ids_for_mask
    together = lambda *given, **named: groups(*given, **named).clamp(max=0)  # noqa: E731
    monkeypatch.setattr(modeling_gemma3, "get_block_sequence_ids_for_mask", together)
    with loaded(paths["gemma3"]) as found:
        assert found.media_reader is None
        (note,) = found.notes
        assert note.startswith("images: refused: its tokens of an image look at later ones, but not at all of it and")
        assert "self_attn" in note
