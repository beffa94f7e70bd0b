"""Special tokens have no text: formats that contain what they are called are spelled by other tokens."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from asyncengine import AsyncEngine, GenerationConfig, tiny
from asyncengine.grammar.bits import num_words
from asyncengine.grammar.protocol import GrammarBackend, Matcher
from asyncengine.grammar.select import make_backend
from asyncengine.model.tokenizer import FastTokenizer, load_tokenizer
from asyncengine.response_format import (
    Choice,
    EbnfGrammar,
    JsonObject,
    JsonSchema,
    Regex,
    StructuralTag,
    StructuralTags,
)

pytestmark = pytest.mark.loops("either")

needs_xgrammar = pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="xgrammar is not installed")
END, USER = 2, 4
SPECIAL = set(range(6))
CALL, CALLED, NAME = 1024, 1025, 1026
SIZE = 1056  # more than the tokenizer has


@cache
def tokenizer() -> FastTokenizer:
    """The embedded one with further tokens, which are not special."""
    found = load_tokenizer(tiny.PATH)
    assert isinstance(found, FastTokenizer)
    names = ("<call>", "</call>", "[a name]")
    found._chat.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    return FastTokenizer(found._chat)


@cache
def made(library: Any) -> GrammarBackend:
    return make_backend(library, tokenizer(), SIZE, (END,))


@pytest.fixture(params=["llguidance", pytest.param("xgrammar", marks=needs_xgrammar)])
def backend(request: pytest.FixtureRequest) -> GrammarBackend:
    return made(request.param)


def allowed(matcher: Matcher) -> set[int]:
    row = np.zeros(num_words(SIZE), dtype=np.int32)
    matcher.fill(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def walk(backend: GrammarBackend, wanted: Any, seed: int, prefer: int | None = None) -> list[int]:
    """Tokens of some text of the format."""
    generator = np.random.default_rng(seed)
    matcher, ids = backend.compile(wanted).matcher(), []
    while not matcher.finished and len(ids) < 100:
        choices = sorted(allowed(matcher))
        ids.append(prefer if prefer in choices else int(generator.choice(choices)))
        matcher.accept(ids[-1])
    assert matcher.finished
    return ids


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (JsonSchema({"const": "see <|end|> now"}), '"see <|end|> now"'),
        (JsonSchema({"const": {"role <|user|>": None}}, "none"), '{"role <|user|>":null}'),
        (Choice(("yes<|end|>",)), "yes<|end|>"),
        (Choice(("<|end|>",)), "<|end|>"),
        (Choice(("a<|bos|><|user|>b <|end|>",)), "a<|bos|><|user|>b <|end|>"),
        (Regex(r"x<\|bos\|>y"), "x<|bos|>y"),
        (EbnfGrammar('start: "x" "<|bos|>" "y"'), "x<|bos|>y"),
        (EbnfGrammar('root ::= "x<|bos|>y"'), "x<|bos|>y"),
    ],
    ids=repr,
)
def test_the_text_of_a_special_token_is_spelled_by_others(backend: GrammarBackend, wanted: Any, text: str) -> None:
    for seed in range(3):
        ids = walk(backend, wanted, seed)
        assert not SPECIAL & set(ids)
        assert tokenizer().decode(ids, True) == text


@pytest.mark.parametrize(
    "wanted",
    [
        JsonSchema({"type": "string"}),
        JsonSchema({"type": "string", "maxLength": 30}),
        JsonObject(),
        Regex("(.|\n)*x"),
        EbnfGrammar('start: /(.|\\n)*/ "x"'),
        EbnfGrammar("root ::= [^a]*"),
        StructuralTags([StructuralTag("<a>", True, "")]),
    ],
    ids=repr,
)
def test_no_text_matches_a_special_token(backend: GrammarBackend, wanted: Any) -> None:
    matcher = backend.compile(wanted).matcher()
    for character in ('"', "y", " "):
        assert not SPECIAL & allowed(matcher) - {END}
        token_id = tokenizer().encode_piece(character)[0]
        if token_id in allowed(matcher):
            matcher.accept(token_id)


def test_a_special_token_that_a_grammar_names_is_drawn(backend: GrammarBackend) -> None:
    assert USER in walk(backend, EbnfGrammar('start: "a" <|user|> "b"'), 0)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (Choice(("x <call>[a name]</call>",)), "x <call>[a name]</call>"),
        (Regex("a?x<call>b"), None),
        (JsonSchema({"const": {"<call>": "</call>"}}, "none"), '{"<call>":"</call>"}'),
    ],
    ids=repr,
)
def test_the_text_of_another_added_token_is_its_text(backend: GrammarBackend, wanted: Any, text: str | None) -> None:
    for seed in range(3):
        ids = walk(backend, wanted, seed, prefer=CALL)
        assert CALL in ids
        assert tokenizer().decode(ids, True) in ((text,) if text else ("ax<call>b", "x<call>b"))


def test_another_added_token_begins_and_ends_a_tag(backend: GrammarBackend) -> None:
    matcher = backend.compile(StructuralTags([StructuralTag("<call>", {"const": 1}, "</call>")])).matcher()
    text = [*tokenizer().encode_piece("so "), CALL, *tokenizer().encode_piece("1"), CALLED]
    for token_id in text:
        assert token_id in allowed(matcher)
        matcher.accept(token_id)


def test_another_added_token_may_be_named_and_written(backend: GrammarBackend) -> None:
    wanted = EbnfGrammar('start: "a" <call> "<call>" /b</ // <call>\n')
    ids = walk(backend, wanted, 0)
    assert ids[1] == CALL
    assert tokenizer().decode(ids, True) == "a<call><call>b<"


@pytest.mark.parametrize("jump_forward", [True, False])
async def test_a_request_whose_text_names_a_special_token_comes_to_its_end(
    engine: AsyncEngine, jump_forward: bool
) -> None:
    for wanted, text in (
        (JsonSchema({"const": "see <|end|> now"}), '"see <|end|> now"'),
        (Choice(("a<|bos|>",)), "a<|bos|>"),
    ):
        config = GenerationConfig(response_format=wanted, jump_forward=jump_forward, seed=1, max_tokens=60)
        result = await engine.generate("x", config)
        assert (result.text, result.finish_reason) == (text, "stop")
