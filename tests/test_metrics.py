from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncengine import Counters, EngineMetrics, Histogram
from asyncengine.metrics import LATENCY_BUCKETS


def test_values_fall_into_the_bucket_whose_bound_they_do_not_exceed() -> None:
    histogram = Histogram()
    for value in (0.0, 0.0005, 0.00051, 60.0, 61.0, -1e-9):
        histogram.observe(value)
    assert histogram.counts[0] == 3 and histogram.counts[1] == 1
    assert histogram.counts[-2] == 1 and histogram.counts[-1] == 1
    assert histogram.count == 6 == sum(histogram.counts)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), max_size=30))
def test_observing_several_times_is_observing_once_several_times(values: list[tuple[float, int]]) -> None:
    once, often = Histogram(), Histogram()
    for value, times in values:
        once.observe(value, times)
        for _ in range(times):
            often.observe(value)
    assert (once.counts, once.count) == (often.counts, often.count)
    assert once.total == pytest.approx(often.total)
    many = Histogram()
    many.observe_all(np.array([value for value, times in values for _ in range(times)]))
    assert (once.counts, once.count) == (many.counts, many.count)
    assert once.total == pytest.approx(many.total)


def test_a_quantile_is_the_bound_of_its_bucket() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.5) is None
    for value in (0.0001, 0.003, 0.003, 100.0):
        histogram.observe(value)
    assert histogram.quantile(0.0) == LATENCY_BUCKETS[0]
    assert histogram.quantile(0.5) == 0.005
    assert histogram.quantile(1.0) == float("inf")


def test_a_copy_of_counters_shares_nothing() -> None:
    counters = Counters()
    copy = counters.copy()
    counters.steps += 1
    counters.requests["stop"] += 1
    counters.step_seconds.observe(1.0)
    assert copy == Counters()


def test_a_copy_of_counters_has_every_field() -> None:
    counters = Counters()
    for number, field in enumerate(dataclasses.fields(Counters), 1):
        if field.type == "int":
            setattr(counters, field.name, number)
    assert counters.copy() == counters


def metrics(total: int, free: int, cached: int) -> EngineMetrics:
    return EngineMetrics("ready", 1, 2, 3, total, free, cached, Counters())


def test_blocks_that_are_neither_free_nor_cached_are_used() -> None:
    assert metrics(10, 5, 2).kv_blocks_used == 3
    assert metrics(10, 5, 2).kv_cache_usage_ratio == 0.3
    assert metrics(0, 0, 0).kv_cache_usage_ratio == 0.0


def test_a_loop_adds_its_own_numbers() -> None:
    before = metrics(1, 1, 0)
    after = before.on_loop(5, 0.1, 0.2, 7)
    assert (after.loop_wakeups, after.handoff_seconds, after.handoff_max_seconds, after.merged_deltas) == (
        5,
        0.1,
        0.2,
        7,
    )
    assert before.loop_wakeups == 0
