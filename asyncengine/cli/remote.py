"""A server somewhere, as the commands that take a URL see it."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from asyncengine.cli.command import Failure
from asyncengine.cli.serve import missing

if TYPE_CHECKING:
    import httpx

Url = Annotated[str, typer.Argument(metavar="URL", help="Of the server, with or without /v1.")]
ApiKey = Annotated[str | None, typer.Option(help="What the server asks for.")]


def root(url: str) -> str:
    """A server's address without the ``/v1`` that clients are often given; ``HOST:PORT`` is enough.

    Raises:
        Failure: It is no address.
    """
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s|[?#]", whole)
        port = parts.port
    except ValueError:  # the port is no number or too large, or a bracket is missing
        good, port = False, None
    if not good or (port is None and "://" not in url):  # a word alone is rather a mistake than a host
        raise Failure(f"the URL is {url!r}; expected http://HOST:PORT, https://HOST or HOST:PORT", 2)
    return whole.rstrip("/").removesuffix("/v1")


@asynccontextmanager
async def connected(url: str, api_key: str | None, seconds: float | None = 60.0) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server, as many connections as needed; of this machine's own, never through a proxy.

    Args:
        url: As `root` takes it.
        api_key: Sent as a bearer token.
        seconds: How long the server may be silent.

    Raises:
        Failure: It cannot be reached, or httpx is not installed.
    """
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise missing("cli", error) from error
    base = root(url)
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise Failure(f"--api-key is {api_key!r}; expected printable ASCII, which is what a header can carry", 2)
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=base, headers=headers, limits=limits, timeout=seconds, trust_env=not _local(base)
    ) as client:
        try:
            yield client
        except httpx.TransportError as error:
            raise Failure(f"{base} cannot be reached: {_reason(error)}") from error


def _reason(error: httpx.TransportError) -> str:
    """Why, in the system's words where they are there: what is raised says that all attempts have failed."""
    found, cause = str(error) or type(error).__name__, error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            found = cause.strerror
            if found.startswith("Connect call failed") and cause.errno is not None:  # asyncio's own words
                found = os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    return found


async def model_name(client: httpx.AsyncClient) -> str:
    """Name of the first model that the server has.

    Raises:
        Failure: It does not say.
    """
    response = await client.get("/v1/models")
    if response.status_code != 200:
        raise Failure(f"{_models(client)} answers {response.status_code}: {problem(response)}")
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise Failure(f"{_models(client)} names no model; wait until one is loaded, or pass --model") from error


def _models(client: httpx.AsyncClient) -> str:
    return f"{str(client.base_url).rstrip('/')}/v1/models"


def problem(response: httpx.Response) -> str:
    """What an answer says is wrong; its body must have been read."""
    try:
        said = response.json()["error"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, LookupError, TypeError):
        return response.text[:200].strip() or response.reason_phrase


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of a stream, up to ``[DONE]``.

    Raises:
        Failure: One of them is an error, or no JSON.
    """
    ended, failure = False, None
    async for line in response.aiter_lines():  # to the very end, so that the connection can be used again
        if ended or not line.startswith("data:"):
            continue
        text = line[5:].strip()
        if text == "[DONE]":
            ended = True
            continue
        try:
            event = _event(text)
        except Failure as error:
            ended, failure = True, error
        else:
            yield event
    if failure is not None:
        raise failure


def _event(text: str) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except ValueError as error:
        raise Failure(f"an event of the stream is no JSON: {text[:100]}") from error
    if not isinstance(event, dict):
        raise Failure(f"an event of the stream is no object: {text[:100]}")
    if event.get("error"):
        said = event["error"]
        raise Failure(str(said.get("message", said) if isinstance(said, dict) else said))
    return event


def _local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
