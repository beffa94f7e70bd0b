"""Images, audio and videos that a request names by URL, fetched from the hosts that the server was told it may ask.

A host that was named is trusted, whatever address it has: it may well stand in the network of those who run the server.
So what must not happen is that any other one is asked, and the URL that is compared is the one that is requested, at
every redirect. All hosts cannot be named: then addresses would have to be told apart when connections are made, by code
that neither httpx nor a proxy knows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy

import anyio
import httpx

from asyncengine._version import __version__
from asyncengine.media import NOUNS
from asyncengine.server.media_data import RemoteFile, refusal
from asyncengine.server.settings import MediaDomain, ServerSettings

logger = logging.getLogger("asyncengine.server")

MOST_FILES = 128
"""That one request may have fetched."""
_MOST_REDIRECTS = 5
_AT_ONCE = 8
"""Connections of one request."""
_HEADERS = {"user-agent": f"asyncengine/{__version__}", "accept-encoding": "identity"}
_PORTS = {"http": 80, "https": 443}


def check_url(url: str, field: str, domains: Sequence[MediaDomain]) -> None:
    """Whether there is a host in it that may be asked.

    Args:
        url: Of an image, audio or video.
        field: Where it stands in the body.
        domains: Who may be asked.

    Raises:
        Refusal: There is not, or it is no URL.
    """
    try:
        _check(httpx.URL(url), field, domains)
    except (httpx.InvalidURL, ValueError) as error:  # what it says may have the URL in it
        raise refusal(field, "is no URL that could be fetched") from error


class Fetcher:
    """Fetches what requests name. Has no connections of its own: those of a request end with it.

    Args:
        settings: Who may be asked, and how large and how slow files may be.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._domains = settings.media.domains
        self._seconds = settings.media_seconds
        self._most_bytes = settings.max_body_bytes
        self._tls = httpx.create_ssl_context()  # takes some 30 ms, so it is one for all

    async def fetch(self, files: Sequence[RemoteFile]) -> list[bytes]:
        """The files, several at a time; one that is named twice is fetched once.

        Raises:
            Refusal: One of them cannot be had, is too large or too slow; or there are too many.

        Cancelling it closes all connections.
        """
        wanted = {(file.url, file.kind): file for file in reversed(files)}
        if len(wanted) > MOST_FILES:
            message = f"is one of {len(wanted)} files to be fetched; allowed: at most {MOST_FILES} in a request"
            raise refusal(files[-1].field, message)
        client = httpx.AsyncClient(
            verify=self._tls,
            headers=_HEADERS,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # none are kept, and none sent
            limits=httpx.Limits(max_connections=_AT_ONCE),
            timeout=None,
        )
        fetching = _Fetching(client, self._domains, self._most_bytes)
        async with client:
            with anyio.move_on_after(self._seconds):
                await fetching.all(list(wanted.values()))
        for file in files:
            if (file.url, file.kind) not in fetching.found:
                raise refusal(file.field, f"did not come within media_seconds = {self._seconds:g}", "not_fetched")
        return [fetching.found[file.url, file.kind] for file in files]


class _Fetching:
    """What one request has fetched."""

    def __init__(self, client: httpx.AsyncClient, domains: Sequence[MediaDomain], most_bytes: int) -> None:
        self._client = client
        self._domains = domains
        self._most_bytes = self._left = most_bytes
        self.found: dict[tuple[str, str], bytes] = {}

    async def all(self, files: Sequence[RemoteFile]) -> None:
        """Fetches them; the first that cannot be had ends it."""
        failures: list[Exception] = []
        async with anyio.create_task_group() as tasks:

            async def one(file: RemoteFile) -> None:
                try:
                    self.found[file.url, file.kind] = await self._one(file)
                except Exception as error:
                    failures.append(error)
                    tasks.cancel_scope.cancel()

            for file in files:
                tasks.start_soon(one, file)
        if failures:
            raise failures[0]

    async def _one(self, file: RemoteFile) -> bytes:
        try:
            url = httpx.URL(file.url)
            for _ in range(_MOST_REDIRECTS + 1):
                _check(url, file.field, self._domains)
                async with self._client.stream("GET", url) as response:
                    if response.next_request is None:
                        return await self._body(response, file)
                    url = response.next_request.url
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            # Other errors' words may have in them what its host has sent, or the URL.
            words = f": {error}" if isinstance(error, httpx.ConnectError) else ""
            logger.info("%s could not be fetched: %s%s", file.field, type(error).__name__, words)
            raise refusal(file.field, f"cannot be fetched: {_words(error)}", "not_fetched") from error
        raise refusal(file.field, f"cannot be fetched: there are more than {_MOST_REDIRECTS} redirects", "not_fetched")

    async def _body(self, response: httpx.Response, file: RemoteFile) -> bytes:
        if response.status_code != 200:
            message = f"cannot be fetched: its host answers {response.status_code}"
            raise refusal(file.field, message, "not_fetched")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            # A few bytes of it may come to many.
            raise refusal(file.field, "cannot be fetched: its host compresses what is not to be", "not_fetched")
        announced = response.headers.get("content-length", "")
        if announced.isascii() and announced.isdigit():
            self._check_size(int(announced[:20]), file)
        pieces, size = [], 0
        async for piece in response.aiter_raw():
            size += len(piece)
            self._left -= len(piece)
            self._check_size(size, file)
            if self._left < 0:
                message = f"and the other files to be fetched have more than max_body_bytes = {self._most_bytes} bytes"
                raise refusal(file.field, message)
            pieces.append(piece)
        if not size:
            raise refusal(file.field, f"is {NOUNS[file.kind]} of 0 bytes")
        return b"".join(pieces)

    def _check_size(self, size: int, file: RemoteFile) -> None:
        if size > file.most:
            message = f"has more than {file.most} bytes; allowed: max_{file.kind}_bytes = {file.most}"
            raise refusal(file.field, message)


def _check(url: httpx.URL, field: str, domains: Sequence[MediaDomain]) -> None:
    """Raises Refusal if a host may not be asked."""
    if url.scheme not in _PORTS:
        raise refusal(field, f"leads to the scheme {url.scheme!r:.40}; allowed: 'https', 'http'", "unsupported_field")
    if url.userinfo:  # what is before an @ is often meant to be taken for the host
        raise refusal(field, "has a user's name in its URL, which is not sent", "unsupported_field")
    host, port = url.raw_host.decode("ascii").lower(), url.port or _PORTS[url.scheme]
    if not any(domain.allows(host, port, url.port is None) for domain in domains):
        shown = host if url.port is None else f"{host}:{port}"
        message = (
            f"leads to the host {shown!r:.200}, which is none of those that are asked for images, audio and videos"
        )
        raise refusal(field, message, "unsupported_field")


def _words(error: Exception) -> str:
    if isinstance(error, httpx.ConnectError):
        return "its host cannot be reached"
    return "its host does not answer as it should"
