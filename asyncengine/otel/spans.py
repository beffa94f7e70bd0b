"""One span per request, named and described as the semantic conventions for generative AI have it.

A span begins where the request is added, on the event loop and in the caller's context, so that its parent is the
caller's span; it ends when the request does. Nothing is done per token: when the first one came, the usage tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import context, propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.util.types import AttributeValue

from asyncengine._version import __version__
from asyncengine.loop.engine import AsyncEngine
from asyncengine.loop.observer import RequestBegun, RequestOver

_NANOSECONDS = 1_000_000_000
_SAMPLING = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "max_tokens", "seed")


def instrument(engine: AsyncEngine, tracer_provider: TracerProvider | None = None) -> RequestSpans:
    """Lets an engine make a span of every request from now on; ``engine.observer = None`` undoes it.

    Args:
        engine: The engine.
        tracer_provider: Where spans go; None is the provider that the application has set for the process.
    """
    spans = RequestSpans(tracer_provider)
    engine.observer = spans
    return spans


class RequestSpans:
    """As `asyncengine.loop.observer.RequestObserver`."""

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("asyncengine", __version__, tracer_provider)

    def begin(self, begun: RequestBegun) -> Callable[[RequestOver], None]:
        """As the protocol says."""
        asked = begun.model if begun.adapter is None else begun.adapter
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": begun.operation,
            "gen_ai.provider.name": "asyncengine",
            "gen_ai.request.model": asked,
            "gen_ai.response.model": begun.model,
            "gen_ai.response.id": begun.request_id,
            "gen_ai.usage.input_tokens": begun.prompt_tokens,
        }
        if begun.operation not in ("embeddings", "classification"):
            config = begun.config
            values = {name: getattr(config, name) for name in _SAMPLING}
            attributes |= {f"gen_ai.request.{name}": value for name, value in values.items() if value is not None}
            if config.n != 1:
                attributes["gen_ai.request.choice.count"] = config.n
            if config.stop_strs:
                attributes["gen_ai.request.stop_sequences"] = tuple(config.stop_strs)
        name = f"{begun.operation} {asked}"
        span = self._tracer.start_span(name, kind=SpanKind.INTERNAL, attributes=attributes)
        started = _start(span)
        return lambda over: _end(span, started, over)

    @contextmanager
    def within(self, headers: Mapping[str, str]) -> Iterator[None]:
        """As the protocol says: by ``traceparent``, unless there is a span already, such as a web framework's."""
        if trace.get_current_span().get_span_context().is_valid:
            yield
            return
        token = context.attach(propagate.extract(headers))
        try:
            yield
        finally:
            context.detach(token)


def _start(span: Span) -> int | None:
    started = getattr(span, "start_time", None)  # the API has none: a span that is not recorded
    return started if isinstance(started, int) else None


def _end(span: Span, started: int | None, over: RequestOver) -> None:
    span.set_attribute("gen_ai.response.finish_reasons", tuple(str(reason) for reason in over.finish_reasons))
    usage = over.usage
    if usage is not None:
        span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)  # a prompt in pieces was not known before
        span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
        span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
        span.set_attribute("asyncengine.preemptions", usage.preemptions)
        span.set_attribute("asyncengine.queue_seconds", usage.queue_seconds)
        if usage.first_token_seconds is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", usage.first_token_seconds)
            if started is not None:
                span.add_event("first token", timestamp=started + int(usage.first_token_seconds * _NANOSECONDS))
    if over.error is not None:
        span.set_attribute("error.type", type(over.error).__name__)
        span.set_status(Status(StatusCode.ERROR, str(over.error)))
    span.end()
