"""`Gate`: what every request passes, as plain ASGI: its id, the key, the limits, the log, the last error handler."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import re
import time
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncengine.loop.engine import AsyncEngine
from asyncengine.server.exposition import Traffic
from asyncengine.server.naming import fresh_id
from asyncengine.server.refusal import Refusal, refusal_of
from asyncengine.server.sampling import NAMES
from asyncengine.server.settings import ServerSettings

logger = logging.getLogger("asyncengine.server")

OPEN = frozenset({"/health"})
"""Routes that need no key."""
UNCOUNTED = frozenset({"/health", "/ready", "/metrics", "/ui", "/v1/models", "/openapi.json"})
"""Routes that use no model, and answer when everything is busy."""

_LOGGED = ("method", "path", "status", "milliseconds", "request_id")
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Gate:
    """Wraps the routes."""

    def __init__(self, app: ASGIApp, engine: AsyncEngine, settings: ServerSettings, traffic: Traffic) -> None:
        self._app = app
        self._engine = engine
        self._settings = settings
        self._traffic = traffic
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else fresh_id()
        scope.setdefault("state", {})["request_id"] = request_id
        begun, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        path = _path(scope)
        counted = path not in UNCOUNTED
        self._traffic.active += counted
        self._traffic.lag.keep_on()
        try:
            self._check(path, counted, headers)
            observer = self._engine.observer
            if observer is None:
                await self._app(scope, receive, answer)
            else:
                with observer.within(headers):
                    await self._app(scope, receive, answer)
        except ClientDisconnect:  # in the middle of its body, say: nobody is left to be answered
            pass
        except Exception as error:
            response = self._refused(error, scope)
            if status:
                raise  # half a response is out: the server closes the connection, which is all it can say
            await response(scope, receive, answer)
        finally:
            self._traffic.active -= counted
            seconds = time.perf_counter() - begun
            self._traffic.requests.labels(scope["method"], _route(scope), str(status or 499)).inc()
            level = logging.INFO if counted else logging.DEBUG  # probes come every second
            if logger.isEnabledFor(level):
                # As it was sent: a path may hold line breaks and what a terminal obeys
                line = (scope["method"], quote(path), status or 499, round(seconds * 1000, 1), request_id)
                logger.log(level, "%s %s %d %.1f ms %s", *line, extra=dict(zip(_LOGGED, line, strict=True)))

    def _refused(self, error: Exception, scope: Scope) -> Response:
        """What to answer. Nothing that this request holds may keep the error, which holds the request."""
        names = {**NAMES, **scope["state"].get("names", {})}
        refusal = refusal_of(error, names, self._settings.retry_after_seconds)
        if refusal.status == 500:
            logger.exception("%s %s failed (%s)", scope["method"], quote(_path(scope)), scope["state"]["request_id"])
        if refusal.code == "max_concurrency":
            self._traffic.rejections.inc()
        return refusal.response()

    def _check(self, path: str, counted: bool, headers: Headers) -> None:
        size = sum(len(name) + len(value) for name, value in headers.raw)
        if size > self._settings.max_header_bytes:
            most = self._settings.max_header_bytes
            message = f"the headers have {size} bytes; allowed: max_header_bytes = {most}"
            raise Refusal(431, message, "headers_too_large")
        if self._key is not None and path not in OPEN and not self._knows_key(headers):
            challenge = 'Basic realm="asyncengine"' if path == "/ui" else "Bearer"
            raise Refusal(
                401, "the API key is missing or wrong", "invalid_api_key", None, {"www-authenticate": challenge}
            )
        most_active = self._settings.max_concurrency
        if counted and most_active is not None and self._traffic.active > most_active:
            message = f"the server has max_concurrency = {most_active} requests under way; try again later"
            retry = {"retry-after": str(self._settings.retry_after_seconds)}
            raise Refusal(429, message, "max_concurrency", None, retry)

    def _knows_key(self, headers: Headers) -> bool:
        """Compares every key that is given, each in constant time and whatever its length."""
        assert self._key is not None
        given = [headers.get("x-api-key", "").encode()]
        scheme, _, rest = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given.append(rest.strip().encode())
        elif scheme.lower() == "basic":
            try:
                given.append(base64.b64decode(rest.strip(), validate=True).partition(b":")[2])
            except (binascii.Error, ValueError):
                pass
        return any([hmac.compare_digest(_digest(key), self._key) for key in given])


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _path(scope: MutableMapping[str, Any]) -> str:
    """The path below wherever the application is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


def _route(scope: MutableMapping[str, Any]) -> str:
    """The route's pattern, so that metrics have as many labels as there are routes."""
    route = scope.get("route")
    return str(getattr(route, "path", "")) or "unknown"
