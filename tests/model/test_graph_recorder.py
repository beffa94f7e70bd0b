"""Captures beside each other, in a process with several engines: with a CUDA that only notes what it is asked for."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asyncengine.model import graph_recorder, memory
from asyncengine.model.graph_recorder import CudaRecorder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What CUDA is asked for, each with whether nobody else can be at it."""
    asked = list[str]()

    def note(what: str) -> None:
        asked.append(f"{what}, {'alone' if memory.CAPTURES.locked() else 'beside others'}")

    class Graph(contextlib.AbstractContextManager[None]):
        def __init__(self, graph: Any, **_: Any) -> None:
            note("make")

        def __enter__(self) -> None:
            note("begin")

        def __exit__(self, *_: object) -> None:
            note("end")

    class Captured:
        def replay(self) -> None:
            pass

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "CUDAGraph": Captured,
        "graph": Graph,
        "is_available": lambda: True,
        "mem_get_info": lambda device: (7, 80),
        "synchronize": lambda device: note("wait"),
        "empty_cache": lambda: note("empty"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graph_recorder, "_STREAMS", defaultdict(list))
    return asked


def test_one_graph_is_captured_at_a_time(asked: list[str]) -> None:
    """Two at once fail in torch, and so does whoever waits for the device, or empties its cache, beside one."""
    runs: list[bool] = []
    recorder = CudaRecorder(torch.device("cuda"))
    recorder.record(lambda: (torch.tensor(len(runs)), runs.append(memory.CAPTURES.locked()))[:1])
    assert asked == ["wait, alone", "make, alone", "begin, alone", "end, alone"]
    assert runs == [False, False, True]  # others need not wait for what a model does on its first runs


def test_memory_is_given_back_between_captures(asked: list[str]) -> None:
    memory.give_back()
    assert memory.unheld_bytes(torch.device("cuda")) == 7
    assert asked == ["empty, alone", "empty, alone"]
