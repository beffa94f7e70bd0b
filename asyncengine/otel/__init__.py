"""OpenTelemetry spans of requests. Needs the extra ``otel``, and an SDK that the application sets up."""

from asyncengine.otel.spans import RequestSpans, instrument

__all__ = ["RequestSpans", "instrument"]
