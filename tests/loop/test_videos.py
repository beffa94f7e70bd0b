"""Videos in prompts, to a model that knows each piece that it has seen."""

from __future__ import annotations

import asyncio
import base64
import threading
from typing import Any

import pytest

from asyncengine import (
    AsyncEngine,
    AudioPrompt,
    EngineConfig,
    GenerationConfig,
    ImagePrompt,
    InvalidRequestError,
    Video,
    VideoPrompt,
)
from asyncengine.loop.encoding import _READERS, in_thread, media_readers
from asyncengine.testing import ByteTokenizer, ScriptedLoader, ScriptedMediaReader, pieces_of, scripted_engine
from tests.loop.harness import eventually
from tests.loop.media_engine import LONG, engine, script

pytestmark = pytest.mark.loops("either")


def looking(**changes: Any) -> ScriptedLoader:
    values = {"takes_images": True, "takes_audio": True, "takes_videos": True}
    return ScriptedLoader(script, tokenizer=ByteTokenizer(), **(values | changes))


Part = str | tuple[str, Any]


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


@pytest.mark.parametrize("changes", [{}, {"run_ahead": True, "kept_states": 3}])
async def test_each_piece_is_seen_where_it_stands_beside_images_and_audio(changes: dict[str, Any]) -> None:
    same = b"the same file"
    asked: list[tuple[Part, ...]] = [
        ("what is ", ("video", LONG), " and ", ("image", LONG), "?"),
        (("image", same), ("video", same), ("audio", same), ("video", same)),
        ("\2no video\2"[1:-1],),
        (("video", b"x"), "\2"[1:], ("video", b"y")),
    ]
    async with engine(looking(**changes), max_total_sequence_length=160) as serving:
        for _ in range(2):
            found = await asyncio.gather(*(serving.chat(asking(*parts)) for parts in asked))
            for parts, result in zip(asked, found, strict=True):
                assert list(result.token_ids)[:-1] == answer(*parts)


async def test_they_are_shared_where_they_are_the_same_and_counted() -> None:
    async with engine(looking(), max_num_sequence=1) as serving:
        await serving.chat(asking("what is ", ("video", LONG), " there?"))
        same = await serving.chat(asking("what is ", ("video", LONG), " there?"))
        image = await serving.chat(asking("what is ", ("image", LONG), " there?"))
        other = await serving.chat(asking("what is ", ("video", b"another one of seven"), " there?"))
        assert same.usage.cached_tokens == (same.usage.prompt_tokens - 1) // 4 * 4
        for each in (image, other):
            assert each.usage.cached_tokens == len("user: what is ") // 4 * 4
        counters = serving.metrics().counters
        assert (counters.video_tokens, counters.image_tokens) == (21, 7)


async def test_forms_of_videos_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, seen, read = base64.b64encode(LONG).decode(), list[Any](), ScriptedMediaReader.read

    def watched(self: Any, sources: Any, *more: Any) -> Any:
        seen.extend(sources["video"])
        return read(self, sources, *more)

    monkeypatch.setattr(ScriptedMediaReader, "read", watched)
    async with engine(looking()) as serving:
        for form, video in (
            ({"type": "video", "video": LONG}, Video(LONG)),
            ({"type": "video", "base64": encoded, "num_frames": 4}, Video(LONG, num_frames=4)),
            ({"type": "video_url", "video_url": {"url": LONG.decode()}, "fps": 0.5}, Video(LONG.decode(), fps=0.5)),
            ({"type": "video_url", "video_url": LONG.decode()}, Video(LONG.decode())),
            ({"type": "input_video", "input_video": {"data": encoded, "format": "mp4"}}, Video(LONG)),
            ({"type": "video", "video": Video(LONG, fps=2)}, Video(LONG, fps=2)),
        ):
            result = await serving.chat([{"role": "user", "content": [form]}])
            assert list(result.token_ids)[:-1] == answer(("video", LONG))
            assert seen.pop() == video
        for form, message in (
            ({"type": "video"}, "a video part with"),
            ({"type": "video", "video": LONG, "url": "x"}, "a video part with"),
            ({"type": "video_url", "video_url": {}}, "a video part without a video"),
            ({"type": "input_video", "input_video": {"data": "!"}}, "a video part whose base64 is none"),
            ({"type": "video", "video": LONG, "fps": -1}, "fps is -1"),
            (
                {"type": "video_url", "video_url": {"url": LONG.decode(), "fps": 1}},
                "with fps in its video_url; expected",
            ),
            ({"type": "video", "video": Video(LONG), "num_frames": 1}, "beside a Video, which has them"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                await serving.chat([{"role": "user", "content": [form]}])


async def test_reading_that_nobody_waits_for_counts_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks and leaves, again and again, has no more threads at work than others."""
    go_on, read, begun = threading.Event(), ScriptedMediaReader.read, list[None]()

    def slowly(*given: Any) -> Any:
        begun.append(None)
        assert go_on.wait(30)
        return read(*given)

    monkeypatch.setattr(ScriptedMediaReader, "read", slowly)
    async with engine(looking()) as serving:
        readers = media_readers()
        try:
            asked = [asyncio.ensure_future(_told(serving)) for _ in range(_READERS + 2)]
            await eventually(lambda: readers.statistics().tasks_waiting == 2 and len(begun) == _READERS)
            for each in asked:
                each.cancel()
            await asyncio.wait(asked)
            assert readers.borrowed_tokens == _READERS
        finally:
            go_on.set()
        assert await _told(serving) == answer(("video", LONG))
        await eventually(lambda: readers.borrowed_tokens == 0)


async def test_reading_that_is_left_before_its_thread_begins_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[Any] = []

    async def never(work: Any, **_: Any) -> None:
        works.append(work)
        await asyncio.Event().wait()

    monkeypatch.setattr("anyio.to_thread.run_sync", never)
    readers = media_readers()
    reading = asyncio.ensure_future(in_thread(lambda: pytest.fail("it was read"), readers))
    await eventually(lambda: works)
    assert readers.borrowed_tokens == 1
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert readers.borrowed_tokens == 0
    with pytest.raises(RuntimeError, match="nobody waits for it"):  # should the thread come to it yet
        works[0]()
    assert readers.borrowed_tokens == 0


async def _told(serving: AsyncEngine) -> list[int]:
    return list((await serving.chat(asking(("video", LONG)))).token_ids)[:-1]


async def test_a_prompt_with_marks() -> None:
    async with engine(looking(), max_single_sequence_length=100) as serving:
        found = await serving.generate(VideoPrompt("a\2b\0c\1", [LONG], [b"x"], [b"y"]))
        seen = [*pieces_of(LONG, "video"), 98, *pieces_of(b"x"), 99, *pieces_of(b"y", "audio")]
        assert list(found.token_ids)[:-1] == script([97, *seen], 0)
        for prompt, message in (
            (VideoPrompt("a\2\2", [b"x"]), "more marks of videos than videos, 1"),
            (VideoPrompt("a", [b"x"]), "has 0 marks of videos; expected 1"),
            (VideoPrompt("\2" * 80, [LONG] * 80), "come to 560 tokens; allowed: 99"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                await serving.generate(prompt)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "", "videos": [b"x"]}, "text is ''"),
        ({"text": "a", "videos": []}, r"videos is \[\]"),
        ({"text": "a", "videos": b"x"}, "videos is b'x'; expected a list of videos"),
        ({"text": "a", "videos": [b"x"], "images": b"x"}, "images is b'x'; expected a list of images"),
        ({"text": "a", "videos": [b"x"], "audio": "x"}, "audio is 'x'; expected a list of audio"),
    ],
)
def test_what_is_no_prompt(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        VideoPrompt(**given)


@pytest.mark.parametrize("videos", [True, False])
async def test_another_model_carries_them_on_if_it_reads_them_alike(videos: bool) -> None:
    loader = looking(fits_beside=False)
    loader.script = lambda prompt, branch: script(prompt, branch)[:1] * 1500
    async with engine(loader) as serving:
        loader.model.hold()
        stream = await serving.add_request(VideoPrompt("what is \2", [LONG]))
        await asyncio.to_thread(loader.model.wait_until_held)
        loader.takes_videos = videos
        reloading = asyncio.ensure_future(serving.reload(EngineConfig("other"), in_flight="carry"))
        loader.model.release()
        await reloading
        if videos:
            seen = [*b"what is ", *pieces_of(LONG, "video")]
            assert list((await stream).token_ids)[:-1] == loader.script(seen, 0)
        else:
            with pytest.raises(InvalidRequestError, match="the new model does not take its videos"):
                await stream


async def test_who_takes_none_says_why() -> None:
    async with engine(looking(takes_videos=False)) as serving:
        assert serving.takes_images and not serving.takes_videos
        for prompt in (serving.chat(asking(("video", b"x"))), serving.stream(VideoPrompt("\2", [b"x"]))):
            with pytest.raises(
                InvalidRequestError, match="the model takes none: its checkpoint has no encoder of videos"
            ):
                await prompt
        with pytest.raises(InvalidRequestError, match="the prompt has videos"):
            await serving.check_media({"video"})
    async with scripted_engine("ok", takes_videos=True) as serving:
        assert serving.takes_videos and not serving.takes_images
        assert (await serving.chat(asking(("video", b"x")), GenerationConfig(max_tokens=2))).text == "ok"
        for prompt in (ImagePrompt("\0", [b"x"]), AudioPrompt("\1", [b"x"])):
            with pytest.raises(InvalidRequestError, match="the model takes none"):
                await serving.generate(prompt)
