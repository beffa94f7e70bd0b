"""Metrics in Prometheus' text format. One registry per application; what the engine counts is read at each scrape."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import anyio
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from asyncengine import metrics
from asyncengine.loop.engine import AsyncEngine
from asyncengine.metrics import LATENCY_BUCKETS, EngineMetrics
from asyncengine.outputs import Usage
from asyncengine.server.loop_lag import LoopLag
from asyncengine.server.naming import model_name
from asyncengine.server.settings import ServerSettings

_BUCKETS = tuple(repr(bound) for bound in LATENCY_BUCKETS)
_LABELS = ("model_name", "engine")

_GAUGES = {
    "num_requests_running": "Requests with a sequence in the batch.",
    "num_requests_waiting": "Requests admitted that have none.",
    "num_requests_queued": "Requests that wait for room in the waiting queue.",
    "kv_cache_usage_ratio": "Share of the KV cache's blocks held by requests or pins.",
    "kv_blocks_total": "Blocks of the KV cache.",
    "kv_blocks_free": "Blocks held by nobody.",
    "kv_blocks_cached": "Blocks held by the prefix cache alone.",
    "step_running_seconds": "How long the present step has been running.",
    "warm_up_pieces": "Pieces of work, such as CUDA graphs to capture, that make the loaded model faster.",
    "warm_up_pieces_done": "Those that are through.",
    "states_total": "Places for states of recurrent layers that are kept beside those of the sequences.",
    "states_cached": "States of recurrent layers that the prefix cache keeps.",
    "handoff_seconds": "What the newest wake-up of the event loop took from the step thread.",
    "handoff_max_seconds": "What the longest took.",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens computed or found in the prefix cache.",
    "image_tokens": "Those of them that stand for images.",
    "audio_tokens": "Those of them that stand for audio.",
    "video_tokens": "Those of them that stand for videos.",
    "generation_tokens": "Tokens generated.",
    "draft_tokens": "Tokens guessed by speculative decoding.",
    "accepted_draft_tokens": "Guessed tokens that were right.",
    "preemptions": "How often a sequence lost its blocks and was computed again.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found there.",
    "steps": "Steps.",
    "failed_steps": "Steps that raised.",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "From admission to the first token.",
    "inter_token_latency_seconds": "Between two tokens of a branch.",
    "e2e_request_latency_seconds": "From admission to the end.",
    "request_queue_seconds": "From admission to the first step.",
    "step_seconds": "Of a step.",
    "model_seconds": "Of the model's part in a step.",
}


class Traffic:
    """What the server itself counts, beside what it reads off the engine.

    Attributes:
        active: Requests under way that use the engine.
        requests: HTTP requests by method, route and status.
        rejections: Requests refused because of ``max_concurrency``.
        lag: How late the event loop is.
    """

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self._engine = engine
        self._settings = settings
        self.active = 0
        self.lag = LoopLag()
        self._registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            "asyncengine_http_requests",
            "HTTP requests.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self.rejections = Counter(
            "asyncengine_http_rejections",
            "HTTP requests refused because max_concurrency were under way.",
            registry=self._registry,
        )
        self._prefill = Histogram(
            "asyncengine_request_prefill_seconds",
            "From the first step of a request that came by HTTP to its first token.",
            _LABELS,
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )
        self._decode = Histogram(
            "asyncengine_request_decode_seconds",
            "From the first token of a request that came by HTTP to its end.",
            _LABELS,
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(self))

    def observe(self, usage: Usage) -> None:
        """Counts a request that has ended."""
        first = usage.first_token_seconds
        if first is not None:
            labels = self.labels()
            self._prefill.labels(*labels).observe(max(first - usage.queue_seconds, 0.0))
            self._decode.labels(*labels).observe(max(usage.total_seconds - first, 0.0))

    def labels(self) -> tuple[str, str]:
        """Values of the labels ``model_name`` and ``engine``."""
        return model_name(self._engine, self._settings) or "", self._settings.engine_name

    async def text(self) -> bytes:
        """Everything, as Prometheus reads it. A timer of a millisecond adds to what is known of the loop's lag."""
        asked = 0.001
        begun = time.perf_counter()
        await anyio.sleep(asked)
        self.lag.observe(time.perf_counter() - begun - asked)
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the engine counts, now."""
        now, labels = self._engine.metrics(), self.labels()
        text = "How late a timer of the event loop was, sampled while there are requests."
        yield _histogram("asyncengine_event_loop_lag_seconds", text, self.lag.seconds, labels)
        yield from _families(now, labels)


class _EngineCollector(Collector):
    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        yield from self._traffic.collect()


def _families(now: EngineMetrics, labels: tuple[str, str]) -> Iterator[Metric]:
    counters = now.counters
    for name, text in _GAUGES.items():
        yield _one(GaugeMetricFamily(f"asyncengine_{name}", text, None, _LABELS), labels, getattr(now, name))
    for name, text in _COUNTERS.items():
        yield _one(CounterMetricFamily(f"asyncengine_{name}", text, None, _LABELS), labels, getattr(counters, name))
    yield _one(
        CounterMetricFamily(
            "asyncengine_merged_deltas", "Tokens added to a delta that nobody had read yet.", None, _LABELS
        ),
        labels,
        now.merged_deltas,
    )
    text = "Requests that ended, by the reason of their last branch."
    ended = CounterMetricFamily("asyncengine_requests", text, None, (*_LABELS, "finish_reason"))
    for reason, count in counters.requests.items():
        ended.add_metric((*labels, reason), count)
    yield ended
    refused = CounterMetricFamily("asyncengine_admission_rejections", "Requests refused.", None, (*_LABELS, "reason"))
    refused.add_metric((*labels, "queue_full"), counters.admission_rejections)
    yield refused
    batch = SummaryMetricFamily("asyncengine_batch_size", "Sequences in a step.", None, None, _LABELS)
    batch.add_metric(labels, count_value=counters.steps, sum_value=counters.batched_sequences)
    yield batch
    for name, text in _HISTOGRAMS.items():
        yield _histogram(f"asyncengine_{name}", text, getattr(counters, name), labels)


def _one(family: Any, labels: tuple[str, str], value: float) -> Metric:
    family.add_metric(labels, value)
    metric: Metric = family
    return metric


def _histogram(name: str, text: str, values: metrics.Histogram, labels: tuple[str, str]) -> Metric:
    family = HistogramMetricFamily(name, text, None, None, _LABELS)
    counts = list(accumulate(values.counts))
    buckets = [(bound, float(count)) for bound, count in zip((*_BUCKETS, "+Inf"), counts, strict=True)]
    family.add_metric(labels, buckets, values.total)
    return family
