"""From response formats to grammars, each compiled once. Safe on any thread; `compile` blocks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from asyncengine.errors import InvalidRequestError
from asyncengine.grammar.protocol import Grammar, GrammarBackend
from asyncengine.response_format import ResponseFormat

CAPACITY = 256
"""Grammars that are kept, least recently used first out."""


class GrammarCompiler:
    """Compiles for one model.

    Args:
        make_backend: Called once, by the first `compile`.
        capacity: Most grammars that are kept.
    """

    def __init__(self, make_backend: Callable[[], GrammarBackend], capacity: int = CAPACITY) -> None:
        self._make_backend = make_backend
        self._capacity = capacity
        self._backend: GrammarBackend | None = None
        self._backend_lock = threading.Lock()
        self._lock = threading.Lock()
        self._kept: OrderedDict[ResponseFormat, Grammar] = OrderedDict()
        self._compiling: dict[ResponseFormat, threading.Lock] = {}

    def cached(self, wanted: ResponseFormat) -> Grammar | None:
        """The grammar, if it was compiled before. Never blocks for long."""
        with self._lock:
            grammar = self._kept.get(wanted)
            if grammar is not None:
                self._kept.move_to_end(wanted)
            return grammar

    def compile(self, wanted: ResponseFormat) -> Grammar:
        """Compiles, or waits for whoever compiles the same just now.

        Raises:
            InvalidRequestError: The format is wrong, or there is no back end for it.
        """
        with self._lock:
            turn = self._compiling.setdefault(wanted, threading.Lock())
        with turn:
            grammar = self.cached(wanted)
            if grammar is None:
                try:
                    grammar = self._compile(wanted)
                finally:
                    with self._lock:
                        if self._compiling.get(wanted) is turn:
                            del self._compiling[wanted]
                with self._lock:
                    self._kept[wanted] = grammar
                    while len(self._kept) > self._capacity:
                        self._kept.popitem(last=False)
            return grammar

    def _compile(self, wanted: ResponseFormat) -> Grammar:
        try:
            with self._backend_lock:
                if self._backend is None:
                    self._backend = self._make_backend()
            return self._backend.compile(wanted)
        except InvalidRequestError:
            raise
        except BaseException as error:  # a panic of a library in another language is no `Exception`
            raise InvalidRequestError(f"response_format cannot be compiled: {error}") from error
