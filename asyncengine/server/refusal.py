"""`Refusal`: what a client is told when it does not get what it asked for. The one place where errors become HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from asyncengine.errors import (
    AsyncEngineError,
    ConfigError,
    DeadlineExceededError,
    EngineClosedError,
    EngineDrainingError,
    EngineFailedError,
    EngineOverloadedError,
    IllegalStateError,
    InvalidRequestError,
    ModelNotLoadedError,
    ReloadError,
    RequestDroppedError,
)

_STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (InvalidRequestError, 400),
    (ConfigError, 400),
    (RequestDroppedError, 400),
    (ReloadError, 422),
    (IllegalStateError, 409),
    (EngineOverloadedError, 429),
    (ModelNotLoadedError, 503),
    (EngineDrainingError, 503),
    (EngineFailedError, 503),
    (EngineClosedError, 503),
    (DeadlineExceededError, 408),
)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "request_too_large",
    503: "overloaded_error",
}


class Refusal(Exception):
    """A request is answered with an error, in OpenAI's shape.

    The same object serves Anthropic's clients: they look for ``type`` beside ``error``, which OpenAI's pass over.

    Attributes:
        status: Of the response, if it has not begun.
        message: For a human.
        param: The field that is wrong, where it is one.
        code: For a program.
        headers: Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """The kind of error, by status."""
        return _TYPES.get(self.status, "api_error")

    def payload(self) -> dict[str, Any]:
        """The error as a JSON object."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"type": "error", "error": error}

    def response(self) -> Response:
        """The error as a response."""
        return Response(msgspec.json.encode(self.payload()), self.status, self.headers, "application/json")


def refusal_of(error: Exception, names: Mapping[str, str] | None = None, retry_after: int = 1) -> Refusal:
    """What a client is told of an error of the engine.

    Args:
        error: What was raised.
        names: The engine's names of fields to those that the client uses.
        retry_after: Seconds after which a client should come back.
    """
    if isinstance(error, Refusal):
        return error
    if not isinstance(error, AsyncEngineError):
        return Refusal(500, "internal error; the server's log has more", "internal_error")
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    message, param, code = str(error), None, code_of(error)
    if isinstance(error, InvalidRequestError):
        message, param = _renamed(message, names or {})
        if param == "model":  # an adapter that was there when the request came
            status, code = 404, "model_not_found"
    retry = status in (429, 503) or error.retryable
    return Refusal(status, message, code, param, {"retry-after": str(retry_after)} if retry else None)


def code_of(error: Exception) -> str:
    """`EngineOverloadedError` is ``engine_overloaded``."""
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _renamed(message: str, names: Mapping[str, str]) -> tuple[str, str | None]:
    """A message of the engine in the client's words, and the field that it is about: its first word.

    "The prompt" is what the model reads, whichever field it is made of, and stays what it is called.
    """
    word = re.match(r"(the )?(\w+)\b(?!')", message)
    if word is None or word[2] not in names:
        return message, None
    name = names[word[2]]
    return message if word[1] else name + message[word.end() :], name
