"""Images and audio that requests name by URL: who is asked for them, who never is, and how it ends."""

from __future__ import annotations

import asyncio
import functools
import gzip
import itertools
import json
import logging
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from asyncengine import AsyncEngine, ConfigError, EngineConfig, InvalidRequestError
from asyncengine.server import ServerSettings, create_app
from asyncengine.server.fetch import MOST_FILES
from asyncengine.testing import ByteTokenizer, ScriptedLoader, ScriptedMediaReader, pieces_of, scripted_engine
from tests.loop.test_classification import TWO
from tests.server.hosts import Host, chunked, host, http, redirect
from tests.server.serving import KEY, MODEL, Later, error, listening, served, until
from tests.server.test_disconnect import request
from tests.server.test_images import BLUE, CHAT, MESSAGES, RED, RESPONSES, SECRET, from_user, seeing, text_part, url

openai = Later("openai")
anthropic = Later("anthropic")

pytestmark = pytest.mark.loops("either")

FIELD = "messages[0].content[0].image_url.url"


create_ssl_context = httpx.create_ssl_context


@functools.cache
def _trusting(certificates: str | None) -> ssl.SSLContext:
    return create_ssl_context()


@pytest.fixture(autouse=True)
def certificates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take each server some 30 ms."""
    monkeypatch.setattr(httpx, "create_ssl_context", lambda: _trusting(os.environ.get("SSL_CERT_FILE")))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def part(where: str, kind: str = "image") -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": where}}


def asking(*urls: str, **fields: Any) -> dict[str, Any]:
    return {"messages": from_user(*map(part, urls)), **fields}


def allowing(*hosts: Host, engine: AsyncEngine | None = None, **settings: Any) -> Any:
    """A client of a server that asks some hosts."""
    return served(engine or seeing(), allowed_media_domains=[each.name for each in hosts], **settings)


async def refused(client: httpx.AsyncClient, body: dict[str, Any], status: int = 400, route: str = CHAT) -> str:
    """What is said of a request, whose first image is to blame."""
    response = await client.post(route, json=body)
    assert response.status_code == status, response.text
    found = error(response)
    if status == 400:
        assert found["param"] == FIELD and found["message"].startswith(f"{FIELD} "), found
    return str(found["message"])


async def test_openai_s_client_has_them_fetched() -> None:
    async with host(red=http(RED), blue=chunked(BLUE)) as images, seeing() as engine:
        app = create_app(engine, api_key=KEY, allowed_media_domains=[images.name])
        async with listening(app) as address:
            options: dict[str, Any] = {"base_url": f"{address}/v1", "api_key": KEY, "max_retries": 0}
            async with openai.AsyncOpenAI(**options, _strict_response_validation=True) as client:
                messages = from_user(
                    part(images.url("/red")), text_part(" and "), part(url(RED)), part(images.url("/blue"))
                )
                wanted = "user: [red] and [red][blue]\nassistant: "
                whole = await client.chat.completions.create(model=MODEL, messages=messages)
                assert whole.choices[0].message.content == wanted
                stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
                assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == wanted
                item = {"type": "input_image", "image_url": images.url("/red"), "detail": "auto"}
                items = [{"role": "user", "content": [item]}]
                answer = await client.responses.create(model=MODEL, input=items)
                assert answer.output_text == "user: [red]\nassistant: "
        assert sorted(images.asked) == ["/blue", "/blue", "/red", "/red", "/red"]
        await until(lambda: not images.open)


async def test_anthropic_s_client_has_them_fetched() -> None:
    async with host(red=http(RED)) as images, seeing() as engine:
        app = create_app(engine, api_key=KEY, allowed_media_domains=[images.name])
        async with listening(app) as address:
            options: dict[str, Any] = {"base_url": address, "api_key": KEY, "max_retries": 0}
            async with anthropic.AsyncAnthropic(**options, _strict_response_validation=True) as client:
                block = {"type": "image", "source": {"type": "url", "url": images.url("/red")}}
                messages = from_user(block, text_part("!"))
                whole = await client.messages.create(model=MODEL, max_tokens=200, messages=messages)
                assert whole.content[0].text == "user: [red]!\nassistant: "
                counted = await client.messages.count_tokens(model=MODEL, messages=messages)
                assert counted.input_tokens == len("user: !\nassistant: ") + len(pieces_of(RED))


async def test_audio_is_fetched_and_tokens_of_both_are_counted() -> None:
    engine = scripted_engine("heard", takes_audio=True, takes_images=True)
    async with host(sound=http(b"RIFF"), red=http(RED)) as media, allowing(media, engine=engine) as client:
        messages = from_user(part(media.url("/sound"), "audio"), part(media.url("/red")))
        answer = (await client.post(CHAT, json={"messages": messages})).json()
        details = answer["usage"]["prompt_tokens_details"]
        assert details["audio_tokens"] == len(pieces_of(b"RIFF", "audio"))
        tokens = (await client.post("/tokenize", json={"messages": messages})).json()
        assert tokens["count"] == answer["usage"]["prompt_tokens"]
        assert media.headers == {
            "host": media.name,
            "accept": "*/*",
            "accept-encoding": "identity",
            "connection": "keep-alive",
            "user-agent": media.headers["user-agent"],
        }
        assert media.headers["user-agent"].startswith("asyncengine/")


async def test_several_are_fetched_at_once_and_one_that_is_named_twice_once() -> None:
    together = asyncio.Barrier(3)

    async def meet(data: bytes) -> bytes:
        async with asyncio.timeout(10):
            await together.wait()
        return http(data)

    answers = {name: functools.partial(meet, data) for name, data in (("a", RED), ("b", BLUE), ("c", SECRET))}
    async with host(**answers) as images, allowing(images) as client:
        paths = ["/a", "/b", "/a", "/c"]
        answer = await client.post(CHAT, json=asking(*map(images.url, paths)))
        told = answer.json()["choices"][0]["message"]["content"]
        assert told == "user: [red][blue][red][secret]\nassistant: "
        assert sorted(images.asked) == ["/a", "/b", "/c"]


# Who is asked


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ("http://localhost:{port}/red", "leads to the host 'localhost:{port}', which is none of those that are asked"),
        ("http://127.0.0.1/red", "leads to the host '127.0.0.1', which"),
        ("http://127.0.0.1:1/red", "leads to the host '127.0.0.1:1', which"),
        ("http://127.1:{port}/red", "leads to the host '127.1:{port}', which"),
        ("http://2130706433:{port}/red", "leads to the host '2130706433:{port}', which"),
        ("http://127.0.0.1.:{port}/red", "leads to the host '127.0.0.1.:{port}', which"),
        ("http://[::ffff:127.0.0.1]:{port}/red", "leads to the host '::ffff:127.0.0.1:{port}', which"),
        ("http://127.0.0.1:{port}@localhost/red", "has a user's name in its URL"),
        ("http://localhost@127.0.0.1:{port}/red", "has a user's name in its URL"),
        ("http://localhost\\@127.0.0.1:{port}/red", "has a user's name in its URL"),
        ("http://127.0.0.1:{port}\\@localhost/red", "has a user's name in its URL"),
        ("http:///red", "leads to the host '', which"),
        ("http:red", "leads to the host '', which"),
        ("http://127.0.0.1:{port}x/red", "is no URL that could be fetched"),
        ("http://127.0.0.1:{port}/\nred", "is no URL that could be fetched"),
        ("http://[127.0.0.1]:{port}/red", "is no URL that could be fetched"),
        ("ftp://127.0.0.1:{port}/red", "has the scheme 'ftp'; images are not fetched from there"),
        ("file:///etc/passwd", "has the scheme 'file'; images are not fetched from there"),
        ("//127.0.0.1:{port}/red", "is not a data: URL; images are not fetched from there"),
    ],
)
async def test_nobody_else_is_asked(there: str, says: str) -> None:
    async with host(red=http(RED)) as images, allowing(images) as client:
        message = await refused(client, asking(there.format(port=images.port)))
        assert message.startswith(f"{FIELD} {says.format(port=images.port)}")
        assert not images.asked


async def test_one_host_that_may_not_be_asked_keeps_the_others_from_being_asked() -> None:
    async with host(red=http(RED)) as images, allowing(images) as client:
        response = await client.post(CHAT, json=asking(images.url("/red"), "https://example.com/a.png"))
        assert error(response)["param"] == "messages[0].content[1].image_url.url"
        assert not images.asked


async def test_nobody_is_asked_unless_the_server_was_told_so() -> None:
    async with host(red=http(RED)) as images, served(seeing()) as client:
        assert "has the scheme 'http'; images are not fetched here" in await refused(client, asking(images.url("/red")))
        assert not images.asked


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_redirects_are_followed_where_they_lead_to_a_host_that_may_be_asked(status: str) -> None:
    async with host(red=http(RED)) as images, host() as first:
        first.answers = {"/a": redirect("/b?c", status), "/b?c": redirect(images.url("/red"), status)}
        async with allowing(first, images) as client:
            answer = await client.post(CHAT, json=asking(first.url("/a")))
            assert "[red]" in answer.json()["choices"][0]["message"]["content"]
            assert first.asked == ["/a", "/b?c"] and images.asked == ["/red"]


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("http://127.0.0.1:{other}/red", "leads to the host '127.0.0.1:{other}', which is none of those"),
        ("//localhost:{other}/red", "leads to the host 'localhost:{other}', which is none of those"),
        ("http://a@127.0.0.1:{port}/red", "has a user's name in its URL"),
        ("file:///etc/passwd", "leads to the scheme 'file'; allowed: 'https', 'http'"),
        ("http://[/", "leads to the host '%5b', which is none of those"),
        ("http://127.0.0.1:{port}x/", "cannot be fetched: its host does not answer as it should"),
        ("/a", "cannot be fetched: there are more than 5 redirects"),
    ],
)
async def test_redirects_to_elsewhere_are_not_followed(to: str, says: str) -> None:
    async with host(red=http(RED)) as other, host(red=http(RED)) as images, allowing(images) as client:
        ports = {"port": images.port, "other": other.port}
        images.answers["/a"] = redirect(to.format(**ports))
        assert (await refused(client, asking(images.url("/a")))).startswith(f"{FIELD} {says.format(**ports)}")
        assert not other.asked and set(images.asked) == {"/a"} and len(images.asked) <= 6
        await until(lambda: not images.open)


async def test_no_cookies_are_kept_and_no_names_are_sent() -> None:
    async with host(b=http(RED)) as images, allowing(images) as client:
        images.answers["/a"] = http(b"", "302 Found", "location: /b", "set-cookie: a=b; path=/")
        for _ in range(2):
            assert (await client.post(CHAT, json=asking(images.url("/a")))).status_code == 200
            assert images.asked[-1] == "/b"
            assert not {"cookie", "authorization", "referer"} & set(images.headers)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by openssl")
async def test_who_has_no_certificate_that_is_trusted_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    line = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    made = [*line.split(), "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(functools.partial(subprocess.run, made, check=True, capture_output=True))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    async with host(tls, red=http(RED)) as images:
        async with allowing(images) as client:
            message = await refused(client, asking(images.url("/red", "https")))
            assert message == f"{FIELD} cannot be fetched: its host cannot be reached"
            assert not images.asked
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with allowing(images) as client:
            assert (await client.post(CHAT, json=asking(images.url("/red", "https")))).status_code == 200
            assert images.asked == ["/red"]


# What is wrong with what is there


BROKEN: dict[str, tuple[Any, str]] = {
    "missing": (http(b"no", "404 Not Found"), "cannot be fetched: its host answers 404"),
    "failing": (http(b"no", "500 Oh"), "cannot be fetched: its host answers 500"),
    "unchanged": (http(b"", "304 Not Modified"), "cannot be fetched: its host answers 304"),
    "nowhere": (http(b"", "302 Found"), "cannot be fetched: its host answers 302"),
    "partial": (http(RED, "206 Partial"), "cannot be fetched: its host answers 206"),
    "empty": (http(b""), "is an image of 0 bytes"),
    "no http": (b"220 mail.example ESMTP\r\n", "cannot be fetched: its host does not answer as it should"),
    "cut": (http(RED, length=20), "cannot be fetched: its host does not answer as it should"),
    "compressed": (
        http(gzip.compress(RED), "200 OK", "content-encoding: gzip"),
        "cannot be fetched: its host compresses what is not to be",
    ),
    "announced": (http(b"", length=10**18), "has more than 20 bytes; allowed: max_image_bytes = 20"),
    "too large": (http(bytes(21)), "has more than 20 bytes; allowed: max_image_bytes = 20"),
    "unannounced": (chunked(bytes(21)) + b"...", "has more than 20 bytes; allowed: max_image_bytes = 20"),
    "slow": (None, "did not come within media_seconds = 0.05"),
    "stalled": (b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n\x89P...", "did not come within media_seconds = 0.05"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_what_cannot_be_had_is_a_400_that_names_it(name: str) -> None:
    answer, says = BROKEN[name]
    seconds = 0.05 if answer is None or name == "stalled" else 60
    async with host(file=answer, good=http(RED)) as images:
        async with allowing(images, max_image_bytes=20, media_seconds=seconds) as client:
            body = asking(images.url("/file"), images.url("/good"))
            assert await refused(client, body) == f"{FIELD} {says}"
            await until(lambda: not images.open)
            assert (await client.post(CHAT, json=asking(images.url("/good")))).status_code == 200


async def test_a_host_that_does_not_listen() -> None:
    async with host() as images:
        pass
    async with allowing(images) as client:
        message = await refused(client, asking(images.url("/red")))
        assert message == f"{FIELD} cannot be fetched: its host cannot be reached"


async def test_together_they_have_a_size_as_bodies_have() -> None:
    async with host(a=http(bytes(400)), b=chunked(bytes(401))) as images:
        engine = scripted_engine("seen", takes_images=True)
        async with allowing(images, engine=engine, max_body_bytes=800) as client:
            response = await client.post(CHAT, json=asking(images.url("/a"), images.url("/b")))
            assert response.status_code == 400
            assert error(response)["message"].endswith(
                "and the other files to be fetched have more than max_body_bytes = 800 bytes"
            )
            assert (await client.post(CHAT, json=asking(images.url("/a")))).status_code == 200


async def test_there_may_not_be_too_many() -> None:
    async with host() as images, allowing(images) as client:
        images.answers = {f"/{number}": http(RED) for number in range(MOST_FILES + 1)}
        response = await client.post(CHAT, json=asking(*map(images.url, images.answers)))
        assert "is one of 129 files to be fetched; allowed: at most 128 in a request" in error(response)["message"]
        assert not images.asked


async def test_what_is_no_image_is_said_with_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    from asyncengine.model.media.pictures import picture_of

    read = ScriptedMediaReader.read

    def looking(reader: Any, sources: Any, *others: Any) -> Any:
        for index, source in enumerate(sources["image"]):
            try:
                picture_of(source)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"images[{index}]: {error}") from error
        return read(reader, sources, *others)

    monkeypatch.setattr(ScriptedMediaReader, "read", looking)
    page = http(b"<html>Please log in</html>", "200 OK", "content-type: image/png")
    async with host(page=page) as images, allowing(images) as client:
        message = await refused(client, asking(images.url("/page")))
        assert message.startswith(f"{FIELD} cannot be taken: an image is damaged or none of PNG, JPEG")


# When nobody is asked, and when it ends


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"unknown": 1},
        {"model": "another"},
        {"logit_bias": {"5000": 1}},
        {"stop_token_ids": [5000]},
        {"max_tokens": -1},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "text"}}}},
        {"chat_template_kwargs": {"tokenize": False}},
        {"continue_final_message": True},
        {"tool_choice": "required"},
    ],
    ids=str,
)
async def test_nobody_is_asked_for_a_request_that_is_wrong(wrong: dict[str, Any]) -> None:
    async with host(red=http(RED)) as images, allowing(images) as client:
        good = asking(images.url("/red"))
        assert (await client.post(CHAT, json=good | wrong)).status_code in (400, 404)
        assert not images.asked
        assert (await client.post(CHAT, json=good)).status_code == 200


async def test_nobody_is_asked_beside_an_image_that_is_not_base64() -> None:
    async with host(red=http(RED)) as images, allowing(images) as client:
        response = await client.post(CHAT, json=asking(images.url("/red"), url(BLUE)[:-1] + "*"))
        assert error(response)["param"] == "messages[0].content[1].image_url.url"
        assert not images.asked


async def test_nobody_is_asked_for_a_model_that_takes_none() -> None:
    block = {"type": "image", "source": {"type": "url"}}
    async with host(red=http(RED)) as images, allowing(images, engine=scripted_engine("blind")) as client:
        where = images.url("/red")
        block["source"] = {"type": "url", "url": where}
        bodies: dict[str, Any] = {
            CHAT: asking(where),
            "/tokenize": asking(where),
            "/classify": asking(where),
            RESPONSES: {"input": from_user({"type": "input_image", "image_url": where})},
            MESSAGES: {"messages": from_user(block), "max_tokens": 1},
            f"{MESSAGES}/count_tokens": {"messages": from_user(block)},
        }
        for route, body in bodies.items():
            response = await client.post(route, json=body)
            assert response.status_code == 400, response.text
            assert "the model takes none: its checkpoint has no encoder of images" in error(response)["message"]
        assert not images.asked


async def test_a_deadline_of_the_request_ends_it() -> None:
    async with host(slow=None) as images, allowing(images, media_seconds=60) as client:
        message = await refused(client, asking(images.url("/slow"), deadlines={"queue": 9, "total": 0.5}), 408)
        assert "the total deadline of 0.5 s passed" in message
        assert images.asked == ["/slow"]
        await until(lambda: not images.open)


async def test_a_deadline_counts_from_before_they_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    begun: list[float] = []
    chat = AsyncEngine.chat

    async def note() -> bytes:
        asked.append(time.perf_counter())
        return http(RED)

    def noted(engine: Any, messages: Any, config: Any, options: Any, **arguments: Any) -> Any:
        begun.append(options.deadlines.since)
        return chat(engine, messages, config, options, **arguments)

    monkeypatch.setattr(AsyncEngine, "chat", noted)
    async with host(red=note) as images, allowing(images) as client:
        sent = time.perf_counter()
        response = await client.post(CHAT, json=asking(images.url("/red"), deadlines={"total": 60}))
        assert response.status_code == 200
        assert sent <= begun[0] <= asked[0]


@asynccontextmanager
async def left_alone(images: Host, route: str, body: dict[str, Any]) -> AsyncIterator[Callable[[], Any]]:
    """A client that asks and does nothing more; what it gives closes its connection."""
    loader = ScriptedLoader(tokenizer=ByteTokenizer(), takes_images=True)
    loader.classifier = TWO if route == "/classify" else None
    async with AsyncEngine(EngineConfig(MODEL), loader=loader) as engine:
        app = create_app(engine, allowed_media_domains=[images.name], media_seconds=60)
        async with listening(app) as address:
            _, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
            writer.write(request(route, body))
            yield writer.close
            traffic = app.state.service.traffic
            await until(lambda: not traffic.active)
        now = engine.metrics()
        assert now.num_requests_running == now.num_requests_waiting == now.num_requests_queued == 0
        assert sum(now.counters.requests.values()) == 0


ROUTES = [*itertools.product((CHAT, RESPONSES), (False, True)), ("/classify", None), ("/tokenize", None)]


@pytest.mark.parametrize(("route", "stream"), [*ROUTES, (f"{MESSAGES}/count_tokens", None)])
async def test_a_client_that_leaves_ends_it(route: str, stream: bool | None) -> None:
    async with host(slow=None, stalled=b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n...") as images:
        urls = [images.url("/slow"), images.url("/stalled")]
        body: dict[str, Any] = asking(*urls)
        if route == RESPONSES:
            body = {"input": from_user(*({"type": "input_image", "image_url": each} for each in urls))}
        elif route.startswith(MESSAGES):
            sources = [{"type": "url", "url": each} for each in urls]
            body = {"messages": from_user(*({"type": "image", "source": source} for source in sources))}
        if stream is not None:
            body["stream"] = stream
        before = asyncio.all_tasks()
        async with left_alone(images, route, body) as leave:
            await until(lambda: len(images.asked) == 2)
            leave()
            await until(lambda: not images.open)
        await until(lambda: asyncio.all_tasks() <= before)


async def test_where_they_are_is_in_no_log_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "asyncengine")
    async with host() as images, allowing(images) as client:
        images.answers = {"/a?secret": http(b"", "404 No"), "/b?secret": b"?"}
        for path in images.answers:
            assert "secret" not in await refused(client, asking(images.url(path)))
        assert "secret" not in await refused(client, asking("http://example.com/?secret"))
    assert "ended" not in caplog.text and "secret" not in caplog.text
    assert f"{FIELD} could not be fetched: RemoteProtocolError" in caplog.text


# Settings


@pytest.mark.parametrize(
    "given",
    [
        "example.com", ["*"], ["*.example.com"], ["https://example.com"], ["example.com/a"], ["a b"], [""], [7],
        ["example.com:0"], ["example.com:65536"], ["example.com:"], ["münchen.example"], ["a@b"], [".a"], ["a..b"],
        ["::1"],
    ],
)  # fmt: skip
def test_what_is_no_host(given: Any) -> None:
    with pytest.raises(ConfigError, match="allowed_media_domains"):
        ServerSettings(allowed_media_domains=given)


@pytest.mark.parametrize("given", [0, -1, True, "5", None, float("nan")])
def test_what_is_no_time(given: Any) -> None:
    with pytest.raises(ConfigError, match="media_seconds is"):
        ServerSettings(media_seconds=given)


@pytest.mark.parametrize(
    ("domain", "where", "allowed"),
    [
        ("Example.com", "https://EXAMPLE.com/a", True),
        ("example.com", "http://example.com:80/a", True),
        ("example.com", "https://example.com:443/a", True),
        ("example.com", "https://example.com:8443/a", False),
        ("example.com", "https://example.com:80/a", False),
        ("example.com", "https://a.example.com/a", False),
        ("example.com", "https://aexample.com/a", False),
        ("example.com", "https://example.com.evil.org/a", False),
        ("example.com:8443", "https://example.com:8443/a", True),
        ("example.com:8443", "https://example.com/a", False),
        ("example.com:443", "https://example.com/a", True),
        ("example.com:443", "http://example.com/a", False),
        ("xn--mnchen-3ya.example", "https://münchen.example/", True),
        ("[::1]:8000", "http://[::1]:8000/a", True),
        ("[::1]", "http://[::1]:8000/a", False),
        ("minio_1", "http://minio_1/a", True),
    ],
)
async def test_a_host_is_one_name_at_one_port(
    domain: str, where: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[httpx.URL] = []

    async def answer(transport: Any, sent: httpx.Request) -> httpx.Response:
        asked.append(sent.url)
        return httpx.Response(200, stream=httpx.ByteStream(RED))

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", answer)
    async with served(seeing(), allowed_media_domains=[domain]) as client:
        response = await client.post(CHAT, json=asking(where))
        assert (response.status_code == 200) == allowed == bool(asked), response.text
        if not allowed:
            assert "which is none of those that are asked for images" in json.dumps(response.json())
