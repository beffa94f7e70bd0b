"""Both libraries behind the one protocol. xgrammar is tried where it is installed."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from asyncengine import tiny
from asyncengine.config import GrammarLibrary
from asyncengine.grammar.bits import num_words, row_of
from asyncengine.grammar.llguidance_backend import LlguidanceBackend
from asyncengine.grammar.protocol import Grammar, GrammarBackend, Matcher
from asyncengine.grammar.select import make_backend
from asyncengine.grammar.vocabulary import TokenTable, Vocabulary
from asyncengine.model.tokenizer import load_tokenizer
from asyncengine.response_format import (
    Choice,
    EbnfGrammar,
    JsonObject,
    JsonSchema,
    Regex,
    StructuralTag,
    StructuralTags,
    Whitespace,
)
from asyncengine.testing import ByteTokenizer
from tests.grammar.schemas import SCHEMAS, obj

needs_xgrammar = pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="xgrammar is not installed")
END = ByteTokenizer.eos_token_id
ALL: list[Any] = [
    JsonObject(),
    JsonSchema({"type": "array", "items": {"enum": ["a", "é"]}, "maxItems": 3}),
    Regex("[a-c]{2,3}x"),
    EbnfGrammar('root ::= "a" [0-9] "b"'),
    EbnfGrammar('start: "a" /[0-9]/ "b"'),
    Choice(("yes", "no", "yesterday")),
    Choice(("🙂1", "ƀa", "ße", 'a "quoted" \\\n')),
    StructuralTags([StructuralTag("<a>", {"const": 1}, "</a>")]),
]


@pytest.fixture(params=["llguidance", pytest.param("xgrammar", marks=needs_xgrammar)])
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
        (Choice(("🙂1", "ße", "\x07")), "🙂1"),
        (Choice(("🙂1", "ße", "\x07")), "\x07"),
        (JsonSchema({"const": "ße ƀa 🙂1 \\xdfe"}), r'"ße ƀa 🙂1 \\xdfe"'),
        (JsonSchema({"const": {"a": [None]}}), '{"a":[null]}'),
        (JsonSchema({"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2}), "[null, null]"),
        (JsonObject(), '{"a": {"b": [1, "x"]}}'),
    ],
)
def test_a_text_that_nothing_can_follow_is_finished(backend: GrammarBackend, wanted: Any, text: str) -> None:
    grammar = backend.compile(wanted)
    assert not read(grammar, text[:-1]).finished
    assert read(grammar, text).finished


@pytest.mark.parametrize("count", [2101, 5000])
def test_there_may_be_thousands_of_choices(backend: GrammarBackend, count: int) -> None:
    choices = [f"label {number} {number * 7}" for number in range(count)]
    grammar = backend.compile(Choice(choices))
    for choice in (choices[0], choices[1234], choices[-1]):
        assert read(grammar, choice).finished


LARGE = 2**53


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": LARGE + 1, "maximum": LARGE + 3},
        {"type": "integer", "exclusiveMinimum": LARGE, "exclusiveMaximum": LARGE + 4},
        {"type": "integer", "minimum": -LARGE - 3},
        {"type": "number", "maximum": LARGE + 1},
        {"type": "integer", "multipleOf": LARGE + 1},
        {"type": "integer", "minimum": 1e30, "maximum": 1e31},
        {"const": LARGE + 1},
        {"enum": ["a", {"a": [-LARGE - 1]}]},
        {"const": 10**400},
        obj(
            {"a": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"minimum": LARGE + 1, "type": "integer"}}]}}
        ),
        # With these the library would not come back.
        {"const": -(2**63)},
        {"const": -(2**63) + 1},
        {"type": "integer", "minimum": -(2**63), "maximum": -(2**63)},
        {"allOf": [{"type": "integer"}, {"type": "number", "minimum": -1e30, "maximum": -1e30}]},
    ],
    ids=repr,
)
def test_numbers_that_llguidance_would_not_keep_are_refused(schema: Any) -> None:
    backend = make_backend("llguidance", ByteTokenizer(), 257, (END,))
    for wanted in (JsonSchema(schema), StructuralTags([StructuralTag("<a>", schema, "")])):
        with pytest.raises(ValueError, match=r"would take another number for \w+ -?[\de+]+; allowed: below 2\*\*53"):
            backend.compile(wanted)


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"type": "integer", "minimum": LARGE - 1, "maximum": LARGE}, [str(LARGE - 1), str(LARGE)]),
        ({"const": 10**18}, [str(10**18)]),
        ({"type": "integer", "maximum": 2**63 - 1}, ["1", "-1", str(2**63 - 1)]),
        ({"type": "integer", "minimum": 0, "default": LARGE + 1, "examples": [LARGE + 3]}, ["1"]),
        (obj({"minimum": {"const": 1}}), ['{"minimum":1}']),
    ],
    ids=repr,
)
def test_numbers_that_are_kept_may_be_large(backend: GrammarBackend, schema: Any, texts: list[str]) -> None:
    grammar = backend.compile(JsonSchema(schema))
    for text in texts:
        read(grammar, text)
    if "minimum" in schema and "maximum" in schema:
        assert ord(str(LARGE + 1)[-1]) not in allowed(read(grammar, str(LARGE + 1)[:-1]))


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


@pytest.mark.parametrize("schema", [{"type": "string"}, {"type": "string", "maxLength": 5}])
def test_strings_have_neither_control_characters_nor_half_ones(backend: GrammarBackend, schema: Any) -> None:
    matcher = read(backend.compile(JsonSchema(schema)), '"a')
    assert not allowed(matcher) & {*range(32)}
    matcher.accept(0xED)
    assert {token for token in allowed(matcher) if token < END} == {*range(0x80, 0xA0)}, "surrogates begin at 0xA0"


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


@pytest.mark.parametrize(
    "wanted",
    [
        Regex("(a"),
        Regex("()"),
        JsonSchema({"type": "nothing"}),
        JsonSchema(False),
        JsonSchema({"type": "integer", "minimum": 5, "maximum": 3}),
        JsonSchema({"$ref": "#/nowhere"}),
        JsonSchema({"items": {"not": {"type": "null"}}}),
        JsonSchema({"properties": {"a": {"type": "array", "uniqueItems": True}}}),
        JsonSchema({"anyOf": [{"if": {"type": "null"}}]}),
        EbnfGrammar("root ::= nowhere"),
        EbnfGrammar("start: nowhere"),
        StructuralTags([StructuralTag("<a>", {"type": "nothing"}, "")]),
    ],
    ids=repr,
)
def test_what_is_wrong_raises(backend: GrammarBackend, wanted: Any) -> None:
    with pytest.raises(ValueError) as caught:
        backend.compile(wanted)
    assert str(caught.value).strip()
    assert ".cc:" not in str(caught.value), "nobody wants to know where in the library's source that is"


@needs_xgrammar
@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        (JsonSchema({"allOf": [{"type": "integer"}, {"minimum": 3}]}), "'allOf' of more than one"),
        (JsonSchema({"$defs": {"a": {"type": "number", "multipleOf": 2}}}), "'multipleOf'"),
        (JsonSchema({"type": "integer", "multipleOf": 1025}), "'multipleOf' above 1024"),
        (JsonSchema({"type": "integer", "multipleOf": 3, "minimum": 0}), "'multipleOf' .* in a range that is open"),
        (JsonSchema({"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": 10**5}), "or over 10000"),
        (JsonSchema({"type": "number", "minimum": LARGE + 1}), "'minimum' of 9007199254740993"),
        (JsonSchema({"enum": [2**64 + 1]}), "'enum' of integers beyond 64 bits"),
        (StructuralTags([StructuralTag("<|user|>", True, "")]), "no special token in a tag"),
        (StructuralTags([StructuralTag("<a>", True, "")], at_least_one=True), "with free text around them"),
    ],
)
def test_what_xgrammar_would_leave_out_is_refused(wanted: Any, part: str) -> None:
    tokenizer = load_tokenizer(tiny.PATH)
    with pytest.raises(ValueError, match=part):
        make_backend("xgrammar", tokenizer, 1024, (2,)).compile(wanted)


@needs_xgrammar
def test_names_and_values_that_are_called_like_keywords_are_none() -> None:
    names = ("not", "if", "contains", "uniqueItems", "multipleOf")
    schema = obj({name: {"const": {"not": name}} for name in names}, default={"if": {}})
    make_backend("xgrammar", ByteTokenizer(), 257, (END,)).compile(JsonSchema(schema))


@pytest.mark.parametrize("tagged", [False, True])
def test_white_space_is_bounded(backend: GrammarBackend, tagged: bool) -> None:
    def longest(whitespace: Whitespace) -> int:
        """How many line breaks and spaces there may be after a bracket, up to 40."""
        schema = {"type": "array", "items": {"const": 1}, "minItems": 1}
        begin = "<a>[" if tagged else "["
        wanted: Any = JsonSchema(schema, whitespace)
        if tagged:
            wanted = StructuralTags([StructuralTag("<a>", schema, "")], whitespace=whitespace)
        matcher = read(backend.compile(wanted), begin)
        for count in range(40):
            token = ord(" ") if count else ord("\n")
            if token not in allowed(matcher):
                return count
            matcher.accept(token)
        return 40

    assert (longest("none"), longest("bounded"), longest("any")) == (0, 17, 40)


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


NOT_OF_XGRAMMAR = {"multiple of a fraction", "allOf"}


@needs_xgrammar
def test_what_xgrammar_lets_through_is_accepted_by_the_schema() -> None:
    """As `tests/grammar/test_schemas.py` for the other library, without a model; formats are not looked at."""
    tokenizer = load_tokenizer(tiny.PATH)
    assert tokenizer is not None
    backend = make_backend("xgrammar", tokenizer, 1024, (2,))
    generator = np.random.default_rng(0)
    complete = set()
    for name in SCHEMAS:
        if name in NOT_OF_XGRAMMAR:
            with pytest.raises(ValueError, match="xgrammar does not know"):
                backend.compile(JsonSchema(SCHEMAS[name]))
            continue
        grammar = backend.compile(JsonSchema(SCHEMAS[name]))
        for _ in range(6):
            matcher, ids = grammar.matcher(), []
            while not matcher.finished and len(ids) < 150:
                choices = sorted(allowed(matcher, 1024))
                assert choices, name
                ends = [token for token in choices if token in (7, 66, 98)]  # '"', ']' and '}'
                ids.append(int(generator.choice(ends if ends and generator.random() < 0.3 else choices)))
                matcher.accept(ids[-1])
            if matcher.finished:
                jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(tokenizer.decode(ids, True)))
                complete.add(name)
    assert complete == set(SCHEMAS) - NOT_OF_XGRAMMAR


def test_rows_of_bits_have_the_tokens_that_are_given() -> None:
    row = row_of([0, 31, 32, 95, 96, 1000], 3)
    assert row.dtype == np.int32
    assert np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist() == [0, 31, 32, 95]
    assert not row_of([], 2).any()


def test_a_space_may_be_a_sign_that_only_the_decoder_knows() -> None:
    """SentencePiece's, as tokenizers of NLLB, MBart and Pegasus have it."""
    pieces = ("<unk>", "</s>", "▁", "▁ab", "c", "é")
    own = Tokenizer(models.Unigram([(piece, -float(place)) for place, piece in enumerate(pieces)], 0, False))
    own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    table = TokenTable({"<unk>": 0, "</s>": 1}, tokenizer_json=own.to_str())
    matcher = LlguidanceBackend(Vocabulary(table, len(pieces), (1,))).compile(Regex("c ab(é|c)")).matcher()
    row = np.zeros(num_words(len(pieces)), dtype=np.int32)
    found = []
    for token_id in (4, 3, 5, None):
        matcher.fill(row)
        found.append([each for each in range(len(pieces)) if row[0] >> each & 1])
        if token_id is not None:
            matcher.accept(token_id)
    assert found == [[4], [3], [4, 5], [1]]
