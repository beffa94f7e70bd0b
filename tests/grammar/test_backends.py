"""Both libraries behind the one protocol. xgrammar is tried where it is installed."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from asyncengine import tiny
from asyncengine.config import GrammarLibrary
from asyncengine.grammar.bits import num_words, row_of
from asyncengine.grammar.protocol import Grammar, GrammarBackend, Matcher
from asyncengine.grammar.select import make_backend
from asyncengine.model.tokenizer import load_tokenizer
from asyncengine.response_format import (
    Choice,
    EbnfGrammar,
    JsonObject,
    JsonSchema,
    Regex,
    StructuralTag,
    StructuralTags,
)
from asyncengine.testing import ByteTokenizer

HAS_XGRAMMAR = importlib.util.find_spec("xgrammar") is not None
END = ByteTokenizer.eos_token_id
ALL: list[Any] = [
    JsonObject(),
    JsonSchema({"type": "array", "items": {"enum": ["a", "é"]}, "maxItems": 3}),
    Regex("[a-c]{2,3}x"),
    EbnfGrammar('root ::= "a" [0-9] "b"'),
    EbnfGrammar('start: "a" /[0-9]/ "b"'),
    Choice(("yes", "no", "yesterday")),
    StructuralTags([StructuralTag("<a>", {"const": 1}, "</a>")]),
]


@pytest.fixture(
    params=["llguidance", pytest.param("xgrammar", marks=pytest.mark.skipif(not HAS_XGRAMMAR, reason="not installed"))]
)
def library(request: pytest.FixtureRequest) -> GrammarLibrary:
    name: GrammarLibrary = request.param
    return name


@pytest.fixture
def backend(library: GrammarLibrary) -> GrammarBackend:
    return make_backend(library, ByteTokenizer(), 257, (END,))


def allowed(matcher: Matcher, size: int = 257) -> set[int]:
    row = np.full(num_words(size), -1, dtype=np.int32)
    matcher.fill(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def read(grammar: Grammar, text: str) -> Matcher:
    matcher = grammar.matcher()
    for byte in text.encode():
        assert byte in allowed(matcher), (text, bytes([byte]))
        matcher.accept(byte)
    return matcher


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (Regex("[a-c]{2,3}x"), "abx"),
        (Regex("é+!"), "éé!"),
        (EbnfGrammar('root ::= "a" [0-9] "b"'), "a7b"),
        (EbnfGrammar('start: "a" /[0-9]/ "b"'), "a7b"),
        (Choice(("yes", "no")), "no"),
        (JsonSchema({"const": {"a": [None]}}), '{"a":[null]}'),
        (JsonSchema({"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2}), "[null, null]"),
        (JsonObject(), '{"a": {"b": [1, "x"]}}'),
    ],
)
def test_a_text_that_nothing_can_follow_is_finished(backend: GrammarBackend, wanted: Any, text: str) -> None:
    grammar = backend.compile(wanted)
    assert not read(grammar, text[:-1]).finished
    assert read(grammar, text).finished


def test_a_text_that_may_end_allows_the_end_token(backend: GrammarBackend) -> None:
    grammar = backend.compile(Choice(("yes", "yesterday")))
    assert grammar.end_token_ids == (END,)
    assert allowed(read(grammar, "ye")) == {ord("s")}
    matcher = read(grammar, "yes")
    assert allowed(matcher) == {ord("t"), END}
    assert not matcher.finished
    matcher.accept(END)
    assert matcher.finished


@pytest.mark.parametrize("wanted", ALL, ids=repr)
def test_where_one_token_alone_may_come_it_says_that_it_may_be_so(library: GrammarLibrary, wanted: Any) -> None:
    tokenizer = load_tokenizer(tiny.PATH)
    assert tokenizer is not None
    grammar = make_backend(library, tokenizer, 1024, (2,)).compile(wanted)
    generator = np.random.default_rng(1)
    forced, free = [], []
    for _ in range(10):
        matcher = grammar.matcher()
        for _ in range(40):
            forces, choices = matcher.forces, sorted(allowed(matcher, 1024))
            (forced if len(choices) == 1 else free).append(forces)
            matcher.accept(int(generator.choice(choices)))
            if matcher.finished:
                break
    assert all(forced)
    assert not all(free), "it would not spare a look"


def test_matchers_of_a_grammar_know_nothing_of_each_other(backend: GrammarBackend) -> None:
    grammar = backend.compile(Choice(("ab", "cd")))
    one, other = grammar.matcher(), grammar.matcher()
    one.accept(ord("a"))
    assert allowed(other) == {ord("a"), ord("c")}
    other.accept(ord("c"))
    assert allowed(one) == {ord("b")}
    assert allowed(grammar.matcher()) == {ord("a"), ord("c")}


def test_a_token_that_is_not_allowed_raises(backend: GrammarBackend) -> None:
    matcher = backend.compile(Choice(("ab",))).matcher()
    with pytest.raises(ValueError, match="does not take token 120"):
        matcher.accept(ord("x"))


@pytest.mark.parametrize("size", [32, 257, 300, 1000])
def test_a_row_may_be_of_another_size(backend: GrammarBackend, size: int) -> None:
    assert allowed(backend.compile(Regex("[a! ]+x")).matcher(), size) == {
        token for token in (ord("a"), ord("!"), ord(" ")) if token < num_words(size) * 32
    }


@pytest.mark.parametrize("wanted", [Regex("(a"), JsonSchema({"type": "nothing"}), EbnfGrammar("root ::= nowhere")])
def test_what_is_wrong_raises(backend: GrammarBackend, wanted: Any) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        backend.compile(wanted)


def test_a_tagged_piece_begins_at_its_trigger(backend: GrammarBackend) -> None:
    grammar = backend.compile(StructuralTags([StructuralTag("<a>", {"const": 17}, "</a>")]))
    matcher = read(grammar, "free < text <a>")
    assert ord("1") in allowed(matcher)
    assert not allowed(matcher) & {ord("2"), ord("x"), END}
    matcher = read(grammar, "free <a>17</a> and <a>17</a>")
    assert {ord("x"), ord("<"), END} <= allowed(matcher)


@pytest.mark.parametrize("wanted", ALL, ids=repr)
def test_random_walks_stay_within_the_grammar(library: GrammarLibrary, wanted: Any) -> None:
    tokenizer = load_tokenizer(tiny.PATH)
    assert tokenizer is not None
    grammar = make_backend(library, tokenizer, 1024, (2,)).compile(wanted)
    generator = np.random.default_rng(0)
    for _ in range(10):
        matcher = grammar.matcher()
        ids: list[int] = []
        while not matcher.finished and len(ids) < 60:
            choices = sorted(allowed(matcher, 1024))
            assert choices
            ids.append(int(generator.choice(choices)))
            matcher.accept(ids[-1])
        text = tokenizer.decode(ids, True)
        if matcher.finished and isinstance(wanted, JsonSchema):
            jsonschema.validate(json.loads(text), json.loads(wanted.schema))
        elif matcher.finished and isinstance(wanted, Choice):
            assert text in wanted.choices


def test_rows_of_bits_have_the_tokens_that_are_given() -> None:
    row = row_of([0, 31, 32, 95, 96, 1000], 3)
    assert row.dtype == np.int32
    assert np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist() == [0, 31, 32, 95]
    assert not row_of([], 2).any()
