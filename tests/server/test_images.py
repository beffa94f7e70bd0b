"""Images in requests, sent by clients that nobody here wrote to a model that says which ones it has seen, and where."""

from __future__ import annotations

import asyncio
import base64
import logging
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asyncengine import AsyncEngine, InvalidRequestError
from asyncengine.server import create_app
from asyncengine.testing import ScriptedMediaReader, pieces_of, scripted_engine
from tests.server.serving import KEY, MODEL, Later, error, listening, served, until

openai = Later("openai")
anthropic = Later("anthropic")

pytestmark = pytest.mark.loops("either")

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
RED, BLUE, LARGE = b"\x89PNG red", b"\xff\xd8 blue!", bytes(range(256)) * 36 * 1024  # 9 MiB
SECRET = b"what nobody else may see " * 4
NAMES = {"red": RED, "blue": BLUE, "large": LARGE, "secret": SECRET}


def told(prompt: Sequence[int], branch: int = 0) -> bytes:
    """The prompt as a text that names the images in it."""
    text, at, known = b"", 0, {name: pieces_of(data) for name, data in NAMES.items()}
    while at < len(prompt):
        for name, pieces in known.items():
            if list(prompt[at : at + len(pieces)]) == pieces:
                text += f"[{name}]".encode()
                at += len(pieces)
                break
        else:
            text += bytes([prompt[at]])
            at += 1
    return text


def seeing() -> AsyncEngine:
    return scripted_engine(told, takes_images=True)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{encoded(data)}"


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_part(data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(data), **more}}


def block(data: bytes) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded(data)}}


def from_user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@asynccontextmanager
async def address() -> AsyncIterator[str]:
    async with seeing() as engine, listening(create_app(engine, api_key=KEY)) as found:
        yield found


@asynccontextmanager
async def openai_client() -> AsyncIterator[Any]:
    async with address() as found:
        options: dict[str, Any] = {"base_url": f"{found}/v1", "api_key": KEY, "max_retries": 0}
        async with openai.AsyncOpenAI(**options, _strict_response_validation=True) as client:
            yield client


async def test_openai_chat_sees_them_where_they_stand() -> None:
    messages = [
        {"role": "system", "content": "Look."},
        *from_user(image_part(RED, detail="low"), text_part(" and "), image_part(BLUE), text_part("?")),
        {"role": "assistant", "content": [text_part("Both.")]},
        *from_user(text_part("this:"), text_part(" "), image_part(RED)),
    ]
    wanted = "system: Look.\nuser: [red] and [blue]?\nassistant: Both.\nuser: this: [red]\nassistant: "
    async with openai_client() as client:
        whole = await client.chat.completions.create(model=MODEL, messages=messages)
        assert whole.choices[0].message.content == wanted
        stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == wanted


async def test_openai_responses_sees_them_in_messages_and_in_the_output_of_functions() -> None:
    items = [
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Look: "},
                {"type": "input_image", "image_url": url(BLUE, "image/jpeg"), "detail": "auto"},
            ],
        },
        {"type": "function_call", "call_id": "c", "name": "paint", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "c",
            "output": [
                {"type": "input_image", "image_url": url(RED), "detail": "high"},
                {"type": "input_text", "text": "."},
            ],
        },
    ]
    wanted = "user: Look: [blue]\nassistant: \ntool: [red].\nassistant: "
    async with openai_client() as client:
        assert (await client.responses.create(model=MODEL, input=items)).output_text == wanted
        async with client.responses.stream(model=MODEL, input=items) as stream:
            assert (await stream.get_final_response()).output_text == wanted


async def test_anthropic_sees_them_in_messages_and_in_the_results_of_tools_and_counts_them() -> None:
    messages = [
        *from_user(block(BLUE), text_part("Look."), {"type": "image", "source": {"type": "url", "url": url(RED)}}),
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "paint", "input": {}}]},
        *from_user(
            {"type": "tool_result", "tool_use_id": "t", "content": [text_part("so "), block(RED)]}, text_part("Well?")
        ),
    ]
    wanted = "user: [blue]Look.[red]\nassistant: \ntool: so [red]\nuser: Well?\nassistant: "
    async with address() as found:
        options: dict[str, Any] = {"base_url": found, "api_key": KEY, "max_retries": 0}
        async with anthropic.AsyncAnthropic(**options, _strict_response_validation=True) as client:
            whole = await client.messages.create(model=MODEL, max_tokens=200, messages=messages)
            assert whole.content[0].text == wanted
            async with client.messages.stream(model=MODEL, max_tokens=200, messages=messages) as stream:
                assert await stream.get_final_text() == wanted
            counted = await client.messages.count_tokens(model=MODEL, messages=messages)
    pieces = len(pieces_of(BLUE)) + 2 * len(pieces_of(RED))
    text = wanted.replace("[blue]", "").replace("[red]", "")
    assert counted.input_tokens == len(text) + pieces
    assert whole.usage.input_tokens + whole.usage.cache_read_input_tokens == counted.input_tokens


async def test_tokenize_has_each_token_that_stands_for_a_piece() -> None:
    messages = from_user(text_part("a"), image_part(RED), text_part("b"))
    async with served(seeing()) as client:
        found = (await client.post("/tokenize", json={"messages": messages})).json()
        stand_ins = [ScriptedMediaReader().token_ids["image"]] * len(pieces_of(RED))
        assert len(stand_ins) > 1
        assert found["tokens"] == [*b"user: a", *stand_ins, *b"b\nassistant: "]
        usage = (await client.post(CHAT, json={"messages": messages})).json()["usage"]
        assert found["count"] == usage["prompt_tokens"]


async def test_an_image_may_be_larger_than_bodies_of_text_are() -> None:
    async with served(seeing()) as client:
        answer = await client.post(CHAT, json={"messages": from_user(image_part(LARGE), text_part("!"))})
        assert answer.json()["choices"][0]["message"]["content"] == "user: [large]!\nassistant: "
        text = url(LARGE)
        for at in (text.index(",") + (1 << 18), len(text) // 2):  # where one piece of the decoding ends; within one
            broken = {"type": "image_url", "image_url": f"{text[:at]}={text[at + 1 :]}"}
            refused = await client.post(CHAT, json={"messages": from_user(broken)})
            assert refused.status_code == 400 and error(refused)["param"] == "messages[0].content[0].image_url"
            assert "is not base64" in error(refused)["message"]


async def test_one_that_is_larger_than_the_setting_is_refused() -> None:
    async with served(seeing(), max_image_bytes=len(RED)) as client:
        assert (await client.post(CHAT, json={"messages": from_user(image_part(RED))})).status_code == 200
        refused = await client.post(CHAT, json={"messages": from_user(image_part(RED + b"!"))})
        assert refused.status_code == 400
        assert error(refused)["message"] == (
            "messages[0].content[0].image_url.url has 9 bytes; allowed: max_image_bytes = 8"
        )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES])
async def test_what_was_sent_is_let_go_while_it_is_answered(route: str, stream: bool) -> None:
    engine = scripted_engine("a" * 1000, step_seconds=0.01, takes_images=True)
    body: dict[str, Any] = {"messages": from_user(block(LARGE) if route == MESSAGES else image_part(LARGE))}
    if route == RESPONSES:
        body = {"input": from_user({"type": "input_image", "image_url": url(LARGE)})}
    if route == MESSAGES:
        body["max_tokens"] = 1000
    async with served(engine) as client:
        request = client.build_request("POST", route, json=body | {"stream": stream})
        tracemalloc.start()
        try:
            asking = asyncio.ensure_future(client.send(request))
            await until(lambda: engine.metrics().counters.generation_tokens > 1)
            kept, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        await engine.reset()
        await asking
    assert most > 18 << 20 and kept < 12 << 20  # the model keeps the file, not the base64


NO_FETCH = "images are not fetched here, so send the image itself as data:image/...;base64,..."
WRONG: list[tuple[Any, str]] = [
    ("https://example.com/a.png", f"has the scheme 'https'; {NO_FETCH}"),
    ("HTTP://example.com/a.png", f"has the scheme 'http'; {NO_FETCH}"),
    ("file:///etc/passwd", f"has the scheme 'file'; {NO_FETCH}"),
    ("/etc/passwd", f"is not a data: URL; {NO_FETCH}"),
    (None, "is missing; expected data:image/...;base64,..."),
    (7, "is missing; expected data:image/...;base64,..."),
    (url(RED, "audio/wav"), "is data of the type 'audio/wav'; expected data:image/...;base64,..."),
    (f"data:;base64,{encoded(RED)}", "is data of the type ''; expected data:image/...;base64,..."),
    ("data:image/png;base64", "is a data: URL that cannot be read; expected data:image/...;base64,..."),
    ("data:image/png,%89PNG", "is a data: URL without ;base64; expected data:image/...;base64,..."),
    ("data:image/png;base64,", "is an image of 0 bytes"),
    ("data:image/png;base64,iVBO*AAA", "is not base64: Only base64 data is allowed"),
    ("data:image/png;base64,iVB", "is not base64: Incorrect padding"),
    ("data:image/png;base64,iVBÖ", "is not base64: string argument should contain only ASCII characters"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=lambda value: str(value)[:30])
async def test_a_url_that_is_no_image_is_a_400_that_says_what_to_send(given: Any, message: str) -> None:
    asked = {
        CHAT: ({"messages": from_user({"type": "image_url", "image_url": {"url": given}})}, "image_url.url"),
        RESPONSES: ({"input": from_user({"type": "input_image", "image_url": given})}, "image_url"),
        MESSAGES: (
            {"messages": from_user({"type": "image", "source": {"type": "url", "url": given}}), "max_tokens": 1},
            "source.url",
        ),
    }
    async with served(seeing()) as client:
        for route, (body, path) in asked.items():
            where = "input" if route == RESPONSES else "messages"
            refused = await client.post(route, json=body)
            assert refused.status_code == 400, refused.text
            found = error(refused)
            assert found["param"] == f"{where}[0].content[0].{path}"
            assert found["message"] == f"{found['param']} {message}"


def in_chat(part: Any, role: str = "user") -> tuple[str, Any]:
    return CHAT, {"messages": [{"role": role, "content": [part], "tool_call_id": "c"}]}


def in_messages(part: Any, role: str = "user") -> tuple[str, Any]:
    return MESSAGES, {"messages": [{"role": role, "content": [part]}], "max_tokens": 1}


def in_responses(part: Any, role: str = "user") -> tuple[str, Any]:
    return RESPONSES, {"input": [{"role": role, "content": [part]}]}


def source(**fields: Any) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"} | fields}


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        (in_chat({"type": "file", "file": {"file_data": "AA=="}}), ".type", "'file'"),
        (in_chat({"type": "image", "image": url(RED)}), ".source", "is missing"),
        (in_chat(image_part(RED), "system"), ".type", "videos go into messages whose role is user or tool"),
        (
            in_chat(image_part(RED), "assistant"),
            ".type",
            "videos go into messages whose role is user or tool",
        ),
        (in_responses({"type": "input_image", "file_id": "file-1"}), ".file_id", "send the image itself as image_url"),
        (in_responses({"type": "input_file", "file_data": "AA=="}), ".type", "'input_file'"),
        (in_responses({"type": "input_image", "image_url": url(RED)}, "developer"), ".type", "user or tool"),
        (in_messages(source(media_type="audio/wav")), ".source.media_type", "'audio/wav'; expected that of an image"),
        (in_messages(source(media_type=None)), ".source.media_type", "None; expected that of an image"),
        (in_messages(source(data="A")), ".source.data", "is not base64"),
        (in_messages(source(data="")), ".source.data", "is an image of 0 bytes"),
        (in_messages(source(data=3)), ".source.data", "is 3; expected base64"),
        (in_messages(source(type="file")), ".source.type", "'file'; allowed: 'base64'"),
        (in_messages({"type": "image"}), ".source", "is missing; expected an object with type, media_type and data"),
        (in_messages(block(RED), "assistant"), ".type", "user or tool"),
        (in_messages({"type": "document", "source": {}}), ".type", "'document'"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_is_no_image_is_a_400_by_name(asked: tuple[str, Any], param: str, says: str) -> None:
    route, body = asked
    async with served(seeing()) as client:
        refused = await client.post(route, json=body)
        assert refused.status_code == 400, refused.text
        found = error(refused)
        where = "input" if route == RESPONSES else "messages"
        assert found["param"] == f"{where}[0].content[0]{param}" and says in found["message"], refused.text


@pytest.mark.parametrize(
    ("said", "fields", "message"),
    [
        ("images[1]: an image cannot be read: it is none", (".image_url.url", ".image_url", ".source.data"), None),
        ("the model's processor refuses it", (None, None, None), "the model's processor refuses it"),
        ("images[9]: it is not there", (None, None, None), "images[9]: it is not there"),
    ],
)
async def test_one_that_the_model_cannot_take_is_told_by_its_field(
    said: str, fields: tuple[str | None, ...], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> Any:
        raise InvalidRequestError(said)

    monkeypatch.setattr(ScriptedMediaReader, "read", refuse)
    item = {"type": "input_image", "image_url": url(RED)}
    in_chat, in_responses, in_messages = fields
    asked: list[tuple[str, Any, str | None]] = [
        (CHAT, {"messages": from_user(image_part(RED), image_part(RED))}, in_chat),
        ("/tokenize", {"messages": from_user(image_part(RED), image_part(RED))}, in_chat),
        (RESPONSES, {"input": from_user(item, item)}, in_responses),
        (MESSAGES, {"messages": from_user(block(RED), block(RED)), "max_tokens": 1}, in_messages),
        (f"{MESSAGES}/count_tokens", {"messages": from_user(block(RED), block(RED))}, in_messages),
    ]
    async with served(seeing()) as client:
        for route, body, field in asked:
            refused = await client.post(route, json=body)
            assert refused.status_code == 400, refused.text
            found, where = error(refused), "input" if route == RESPONSES else "messages"
            param = None if field is None else f"{where}[0].content[1]{field}"
            assert found["param"] == param
            assert found["message"] == (message or f"{param} cannot be taken: an image cannot be read: it is none")


async def test_a_model_that_takes_none_says_why() -> None:
    parts, item = (text_part("a"), image_part(RED)), {"type": "input_image", "image_url": url(RED)}
    bodies: list[tuple[str, dict[str, Any], str]] = [
        (CHAT, {"messages": from_user(*parts)}, "messages"),
        (RESPONSES, {"input": from_user(item)}, "input"),
        (MESSAGES, {"messages": from_user(block(RED)), "max_tokens": 1}, "messages"),
    ]
    bodies += [(route, {**body, "stream": True}, param) for route, body, param in bodies]
    bodies += [
        (f"{MESSAGES}/count_tokens", {"messages": from_user(block(RED))}, "messages"),
        ("/tokenize", {"messages": from_user(*parts)}, "messages"),
    ]
    async with served() as client:
        for route, body, param in bodies:
            refused = await client.post(route, json=body)
            assert refused.status_code == 400, refused.text
            assert error(refused) == {
                "message": "the prompt has images; the model takes none: its checkpoint has no encoder of images",
                "type": "invalid_request_error",
                "param": param,
                "code": "invalid_request",
            }


async def test_the_list_of_models_says_who_takes_them() -> None:
    for engine, wanted in ((seeing(), ["text", "image"]), (None, ["text"])):
        async with served(engine) as client:
            [model] = (await client.get("/v1/models")).json()["data"]
            assert model["architecture"] == {"input_modalities": wanted, "output_modalities": ["text"]}


async def test_what_they_show_is_in_no_log_and_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    body = {"messages": from_user(image_part(SECRET))}
    engine = seeing()
    engine.trace.start()
    async with served(engine) as client:
        assert (await client.post(CHAT, json=body)).status_code == 200
        await engine.debug_call_func_on_all_workers("fail_next", RuntimeError("boom"))
        answers = [await client.post(CHAT, json=body)]
        body["messages"][0]["content"][0]["image_url"]["url"] += "*"
        answers.append(await client.post(CHAT, json=body))
        assert [answer.status_code for answer in answers] == [500, 400]
        kept = caplog.text + engine.trace.to_json() + "".join(answer.text for answer in answers)
    assert "boom" in kept and "POST /v1/chat/completions 500" in kept
    for form in (SECRET.decode(), encoded(SECRET)):
        assert form[:12] not in kept
