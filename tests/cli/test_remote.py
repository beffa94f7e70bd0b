"""What a URL may look like, and why a server cannot be reached."""

from __future__ import annotations

import asyncio

import pytest

from asyncengine.cli.command import Failure
from asyncengine.cli.remote import connected, root


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://here", "http://here"),
        ("here:8000", "http://here:8000"),
        ("here:8000/v1/", "http://here:8000"),
        ("https://here/under/v1", "https://here/under"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_address_is_taken_with_and_without_v1(url: str, found: str) -> None:
    assert root(url) == found


@pytest.mark.parametrize(
    "url",
    ["", "notaurl", "localhost", "ftp://here", "http://", "http://here:80a", "http://here:99999", "http://[::1",
     "http://here there", "http://here?x=1", "a:b"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_what_is_expected(url: str) -> None:
    with pytest.raises(Failure, match="expected http://HOST:PORT, https://HOST or HOST:PORT") as wrong:
        root(url)
    assert repr(url) in str(wrong.value) and wrong.value.status == 2


async def test_a_key_that_no_header_can_carry_is_refused() -> None:
    with pytest.raises(Failure, match="--api-key is 'schl\u00fcssel'; expected printable ASCII"):
        async with connected("here:1", "schl\u00fcssel"):
            pass


async def test_a_server_without_tls_is_told_by_the_words_of_ssl() -> None:
    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"this is no TLS\n")
        writer.close()

    async with await asyncio.start_server(hear, "127.0.0.1", 0) as listening:
        base = f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        with pytest.raises(Failure, match=r"cannot be reached: .*(SSL|EOF)"):
            async with connected(base, None) as client:
                await client.get("/health")


@pytest.mark.parametrize("base", ["http://127.0.0.1:1", "http://localhost:1"])
async def test_why_a_server_cannot_be_reached_is_said_in_the_system_s_words(base: str) -> None:
    with pytest.raises(Failure) as wrong:
        async with connected(base, None) as client:
            await client.get("/health")
    assert str(wrong.value) == f"{base} cannot be reached: Connection refused"
