from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_case import CPU, fresh_cache, layer, random_row, run_paged, shuffled_tables, step_batch
from torch.utils._python_dispatch import TorchDispatchMode

from asyncengine.model.attention import reference
from asyncengine.model.attention.reference import TorchAttention


class NoSynchronisation(TorchDispatchMode):
    """Fails on the operators whose result or shape the host would have to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero")
        return func(*args, **(kwargs or {}))


def test_attend_never_waits_for_the_device() -> None:
    backend, spec = TorchAttention(), layer(sliding_window=9, soft_cap=3.0, has_sinks=True)
    row = random_row(spec, 0, 40, torch.float32, 0)
    tables, num_blocks = shuffled_tables([40], 16, 0)
    cache = fresh_cache(backend, spec, num_blocks, 16, torch.float32)
    plan = backend.plan(step_batch([40], [0], tables, 16), 16, CPU)
    with NoSynchronisation():
        backend.attend(spec, cache, plan, row.query, row.keys, row.values, torch.zeros(spec.num_heads))


def test_rows_of_similar_length_are_one_group() -> None:
    contexts = [1000, 3, 600, 2, 5, 0]
    batch = step_batch([1, 1, 1, 1, 1, 7], contexts, [list(range(70))] * 6, 16)
    groups = TorchAttention().plan(batch, 16, CPU).groups
    tokens = sorted(sorted(group.tokens.tolist()) for group in groups)
    assert tokens == [[0, 2], [1, 4], [3], [5, 6, 7, 8, 9, 10, 11]]


def test_memory_bounds_only_divide_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = layer()
    shapes = [(90, 1), (70, 1), (80, 1), (9, 60)]
    rows = [random_row(spec, context, new, torch.float32, context) for context, new in shapes]
    whole = run_paged(TorchAttention(), spec, rows, 16, torch.float32)
    monkeypatch.setattr(reference, "_GATHERED_TOKENS", 100)
    monkeypatch.setattr(reference, "_SCORES", 1000)
    parts = run_paged(TorchAttention(), spec, rows, 16, torch.float32)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)
