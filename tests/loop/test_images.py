"""Images in prompts, to a model that knows each piece of them that it has seen."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from asyncengine import (
    DeadlineExceededError,
    Deadlines,
    EngineConfig,
    GenerationConfig,
    ImagePrompt,
    InvalidRequestError,
    RequestOptions,
)
from asyncengine.loop.encoding import _READERS
from asyncengine.testing import ByteTokenizer, ScriptedLoader, ScriptedMediaReader, pieces_of
from tests.loop.media_engine import LONG, engine, script
from tests.speculation.drafters import Oracle

pytestmark = pytest.mark.loops("either")


def looking(**changes: Any) -> ScriptedLoader:
    return ScriptedLoader(script, tokenizer=ByteTokenizer(), **({"takes_images": True} | changes))


def asking(*parts: str | bytes) -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def answer(*parts: str | bytes, branch: int = 0) -> list[int]:
    tokens = [token for part in parts for token in (part.encode() if isinstance(part, str) else pieces_of(part))]
    return script([*b"user: ", *tokens, *b"\nassistant: "], branch)


CONVERSATIONS: list[tuple[str | bytes, ...]] = [
    ("what is ", b"this", " and ", b"that one", "?"),
    (b"this", b"this"),
    ("\0no image, but what stands for one\0"[1:-1],),
    (b"that one", " is not ", b"this"),
    ("what is ", b"this", " and ", LONG, "?"),
]


@pytest.mark.parametrize(
    "changes",
    [{}, {"run_ahead": True}, {"kept_states": 3}, {"whole_images": True}, {"make_drafter": Oracle, "kept_states": 3}],
)
async def test_each_piece_is_seen_where_it_stands(changes: dict[str, Any]) -> None:
    async with engine(looking(**changes), max_total_sequence_length=160) as serving:
        for _ in range(2):
            several = [serving.chat(asking(*parts), GenerationConfig(n=2)) for parts in CONVERSATIONS]
            for parts, result in zip(CONVERSATIONS, await asyncio.gather(*several), strict=True):
                for branch in (0, 1):
                    assert list(result.outputs[branch].token_ids)[:-1] == answer(*parts, branch=branch)


async def test_they_are_shared_where_they_are_the_same() -> None:
    async with engine(looking(), max_num_sequence=1) as serving:
        await serving.chat(asking("what is ", b"this", " picture?"))
        same = await serving.chat(asking("what is ", b"this", " picture?"))
        other = await serving.chat(asking("what is ", b"that", " picture?"))
        assert same.usage.cached_tokens == (same.usage.prompt_tokens - 1) // 4 * 4
        assert other.usage.cached_tokens == len("user: what is ") // 4 * 4
        assert serving.metrics().counters.image_tokens == 3 * len(pieces_of(b"this"))
        assert same.usage.prompt_tokens == len("user: what is  picture?\nassistant: ") + len(pieces_of(b"this"))


async def test_a_prompt_with_marks() -> None:
    async with engine(looking(), max_single_sequence_length=100) as serving:
        found = await serving.generate(ImagePrompt("a\0b\0", [b"x", LONG]))
        assert list(found.token_ids)[:-1] == script([97, *pieces_of(b"x"), 98, *pieces_of(LONG)], 0)
        for prompt, message in (
            (ImagePrompt("a\0\0", [b"x"]), "more marks of images than images, 1"),
            (ImagePrompt("a", [b"x"]), "has 0 marks of images; expected 1"),
            (ImagePrompt("\0" * 80, [LONG] * 80), "come to 560 tokens; allowed: 99"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                await serving.generate(prompt)


async def test_an_image_that_must_be_seen_at_once_and_cannot() -> None:
    async with engine(looking(whole_images=True), prefill_chunk_size=7) as serving:
        assert list((await serving.chat(asking(LONG, b"x"))).token_ids)[:-1] == answer(LONG, b"x")
    async with engine(looking(whole_images=True), prefill_chunk_size=6) as serving:
        with pytest.raises(InvalidRequestError, match=r"comes to 7 tokens, .* allows 1\.\.6"):
            await serving.chat(asking(LONG))


@pytest.mark.parametrize("images", [True, False])
async def test_another_model_carries_them_on_if_it_reads_them_alike(images: bool) -> None:
    loader = looking(fits_beside=False)
    loader.script = lambda prompt, branch: script(prompt, branch)[:1] * 1500
    async with engine(loader) as serving:
        loader.model.hold()
        stream = await serving.add_request(ImagePrompt("what is \0", [LONG]))
        await asyncio.to_thread(loader.model.wait_until_held)
        loader.takes_images = images
        reloading = asyncio.ensure_future(serving.reload(EngineConfig("other"), in_flight="carry"))
        loader.model.release()
        await reloading
        if images:
            assert list((await stream).token_ids)[:-1] == loader.script([*b"what is ", *pieces_of(LONG)], 0)
        else:
            with pytest.raises(InvalidRequestError, match="the new model does not take its images"):
                await stream


async def test_a_deadline_passes_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, read = threading.Event(), threading.Event(), ScriptedMediaReader.read

    def slowly(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return read(*arguments)

    monkeypatch.setattr(ScriptedMediaReader, "read", slowly)
    options = RequestOptions(deadlines=Deadlines(first_token=0.02))
    async with engine(looking()) as serving:
        try:
            with pytest.raises(DeadlineExceededError, match="first_token deadline"):
                await serving.chat(asking(b"x"), None, options)
            assert begun.is_set()
        finally:
            go_on.set()
        assert len(serving._thread.core.requests) == 0
        assert (await serving.chat(asking(b"x"))).text


async def test_few_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, most, lock = 0, 0, threading.Lock()
    read = ScriptedMediaReader.read

    def watched(*arguments: Any) -> Any:
        nonlocal reading, most
        with lock:
            reading, most = reading + 1, max(most, reading + 1)
        together.wait(30)
        with lock:
            reading -= 1
        return read(*arguments)

    together = threading.Barrier(_READERS)
    monkeypatch.setattr(ScriptedMediaReader, "read", watched)
    async with engine(looking()) as serving:
        await asyncio.gather(*(serving.chat(asking(b"x"), GenerationConfig(max_tokens=1)) for _ in range(8)))
    assert most == _READERS


async def test_one_that_must_be_seen_at_once_and_no_longer_can() -> None:
    loader = looking(fits_beside=False, whole_images=True)
    loader.script = lambda prompt, branch: script(prompt, branch)[:1] * 1500
    async with engine(loader) as serving:
        loader.model.hold()
        stream = await serving.add_request(ImagePrompt("what is \0", [LONG]))
        await asyncio.to_thread(loader.model.wait_until_held)
        reloading = asyncio.ensure_future(
            serving.reload(EngineConfig("other", prefill_chunk_size=6), in_flight="carry")
        )
        loader.model.release()
        await reloading
        with pytest.raises(InvalidRequestError, match=r"an image of 7 tokens .* of the new model allows 6"):
            await stream


async def test_who_takes_none_says_why() -> None:
    async with engine(looking(takes_images=False)) as serving:
        assert not serving.takes_images
        for prompt in (serving.chat(asking(b"x")), serving.stream(ImagePrompt("\0", [b"x"]))):
            with pytest.raises(
                InvalidRequestError, match="the model takes none: its checkpoint has no encoder of images"
            ):
                await prompt
