from __future__ import annotations

import threading

import pytest

from asyncengine import InvalidRequestError
from asyncengine.grammar.compiler import GrammarCompiler
from asyncengine.response_format import Regex, ResponseFormat
from tests.grammar.fakes import FakeBackend


def test_equal_formats_are_compiled_once() -> None:
    backend = FakeBackend()
    compiler = GrammarCompiler(lambda: backend)
    assert compiler.cached(Regex("a")) is None
    grammar = compiler.compile(Regex("a"))
    assert compiler.cached(Regex("a")) is grammar
    assert compiler.compile(Regex("a")) is grammar
    assert len(backend.compiled) == 1


def test_the_least_recently_used_is_forgotten() -> None:
    compiler = GrammarCompiler(FakeBackend, capacity=2)
    for regex in ("a", "b"):
        compiler.compile(Regex(regex))
    assert compiler.cached(Regex("a")) is not None
    compiler.compile(Regex("c"))
    assert [compiler.cached(Regex(regex)) is not None for regex in "abc"] == [True, False, True]


def test_the_back_end_is_made_when_it_is_wanted() -> None:
    made: list[FakeBackend] = []

    def make() -> FakeBackend:
        made.append(FakeBackend())
        return made[-1]

    compiler = GrammarCompiler(make)
    assert not made
    compiler.compile(Regex("a"))
    compiler.compile(Regex("b"))
    assert len(made) == 1


def test_threads_that_want_the_same_wait_for_the_first() -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    compiler = GrammarCompiler(lambda: backend)
    threads = [threading.Thread(target=compiler.compile, args=(Regex("a"),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert len(backend.compiled) == 1
    assert not compiler._compiling


def test_what_fails_is_told_and_tried_again() -> None:
    class Broken(FakeBackend):
        def compile(self, wanted: ResponseFormat) -> FakeBackend:
            super().compile(wanted)
            raise RuntimeError("panic") if len(self.compiled) == 1 else KeyboardInterrupt

    backend = Broken()
    compiler = GrammarCompiler(lambda: backend)
    with pytest.raises(InvalidRequestError, match="cannot be compiled: panic") as caught:
        compiler.compile(Regex("a"))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(InvalidRequestError):
        compiler.compile(Regex("a"))
    assert len(backend.compiled) == 2
    assert compiler.cached(Regex("a")) is None
    assert not compiler._compiling


def test_a_back_end_that_cannot_be_made_is_told_and_tried_again() -> None:
    made: list[FakeBackend] = []

    def make() -> FakeBackend:
        made.append(FakeBackend())
        if len(made) == 1:
            raise RuntimeError("no such vocabulary")
        return made[-1]

    compiler = GrammarCompiler(make)
    with pytest.raises(InvalidRequestError, match="cannot be compiled: no such vocabulary"):
        compiler.compile(Regex("a"))
    assert compiler.compile(Regex("a")) is made[1]
