from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncengine.model.buckets import Buckets, padded, padding


@given(largest=st.integers(1, 5000), tokens=st.integers(1, 5000))
def test_a_step_gets_the_smallest_bucket_that_holds_it(largest: int, tokens: int) -> None:
    buckets = Buckets.upto(largest)
    assert buckets.sizes[-1] == largest
    size = buckets.of(tokens)
    if tokens > largest:
        assert size is None
    else:
        assert size == min(s for s in buckets.sizes if s >= tokens)
        assert size <= (1.5 if tokens >= 16 else 2) * tokens


def test_no_tokens_have_no_bucket() -> None:
    assert Buckets.upto(8).of(0) is None


def test_buckets_for_a_server() -> None:
    assert Buckets.upto(1).sizes == (1,)
    assert Buckets.upto(20).sizes == (1, 2, 4, 8, 16, 20)
    assert len(Buckets.upto(256).sizes) == 23


def test_buckets_of_steps_with_prompts_end_where_launching_is_no_slower() -> None:
    assert Buckets.mixed(2304).sizes == Buckets.mixed(512).sizes == (32, 64, 128, 192, 256, 384, 512)
    assert Buckets.mixed(34).sizes == (32, 34) and Buckets.mixed(9).sizes == (9,)


@pytest.mark.parametrize("sizes", [(), (0, 1), (2, 1), (1, 1)])
def test_sizes_must_rise(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected rising positive numbers"):
        Buckets(sizes)


def test_padding_belongs_to_no_row_and_is_written_nowhere() -> None:
    step = padding(3)
    step.token_ids[:] = 7
    longer = padded(step, 5)
    assert longer.token_ids.tolist() == [7, 7, 7, 0, 0]
    assert longer.positions.tolist() == [0] * 5
    assert longer.slot_mapping.tolist() == [-1] * 5
    assert longer.query_start is step.query_start
    assert padded(step, 3) is step
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        padded(step, 2)
    assert np.dtype(longer.slot_mapping.dtype) == np.int64


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 16, 100, 256, 777, 1024])
def test_a_few_of_them_pad_a_step_to_at_most_four_times_its_tokens(largest: int) -> None:
    buckets = Buckets.upto(largest)
    few = buckets.coarse()
    assert few == tuple(sorted(few, reverse=True)) and set(few) <= set(buckets.sizes)
    for tokens in range(1, largest + 1):
        assert min(size for size in few if size >= tokens) <= 4 * tokens
    assert len(few) <= 2 + math.log(largest, 2)
