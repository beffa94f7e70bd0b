"""A web server on this machine whose answers are what a test says, byte by byte."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

Answer = bytes | None | Callable[[], Awaitable[bytes]]
"""What goes over the wire, and then the connection is closed; None keeps it open and says nothing."""


def http(body: bytes = b"", status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    """An answer with its length; another one than the body's may be said."""
    lines = [f"HTTP/1.1 {status}", *headers, f"content-length: {len(body) if length is None else length}", "", ""]
    return "\r\n".join(lines).encode() + body


def chunked(body: bytes, *headers: str) -> bytes:
    """An answer that does not say how long it is."""
    lines = ["HTTP/1.1 200 OK", *headers, "transfer-encoding: chunked", "", ""]
    return "\r\n".join(lines).encode() + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"


def redirect(to: str, status: str = "302 Found") -> bytes:
    return http(b"elsewhere", status, f"location: {to}")


class Host:
    """What it answers, and what it was asked.

    Attributes:
        answers: By path.
        asked: The paths, as they came.
        headers: Of the last request.
        open: How many connections there are.
        port: Where it listens.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.headers: dict[str, str] = {}
        self.open = 0
        self.port = 0

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://{self.name}{path}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                path = head[0].split(" ")[1]
                self.headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                self.asked.append(path)
                answer = self.answers[path]
                if callable(answer):
                    answer = await answer()
                if answer is not None:
                    writer.write(answer)
                    await writer.drain()
                    if answer.endswith(b"..."):  # and nothing more
                        answer = None
                if answer is None:
                    await reader.read()
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def host(tls: ssl.SSLContext | None = None, **answers: Answer) -> AsyncIterator[Host]:
    """One that answers at ``/name``."""
    made = Host()
    made.answers |= {f"/{name}": answer for name, answer in answers.items()}
    server = await asyncio.start_server(made.answer, "127.0.0.1", 0, ssl=tls)
    made.port = server.sockets[0].getsockname()[1]
    async with server:
        yield made
