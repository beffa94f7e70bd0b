"""Videos in the bodies of requests: as base64 or fetched from where it is allowed, and told apart when one is wrong."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from asyncengine import AsyncEngine, Video
from asyncengine.errors import InvalidRequestError
from asyncengine.testing import ScriptedMediaReader, pieces_of, scripted_engine
from tests.server.serving import error, served
from tests.server.test_fetch import allowing, host, http

pytestmark = pytest.mark.loops("either")

CHAT = "/v1/chat/completions"
FILE, IMAGE = b"\x00\x00\x00\x18ftyp", b"\x89PNG"


def seeing() -> AsyncEngine:
    shown = {b"[video]": pieces_of(FILE, "video"), b"[image]": pieces_of(IMAGE)}

    def told(prompt: Any, branch: int) -> bytes:
        text = [*prompt]
        for name, pieces in shown.items():
            while pieces[0] in text:
                at = text.index(pieces[0])
                text[at : at + len(pieces)] = name
        return bytes(text)

    return scripted_engine(told, takes_videos=True, takes_images=True)


def url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def video_url(data: bytes = FILE, **more: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url(data)}, **more}


def asked(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The videos that a reader was given."""
    found, reading = list[Any](), ScriptedMediaReader.read

    def watched(self: Any, sources: Any, *more: Any) -> Any:
        found.extend(sources["video"])
        return reading(self, sources, *more)

    monkeypatch.setattr(ScriptedMediaReader, "read", watched)
    return found


async def test_they_are_seen_beside_images_and_counted(read: list[Any]) -> None:
    image = {"type": "image_url", "image_url": {"url": url(IMAGE, "image/png")}}
    async with served(seeing()) as client:
        body = asked({"type": "text", "text": "see "}, video_url(fps=0.5), image)
        found = (await client.post(CHAT, json=body)).json()
        assert found["choices"][0]["message"]["content"] == "user: see [video][image]\nassistant: "
        for form, video in (
            ({"type": "video_url", "video_url": url(FILE)}, Video(FILE)),
            ({"type": "video", "video": url(FILE, "video/webm"), "num_frames": 8}, Video(FILE, num_frames=8)),
            ({"type": "input_video", "input_video": {"data": base64.b64encode(FILE).decode()}}, Video(FILE)),
        ):
            found = (await client.post(CHAT, json=asked(form))).json()
            assert found["choices"][0]["message"]["content"] == "user: [video]\nassistant: "
            assert read[-1] == video
        assert read[0] == Video(FILE, fps=0.5)
        counted = (await client.post("/tokenize", json=body)).json()["count"]
        assert counted == len("user: see \nassistant: ") + len(pieces_of(FILE, "video")) + len(pieces_of(IMAGE))
        [model] = (await client.get("/v1/models")).json()["data"]
        assert model["architecture"]["input_modalities"] == ["text", "image", "video"]
        metrics = (await client.get("/metrics")).text
        [line] = [line for line in metrics.splitlines() if line.startswith("asyncengine_video_tokens_total")]
        assert float(line.rsplit(" ", 1)[1]) == 4 * len(pieces_of(FILE, "video"))


async def test_they_are_fetched_from_where_it_is_allowed(read: list[Any]) -> None:
    async with host(film=http(FILE)) as media, allowing(media, engine=seeing()) as client:
        part = {"type": "video_url", "video_url": {"url": media.url("/film")}, "fps": 1}
        answer = (await client.post(CHAT, json=asked(part))).json()
        assert answer["choices"][0]["message"]["content"] == "user: [video]\nassistant: "
        assert read == [Video(FILE, fps=1)]
        elsewhere = {"type": "video_url", "video_url": {"url": "http://elsewhere.example/film"}}
        refused = await client.post(CHAT, json=asked(elsewhere))
        assert "leads to the host 'elsewhere.example'" in error(refused)["message"]
        assert media.asked == ["/film"]
    async with host(film=http(FILE * 3)) as media, allowing(media, engine=seeing(), max_video_bytes=20) as client:
        part = {"type": "video_url", "video_url": {"url": media.url("/film")}}
        assert "allowed: max_video_bytes = 20" in error(await client.post(CHAT, json=asked(part)))["message"]


@pytest.mark.parametrize(
    ("part", "field", "says"),
    [
        (video_url(FILE * 3), "video_url.url", "has 24 bytes; allowed: max_video_bytes = 20"),
        (video_url(b""), "video_url.url", "is a video of 0 bytes"),
        ({"type": "video_url"}, "video_url", "is missing; expected data:video/...;base64,..."),
        ({"type": "video", "video": [url(IMAGE, "image/png")]}, "video", "is missing; expected data:video/"),
        ({"type": "input_video", "input_video": {"data": "!!!!"}}, "input_video.data", "is not base64"),
        (
            {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
            "video_url.url",
            "has the scheme 'file'; videos are not fetched here",
        ),
        (
            {"type": "video_url", "video_url": url(IMAGE, "image/png")},
            "video_url",
            "is data of the type 'image/png'; expected data:video/...",
        ),
        (video_url(fps=0), "fps", "fps is 0; expected frames in a second, more than 0"),
        (video_url(num_frames="8"), "num_frames", "num_frames is '8'; expected 1 or more"),
        (video_url(fps=1, num_frames=8), "fps", "allowed: one of them"),
        (video_url(fps=1, num_frames=0), "num_frames", "num_frames is 0; expected 1 or more"),
        (
            {"type": "video_url", "video_url": {"url": url(FILE), "num_frames": 8}},
            "video_url.num_frames",
            "stands in the wrong place; expected messages[0].content[1].num_frames",
        ),
    ],
)
async def test_what_is_wrong_is_said_with_its_field(part: dict[str, Any], field: str, says: str) -> None:
    async with served(seeing(), max_video_bytes=20) as client:
        refused = await client.post(CHAT, json=asked(video_url(), part))
        assert refused.status_code == 400
        assert error(refused)["param"] == f"messages[0].content[1].{field}"
        assert says in error(refused)["message"]


async def test_what_the_engine_finds_wrong_is_said_with_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise InvalidRequestError("videos[1]: a video is damaged")

    monkeypatch.setattr(ScriptedMediaReader, "read", refuse)
    async with served(seeing()) as client:
        refused = await client.post(CHAT, json=asked(video_url(), video_url()))
        assert error(refused)["param"] == "messages[0].content[1].video_url.url"
        assert "cannot be taken: a video is damaged" in error(refused)["message"]


async def test_a_model_that_takes_none_has_none_fetched() -> None:
    async with (
        host(film=http(FILE)) as media,
        allowing(media, engine=scripted_engine("ok", takes_images=True)) as client,
    ):
        part = {"type": "video_url", "video_url": {"url": media.url("/film")}}
        refused = await client.post(CHAT, json=asked(part))
        assert "the prompt has videos; the model takes none" in error(refused)["message"]
        assert not media.asked
