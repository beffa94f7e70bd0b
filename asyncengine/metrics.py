"""What an engine counts, as plain values. No global registry; a snapshot is read by one call."""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asyncengine.step.batch import Float64

LATENCY_BUCKETS = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Upper bounds in seconds; the last bucket of a histogram is everything above."""


@dataclass(slots=True)
class Histogram:
    """A distribution in seconds, as Prometheus has it, except that `counts` are per bucket and not cumulative."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BUCKETS) + 1))
    total: float = 0.0
    count: int = 0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Adds a value, `times` times."""
        self.counts[bisect.bisect_left(LATENCY_BUCKETS, seconds)] += times
        self.total += seconds * times
        self.count += times

    def observe_all(self, seconds: Float64) -> None:
        """Adds each of several values."""
        for bucket, times in enumerate(np.bincount(np.searchsorted(LATENCY_BUCKETS, seconds)).tolist()):
            self.counts[bucket] += times
        self.total += float(seconds.sum())
        self.count += len(seconds)

    def copy(self) -> Histogram:
        """An independent copy."""
        return Histogram(list(self.counts), self.total, self.count)

    def quantile(self, q: float) -> float | None:
        """Upper bound of the bucket in which the q-quantile lies; None without values."""
        rank, seen = q * self.count, 0
        for bound, count in zip((*LATENCY_BUCKETS, float("inf")), self.counts, strict=True):
            seen += count
            if count and seen >= rank:
                return bound
        return None


@dataclass(slots=True)
class Counters:
    """Running totals. Written by the step thread alone; reset zeroes them."""

    prompt_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0
    video_tokens: int = 0
    generation_tokens: int = 0
    requests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0))
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    admission_rejections: int = 0
    steps: int = 0
    batched_sequences: int = 0
    failed_steps: int = 0
    step_seconds: Histogram = field(default_factory=Histogram)
    model_seconds: Histogram = field(default_factory=Histogram)
    time_to_first_token_seconds: Histogram = field(default_factory=Histogram)
    inter_token_latency_seconds: Histogram = field(default_factory=Histogram)
    e2e_request_latency_seconds: Histogram = field(default_factory=Histogram)
    request_queue_seconds: Histogram = field(default_factory=Histogram)

    def copy(self) -> Counters:
        """An independent copy."""
        values: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            values[name] = value.copy() if isinstance(value, (Histogram, dict)) else value
        return Counters(**values)


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """A snapshot of one engine.

    Attributes:
        state: Of the engine.
        num_requests_running: Requests with a sequence in the batch.
        num_requests_waiting: Requests admitted that have none.
        num_requests_queued: Requests that wait for room in the waiting queue.
        kv_blocks_total: Blocks of the KV cache.
        kv_blocks_free: Held by nobody.
        kv_blocks_cached: Held by the prefix cache alone.
        counters: Totals since loading or the last reset.
        loop_wakeups: Wake-ups of the calling event loop.
        handoff_seconds: What the newest of them took from the step thread: hand-over and event-loop lag together.
        handoff_max_seconds: What the longest took.
        merged_deltas: Tokens on the calling loop that were added to a delta nobody had read yet.
        step_running_seconds: How long the present step has been running; 0 between steps.
        warm_up_pieces: Pieces of work, such as CUDA graphs to capture, that make the loaded model faster.
        warm_up_pieces_done: Those that are through.
        states_total: Places for states of recurrent layers that are kept beside those of the sequences.
        states_cached: States that the prefix cache keeps.
    """

    state: str
    num_requests_running: int
    num_requests_waiting: int
    num_requests_queued: int
    kv_blocks_total: int
    kv_blocks_free: int
    kv_blocks_cached: int
    counters: Counters
    loop_wakeups: int = 0
    handoff_seconds: float = 0.0
    handoff_max_seconds: float = 0.0
    merged_deltas: int = 0
    step_running_seconds: float = 0.0
    warm_up_pieces: int = 0
    warm_up_pieces_done: int = 0
    states_total: int = 0
    states_cached: int = 0

    def on_loop(self, wakeups: int, handoff: float, handoff_max: float, merged: int) -> EngineMetrics:
        """The same with an event loop's own numbers."""
        return dataclasses.replace(
            self,
            loop_wakeups=wakeups,
            handoff_seconds=handoff,
            handoff_max_seconds=handoff_max,
            merged_deltas=merged,
        )

    @property
    def kv_blocks_used(self) -> int:
        """Blocks held by requests or pins."""
        return self.kv_blocks_total - self.kv_blocks_free - self.kv_blocks_cached

    @property
    def kv_cache_usage_ratio(self) -> float:
        """Share of the blocks held by requests or pins."""
        return self.kv_blocks_used / self.kv_blocks_total if self.kv_blocks_total else 0.0
