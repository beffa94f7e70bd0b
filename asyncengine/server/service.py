"""`Service`: what the routes share. One per application."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from asyncengine.errors import ModelNotLoadedError
from asyncengine.generation import GenerationConfig
from asyncengine.loop.deadline import in_time
from asyncengine.loop.embedding import Reading
from asyncengine.loop.engine import AsyncEngine
from asyncengine.loop.health import Health
from asyncengine.loop.prepare import RequestOptions
from asyncengine.server.call_layout import CallLayout, call_layout
from asyncengine.server.exposition import Traffic
from asyncengine.server.media_data import decoded, remote_files, with_fetched
from asyncengine.server.naming import Served, model_name
from asyncengine.server.refusal import Refusal, refusal_of
from asyncengine.server.sampling import NAMES
from asyncengine.server.settings import ServerSettings
from asyncengine.server.wire import Body, encode, read_json
from asyncengine.state import EngineState
from asyncengine.tokenizer import ParsingTokenizer, Tokenizer

if TYPE_CHECKING:
    from asyncengine.server.fetch import Fetcher

logger = logging.getLogger("asyncengine.server")

T = TypeVar("T")


class Service:
    """An engine, and how it is served.

    Attributes:
        engine: The engine.
        settings: How.
        traffic: What is counted.
        created: When, in seconds since 1970.
        problem: Why there is no model, where one is on its way or loading it has failed.
        stage: What clients are told of where the engine is, in place of what it says itself, so that they wait; None
            tells that.
    """

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.traffic = Traffic(engine, settings)
        self.created = int(time.time())
        self.problem: str | None = None
        self.stage: EngineState | None = None
        self._fetcher: Fetcher | None = None
        if settings.allowed_media_domains:
            from asyncengine.server.fetch import Fetcher  # and httpx with it, which nobody else needs

            self._fetcher = Fetcher(settings)
        self._layouts: WeakKeyDictionary[ParsingTokenizer, CallLayout | None] = WeakKeyDictionary()

    @property
    def name(self) -> str | None:
        """What the model is called; None without one."""
        return model_name(self.engine, self.settings)

    @property
    def adapters(self) -> tuple[str, ...]:
        """What the model can be asked for as well; the model itself goes before an adapter of its name."""
        return tuple(adapter for adapter in self.engine.adapters if adapter != self.name)

    async def read(self, request: Request, body: Body[T]) -> tuple[T, dict[str, str]]:
        """The checked body of a request, and headers of the response.

        Raises:
            Refusal: The body is wrong.
        """
        return body.read(await read_json(request, self.settings))

    def check_serving(self, model: str | None) -> Served:
        """Returns who answers: the model, or one of its adapters.

        Raises:
            Refusal: There is no model just now (503), or something else was asked for (404).
        """
        health = self.engine.health()
        if self.stage is not None or not health.admits:
            self.unavailable(health)
        return Served(self.name or "") if model is None else self.named(model)

    def named(self, model: str) -> Served:
        """Who has a name.

        Raises:
            Refusal: Nobody (404).
        """
        name, adapters = self.name, self.adapters
        if model == name:
            return Served(model)
        if model in adapters:
            return Served(model, model)
        message = f"the model {model!r} does not exist; there is {name!r}"
        if adapters:
            message += f", with the adapters {', '.join(map(repr, adapters))}"
        raise Refusal(404, message, "model_not_found", "model")

    def unavailable(self, health: Health) -> NoReturn:
        """Refuses because of the engine's state.

        Raises:
            Refusal: Always.
        """
        state = self.stage or health.state
        begun = "its prefix cache" if health.state is EngineState.READY else "just begun"
        words = {
            EngineState.LOADING: f"the model is being loaded ({health.loading or begun})",
            EngineState.UNLOADED: self.problem or "there is no model",
            EngineState.DRAINING: "the engine is draining",
            EngineState.FAILED: "; ".join(health.problems),
            EngineState.CLOSED: "the engine was shut down",
        }
        message = words.get(state, f"the engine is {state.value}")
        retry = {"retry-after": str(self.settings.retry_after_seconds)}
        raise Refusal(503, message, f"engine_{state.value}", None, retry)

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            Refusal: It has none, or there is no model.
        """
        try:
            tokenizer = self.engine.tokenizer
        except ModelNotLoadedError as error:
            raise self.refusal(error) from error
        if tokenizer is None:
            raise Refusal(400, f"the model {self.name!r} has no tokenizer", "no_tokenizer")
        return tokenizer

    async def with_media(
        self,
        messages: Sequence[dict[str, Any]],
        config: GenerationConfig | None = None,
        options: RequestOptions | None = None,
        reading: Reading | None = None,
    ) -> list[dict[str, Any]]:
        """Messages with their images, audio and videos as bytes; for a wrong request, nothing is fetched.

        Args:
            messages: As `conversation` has them.
            config: How to generate from them.
            options: How the request is handled; None if there is none.
            reading: What is read off them, if nothing is generated.

        Raises:
            Refusal: One of them cannot be had.
            AsyncEngineError: The request is wrong, or one of its deadlines passed.
        """
        found = await decoded(messages)
        remote = remote_files(found)
        if not remote:
            return found
        assert self._fetcher is not None
        kinds = {file.kind for file in remote}
        if options is None:
            await self.engine.check_media(kinds)
        else:
            await self.engine.check_request(config, options, kinds=kinds, reading=reading)
        deadlines = None if options is None else options.deadlines
        return with_fetched(found, await in_time(self._fetcher.fetch(remote), deadlines, time.perf_counter()))

    async def call_layout(self, tokenizer: ParsingTokenizer) -> CallLayout | None:
        """How a model writes tool calls; looked for once, on a worker thread."""
        if tokenizer not in self._layouts:
            found = await anyio.to_thread.run_sync(call_layout, tokenizer, abandon_on_cancel=True)
            self._layouts[tokenizer] = found
        return self._layouts[tokenizer]

    def refusal(self, error: Exception, names: Mapping[str, str] = NAMES) -> Refusal:
        """What a client is told of an error; one that is nobody's fault but ours is logged."""
        refusal = refusal_of(error, names, self.settings.retry_after_seconds)
        if refusal.status == 500:
            logger.error("a request failed", exc_info=error)
        return refusal


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(encode(value), status, headers, "application/json")
