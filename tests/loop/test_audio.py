"""Audio in prompts, to a model that knows each piece that it has heard."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from asyncengine import AudioPrompt, EngineConfig, GenerationConfig, ImagePrompt, InvalidRequestError
from asyncengine.testing import ByteTokenizer, ScriptedLoader, pieces_of
from tests.loop.media_engine import LONG, engine, script

pytestmark = pytest.mark.loops("either")


def hearing(**changes: Any) -> ScriptedLoader:
    return ScriptedLoader(script, tokenizer=ByteTokenizer(), **({"takes_audio": True, "takes_images": True} | changes))


Part = str | tuple[str, bytes]


def asking(*parts: Part) -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": part[0], part[0]: part[1]}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def answer(*parts: Part) -> list[int]:
    tokens: list[int] = []
    for part in parts:
        tokens += part.encode() if isinstance(part, str) else pieces_of(part[1], part[0])  # type: ignore[arg-type]
    return script([*b"user: ", *tokens, *b"\nassistant: "], 0)


@pytest.mark.parametrize("changes", [{}, {"whole_images": True}])
async def test_each_piece_is_heard_where_it_stands_beside_images(changes: dict[str, Any]) -> None:
    same = b"the same file"
    asked: list[tuple[Part, ...]] = [
        ("what is ", ("audio", LONG), " and ", ("image", LONG), "?"),
        (("image", same), ("audio", same), ("audio", same)),
        ("\0no image, no audio\1"[1:-1],),
        (("audio", b"x"), "\0"[1:], ("audio", b"y")),
    ]
    async with engine(hearing(**changes), max_total_sequence_length=160) as serving:
        for _ in range(2):
            found = await asyncio.gather(*(serving.chat(asking(*parts)) for parts in asked))
            for parts, result in zip(asked, found, strict=True):
                assert list(result.token_ids)[:-1] == answer(*parts)


async def test_it_is_shared_where_it_is_the_same_and_counted() -> None:
    async with engine(hearing(), max_num_sequence=1) as serving:
        first = await serving.chat(asking("what is ", ("audio", LONG), " there?"))
        same = await serving.chat(asking("what is ", ("audio", LONG), " there?"))
        image = await serving.chat(asking("what is ", ("image", LONG), " there?"))
        assert same.usage.cached_tokens == (same.usage.prompt_tokens - 1) // 4 * 4
        assert image.usage.cached_tokens == len("user: what is ") // 4 * 4
        assert [each.usage.audio_tokens for each in (first, same, image)] == [7, 7, 0]
        counters = serving.metrics().counters
        assert (counters.audio_tokens, counters.image_tokens) == (14, 7)


async def test_forms_of_audio_in_messages() -> None:
    encoded = base64.b64encode(LONG).decode()
    async with engine(hearing()) as serving:
        for form in (
            {"type": "audio", "audio": LONG},
            {"type": "audio", "base64": encoded},
            {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
            {"type": "audio_url", "audio_url": {"url": LONG.decode()}},
        ):
            result = await serving.chat([{"role": "user", "content": [form]}])
            assert list(result.token_ids)[:-1] == answer(("audio", LONG))
        for form, message in (
            ({"type": "audio"}, "an audio part with"),
            ({"type": "audio", "audio": LONG, "url": "x"}, "an audio part with"),
            ({"type": "input_audio", "input_audio": {}}, "an audio part without audio"),
            ({"type": "input_audio", "input_audio": {"data": "!"}}, "whose base64 is none"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                await serving.chat([{"role": "user", "content": [form]}])


async def test_prompts_with_marks() -> None:
    async with engine(hearing()) as serving:
        found = await serving.generate(AudioPrompt("a\1b\0", [LONG], [b"x"]))
        wanted = [97, *pieces_of(LONG, "audio"), 98, *pieces_of(b"x")]
        assert list(found.token_ids)[:-1] == script(wanted, 0)
        for prompt, message in (
            (AudioPrompt("a\1\1", [b"x"]), "more marks of audio than audio, 1"),
            (AudioPrompt("a\1", [b"x"], [b"y"]), "has 0 marks of images; expected 1"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                await serving.generate(prompt)
    for text, audio, images, message in (
        ("", [b"x"], [], "text is ''"),
        ("\1", [], [], r"audio is \[\]"),
        ("\1", b"x", [], "audio is b'x'; expected a list"),
        ("\1", [b"x"], b"y", "images is b'y'; expected a list"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            AudioPrompt(text, audio, images)  # type: ignore[arg-type]


async def test_who_takes_none_says_why() -> None:
    async with engine(hearing(takes_audio=False)) as serving:
        assert serving.takes_images and not serving.takes_audio
        with pytest.raises(InvalidRequestError, match=r"has audio; the model takes none: .* no encoder of audio"):
            await serving.chat(asking(("audio", b"x")))
        assert await serving.chat(asking(("image", b"x")))
    async with engine(hearing(takes_images=False)) as serving:
        assert serving.takes_audio and not serving.takes_images
        with pytest.raises(InvalidRequestError, match="has images; the model takes none"):
            await serving.generate(ImagePrompt("\0", [b"x"]))
        assert (await serving.chat(asking("\0", ("audio", b"x")))).token_ids


@pytest.mark.parametrize("audio", [True, False])
async def test_another_model_carries_it_on_if_it_listens(audio: bool) -> None:
    loader = hearing(fits_beside=False)
    loader.script = lambda prompt, branch: script(prompt, branch)[:1] * 1500
    async with engine(loader) as serving:
        loader.model.hold()
        stream = await serving.add_request(AudioPrompt("what is \1", [LONG]), GenerationConfig(max_tokens=50))
        await asyncio.to_thread(loader.model.wait_until_held)
        loader.takes_audio = audio
        reloading = asyncio.ensure_future(serving.reload(EngineConfig("other"), in_flight="carry"))
        loader.model.release()
        await reloading
        if audio:
            wanted = loader.script([*b"what is ", *pieces_of(LONG, "audio")], 0)
            assert list((await stream).token_ids) == wanted[:50]
        else:
            with pytest.raises(InvalidRequestError, match="the new model does not take its audio"):
                await stream


async def test_transcripts() -> None:
    loader = hearing()
    asked: list[list[int]] = []

    def said(prompt: Sequence[int], branch: int) -> list[int]:
        asked.append(list(prompt))
        return [*b" hello "]

    loader.script = said
    async with engine(loader) as serving:
        found = await serving.transcribe(LONG, language="en", hint="names")
        assert (found.text, found.finish_reason, found.usage.audio_tokens) == ("hello", "stop", 7)
        cut = await serving.transcribe(LONG, GenerationConfig(max_tokens=3))
        assert (cut.text, cut.finish_reason) == ("he", "length")
        heard = pieces_of(LONG, "audio")
        assert asked == [[*b"names\n", *heard, *b"\nen"], [*b"\n", *heard, *b"\n"]]
        with pytest.raises(InvalidRequestError, match="language is 'xx'; allowed: 'en'"):
            await serving.transcribe(LONG, language="xx")
    async with engine(hearing(takes_audio=False)) as serving:
        with pytest.raises(InvalidRequestError, match=r"the model takes none: .* no encoder of audio"):
            await serving.transcribe(LONG)


async def test_an_answer_is_read_by_the_model_that_gave_it() -> None:
    """Another one may be loaded while the audio is being read."""
    begun, go_on = threading.Event(), threading.Event()

    def reader(text: str) -> Any:
        view = serving._thread.core.view
        assert view is not None and view.media_reader is not None
        transcribing: Any = view.media_reader.transcribing
        transcribing.parses, transcribing.text = True, lambda token_ids: text
        return view.media_reader

    async with engine(hearing()) as serving:
        first = reader("by the first")
        read = first.read

        def held(*arguments: Any) -> Any:
            begun.set()
            assert go_on.wait(10.0)
            return read(*arguments)

        first.read = held
        transcribing = asyncio.ensure_future(serving.transcribe(LONG))
        assert await asyncio.to_thread(begun.wait, 10.0)
        await serving.reload(EngineConfig("another"))
        assert reader("by the second") is not first
        go_on.set()
        assert (await transcribing).text == "by the second"
