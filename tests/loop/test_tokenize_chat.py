"""`AsyncEngine.tokenize_chat`, which computes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncengine import EngineClosedError, InvalidRequestError, ModelNotLoadedError
from asyncengine.testing import ScriptedMediaReader, pieces_of, scripted_engine

HELLO = [{"role": "user", "content": "hello"}]
LOOK: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image", "image": b"image"}]}]


async def test_it_has_the_tokens_that_a_request_has() -> None:
    async with scripted_engine("Hi!", takes_images=True) as engine:
        assert engine.takes_images
        for messages in (HELLO, LOOK, LOOK + HELLO):
            stream = engine.chat(messages)
            async with stream as entered:
                assert await engine.tokenize_chat(messages) == entered.prompt_token_ids.tolist()
        stand_ins = [ScriptedMediaReader().token_ids["image"]] * len(pieces_of(b"image"))
        assert await engine.tokenize_chat(LOOK) == [*b"user: ", *stand_ins, *b"\nassistant: "]
        await engine.reset()
        await engine.tokenize_chat(LOOK, messages="an argument of the template")
        assert engine.metrics().counters.prompt_tokens == 0


async def test_it_waits_for_a_model_that_is_being_loaded() -> None:
    engine = scripted_engine("Hi!")
    assert not engine.takes_images
    with pytest.raises(ModelNotLoadedError):
        await engine.tokenize_chat(HELLO)
    loading = asyncio.ensure_future(engine.reload('{"model": "scripted"}'))
    await asyncio.sleep(0)
    assert bytes(await engine.tokenize_chat(HELLO)) == b"user: hello\nassistant: "
    await loading
    with pytest.raises(InvalidRequestError, match="the prompt has images; the model takes none"):
        await engine.tokenize_chat(LOOK)
    with pytest.raises(InvalidRequestError, match="messages is"):
        await engine.tokenize_chat([])
    await engine.shutdown()
    with pytest.raises(EngineClosedError):
        await engine.tokenize_chat(HELLO)
