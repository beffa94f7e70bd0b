"""Grammars that are not a library's, put into an engine in place of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from asyncengine import AsyncEngine
from asyncengine.grammar.compiler import GrammarCompiler
from asyncengine.response_format import ResponseFormat
from asyncengine.step.batch import Int32


class FakeMatcher:
    """Allows one token, again and again, until something goes wrong."""

    def __init__(self, token_id: int, on_fill: Callable[[int], None], on_accept: Callable[[int], None]) -> None:
        self.finished = False
        self.forces = True
        self._token_id = token_id
        self._on_fill = on_fill
        self._on_accept = on_accept
        self._count = 0

    def fill(self, row: Int32) -> None:
        self._on_fill(self._count)
        row[:] = 0
        row.view(np.uint32)[self._token_id // 32] = np.uint32(1 << (self._token_id % 32))

    def accept(self, token_id: int) -> None:
        self._on_accept(self._count)
        assert token_id == self._token_id
        self._count += 1


class FakeBackend:
    """Compiles everything to the same.

    Attributes:
        compiled: The formats, each with the name of the thread that compiled it.
    """

    def __init__(
        self,
        token_id: int = 7,
        on_fill: Callable[[int], None] = lambda count: None,
        on_accept: Callable[[int], None] = lambda count: None,
        on_matcher: Callable[[], None] = lambda: None,
        gate: threading.Event | None = None,
    ) -> None:
        self.compiled: list[tuple[ResponseFormat, str]] = []
        self.end_token_ids = ()
        self._token_id = token_id
        self._on_fill, self._on_accept, self._on_matcher = on_fill, on_accept, on_matcher
        self._gate = gate

    def compile(self, wanted: ResponseFormat) -> FakeBackend:
        if self._gate is not None:
            assert self._gate.wait(10)
        self.compiled.append((wanted, threading.current_thread().name))
        return self

    def matcher(self) -> FakeMatcher:
        self._on_matcher()
        return FakeMatcher(self._token_id, self._on_fill, self._on_accept)

    def put_into(self, engine: AsyncEngine) -> FakeBackend:
        view = engine._thread.core.view
        assert view is not None
        engine._grammars = (view.epoch, GrammarCompiler(lambda: self))
        return self
