"""Audio in the bodies of requests: taken as base64, never fetched, and told apart when something is wrong with it."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from asyncengine import AsyncEngine
from asyncengine.testing import pieces_of, scripted_engine
from tests.server.serving import MODEL, error, served

pytestmark = pytest.mark.loops("either")

CHAT = "/v1/chat/completions"
FILE, IMAGE = b"RIFF a file", b"\x89PNG"


def hearing() -> AsyncEngine:
    heard, seen = pieces_of(FILE, "audio"), pieces_of(IMAGE)

    def told(prompt: Any, branch: int) -> bytes:
        text = [*prompt]
        for pieces, name in ((heard, b"[audio]"), (seen, b"[image]")):
            while pieces[0] in text:
                at = text.index(pieces[0])
                text[at : at + len(pieces)] = name
        return bytes(text)

    return scripted_engine(told, takes_audio=True, takes_images=True)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def input_audio(data: Any = FILE) -> dict[str, Any]:
    text = encoded(data) if isinstance(data, bytes) else data
    return {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}


def asked(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


async def test_it_is_heard_beside_images_and_counted() -> None:
    text, url = {"type": "text", "text": "hear "}, f"data:image/png;base64,{encoded(IMAGE)}"
    async with served(hearing()) as client:
        body = asked(text, input_audio(), {"type": "image_url", "image_url": {"url": url}})
        found = (await client.post(CHAT, json=body)).json()
        assert found["choices"][0]["message"]["content"] == "user: hear [audio][image]\nassistant: "
        assert found["usage"]["prompt_tokens_details"]["audio_tokens"] == len(pieces_of(FILE, "audio"))
        by_url = {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{encoded(FILE)}"}}
        found = (await client.post(CHAT, json=asked(by_url))).json()
        assert found["choices"][0]["message"]["content"] == "user: [audio]\nassistant: "
        answered = (await client.post("/v1/responses", json={"input": body["messages"]})).json()
        assert answered["output"][0]["content"][0]["text"] == "user: hear [audio][image]\nassistant: "
        counted = (await client.post("/tokenize", json=body)).json()["count"]
        assert counted == len("user: hear \nassistant: ") + len(pieces_of(FILE, "audio")) + len(pieces_of(IMAGE))
        [model] = (await client.get("/v1/models")).json()["data"]
        assert model["architecture"]["input_modalities"] == ["text", "image", "audio"]
        metrics = (await client.get("/metrics")).text
        [line] = [line for line in metrics.splitlines() if line.startswith("asyncengine_audio_tokens_total")]
        assert float(line.rsplit(" ", 1)[1]) == 3 * len(pieces_of(FILE, "audio"))


@pytest.mark.parametrize(
    ("part", "field", "says"),
    [
        (input_audio(FILE + b"!" * 10), "input_audio.data", "has 21 bytes; allowed: max_audio_bytes = 20"),
        (input_audio(b""), "input_audio.data", "is an audio of 0 bytes"),
        (input_audio("!!!!"), "input_audio.data", "is not base64"),
        (input_audio(None), "input_audio", "expected an object with data"),
        ({"type": "input_audio"}, "input_audio", "expected an object with data"),
        (
            {"type": "audio_url", "audio_url": {"url": "https://example.com/a.wav"}},
            "audio_url.url",
            "has the scheme 'https'; audio is not fetched here",
        ),
        (
            {"type": "audio_url", "audio_url": "data:image/png;base64,AAAA"},
            "audio_url",
            "is data of the type 'image/png'; expected data:audio/...",
        ),
    ],
)
async def test_what_is_wrong_is_said_with_its_field(part: dict[str, Any], field: str, says: str) -> None:
    async with served(hearing(), max_audio_bytes=20) as client:
        refused = await client.post(CHAT, json=asked(input_audio(), part))
        assert refused.status_code == 400
        assert error(refused)["param"] == f"messages[0].content[1].{field}"
        assert says in error(refused)["message"]


async def test_what_the_engine_finds_wrong_is_said_with_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncengine.errors import InvalidRequestError
    from asyncengine.testing import ScriptedMediaReader

    def refuse(*given: Any) -> None:
        raise InvalidRequestError("audio[1]: an audio is damaged")

    monkeypatch.setattr(ScriptedMediaReader, "read", refuse)
    async with served(hearing()) as client:
        refused = await client.post(CHAT, json=asked(input_audio(), input_audio()))
        assert error(refused)["param"] == "messages[0].content[1].input_audio.data"
        assert "cannot be taken: an audio is damaged" in error(refused)["message"]


async def test_none_where_it_has_no_place() -> None:
    async with served(hearing()) as client:
        body = {"messages": [{"role": "system", "content": [input_audio()]}, *asked("x")["messages"]]}
        refused = await client.post(CHAT, json=body)
        assert error(refused)["param"] == "messages[0].content[0].type"
        assert "audio and videos go into messages whose role is user or tool" in error(refused)["message"]


def transcribing() -> AsyncEngine:
    def told(prompt: Any, branch: int) -> bytes:
        heard, text = pieces_of(FILE, "audio"), [*prompt]
        if heard[0] in text:
            text[text.index(heard[0]) : text.index(heard[0]) + len(heard)] = b"[audio]"
        return bytes(text).replace(b"\n", b"|")

    return scripted_engine(told, takes_audio=True)


ROUTE = "/v1/audio/transcriptions"


async def test_transcripts_of_files() -> None:
    pieces = len(pieces_of(FILE, "audio"))
    async with served(transcribing()) as client:
        form = {"model": MODEL, "language": "en", "prompt": "names", "temperature": "0"}
        found = await client.post(ROUTE, data=form, files={"file": ("a.wav", FILE)})
        assert found.status_code == 200
        assert found.json() == {
            "text": "names|[audio]|en",
            "usage": {
                "input_tokens": 9 + pieces,
                "output_tokens": 17,
                "total_tokens": 26 + pieces,
                "input_token_details": {"text_tokens": 9, "audio_tokens": pieces},
                "type": "tokens",
            },
        }
        text = await client.post(ROUTE, data={"response_format": "text"}, files={"file": ("a.wav", FILE)})
        assert text.text == "|[audio]|" and text.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("form", "files", "status", "param", "says"),
    [
        ({"response_format": "srt"}, {"file": FILE}, 400, "response_format", "allowed: 'json', 'text'"),
        ({"language": "xx"}, {"file": FILE}, 400, "language", "language is 'xx'; allowed: 'en'"),
        ({"temperature": "warm"}, {"file": FILE}, 400, "temperature", "'warm'; expected a number"),
        ({"stream": "maybe"}, {"file": FILE}, 400, "stream", "stream is 'maybe'; allowed: 'true', 'false'"),
        (
            {"stream": "true", "response_format": "srt"},
            {"file": FILE},
            400,
            "response_format",
            "allowed: 'json', 'text'",
        ),
        ({"stream": "true", "language": "xx"}, {"file": FILE}, 400, "language", "language is 'xx'; allowed: 'en'"),
        ({"fallback": "true", "temperature": "0.4"}, {"file": FILE}, 400, "temperature", "the fallback says which"),
        (
            {"timestamp_granularities[]": "x"},
            {"file": FILE},
            400,
            "timestamp_granularities[]",
            "allowed: 'segment', 'word'",
        ),
        ({"colour": "red"}, {"file": FILE}, 400, "colour", "unknown field 'colour'"),
        ({"model": "other"}, {"file": FILE}, 404, "model", "the model 'other' does not exist"),
        ({"model": MODEL}, {"sound": FILE}, 400, "file", "the form has the files 'sound'; expected one, 'file'"),
        ({}, {"file": FILE + b"!" * 10}, 400, "file", "file has 21 bytes; allowed: max_audio_bytes = 20"),
        ({"prompt": "x" * (1 << 17)}, {"file": FILE}, 400, "prompt", "has more than 65536 bytes"),
        (dict.fromkeys(map(str, range(70)), "x"), {"file": FILE}, 400, None, "more than 64 parts"),
    ],
)
async def test_forms_that_are_refused(form: Any, files: dict[str, bytes], status: int, param: Any, says: str) -> None:
    async with served(transcribing(), max_audio_bytes=20) as client:
        sent = {name: ("a.wav", data) for name, data in files.items()}
        refused = await client.post(ROUTE, data=form, files=sent)
        assert refused.status_code == status and error(refused)["param"] == param, refused.text
        assert says in error(refused)["message"]


async def test_what_is_no_form_or_comes_from_another_site() -> None:
    boundary = {"content-type": "multipart/form-data; boundary=x"}
    async with served(transcribing(), cors_origins=["https://friend.example"]) as client:
        for content, kind, status, says in (
            (b"{}", {"content-type": "application/json"}, 415, "expected multipart/form-data"),
            (b"x", {"content-type": "multipart/form-data"}, 415, "with a boundary"),
            (b"no form", boundary, 400, "the body is not a form"),
            (b"x" * 2000, boundary, 413, "max_body_bytes"),
        ):
            service = client if status != 413 else None
            if service is None:
                async with served(transcribing(), max_body_bytes=1000) as small:
                    refused = await small.post(ROUTE, content=content, headers=kind)
            else:
                refused = await service.post(ROUTE, content=content, headers=kind)
            assert refused.status_code == status and says in error(refused)["message"], refused.text
        for origin, status in (("https://other.example", 403), ("https://friend.example", 200), (None, 200)):
            headers = {} if origin is None else {"origin": origin}
            answered = await client.post(ROUTE, files={"file": ("a.wav", FILE)}, headers=headers)
            assert answered.status_code == status
        own = {"origin": f"http://{client.base_url.host}"}
        assert (await client.post(ROUTE, files={"file": ("a.wav", FILE)}, headers=own)).status_code == 200


async def test_who_takes_no_audio_transcribes_none() -> None:
    async with served(None) as client:
        refused = await client.post(ROUTE, files={"file": ("a.wav", FILE)})
        assert "the model takes none: its checkpoint has no encoder of audio" in error(refused)["message"]
        assert refused.status_code == 400
