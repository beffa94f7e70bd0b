"""Grammars over xgrammar: pushdown automata whose masks are mostly computed ahead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

import numpy as np
import xgrammar

from asyncengine.grammar import lark
from asyncengine.grammar.bits import num_words, row_of
from asyncengine.grammar.schema import is_double, large_numbers, nodes
from asyncengine.grammar.vocabulary import Vocabulary
from asyncengine.response_format import (
    Choice,
    EbnfGrammar,
    JsonObject,
    JsonSchema,
    Regex,
    ResponseFormat,
    StructuralTags,
    Whitespace,
)
from asyncengine.step.batch import Int32

_MAX_WHITESPACE = 17
_SPACES: dict[Whitespace, dict[str, Any]] = {
    "none": {"any_whitespace": False, "separators": (",", ":")},
    "bounded": {"any_whitespace": True, "max_whitespace_cnt": _MAX_WHITESPACE},
    "any": {"any_whitespace": True},
}


class XgrammarBackend:
    """As `asyncengine.grammar.protocol.GrammarBackend`. It wants end tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        table, size, ends = vocabulary.table, vocabulary.size, list(vocabulary.end_token_ids)
        if not ends:
            raise ValueError("xgrammar needs a model with an end-of-sequence token")
        if table.huggingface is not None:
            info = xgrammar.TokenizerInfo.from_huggingface(table.huggingface, vocab_size=size, stop_token_ids=ends)
            tokens: list[bytes] = info.decoded_vocab
        else:
            tokens = list(table.tokens)
        tokens += [b""] * (size - len(tokens))
        for textless in {*table.special.values(), *ends} & {*range(size)}:
            tokens[textless] = b"\xff%d" % textless  # no byte of UTF-8; a token that is empty could not be named either
        info = xgrammar.TokenizerInfo(tokens, vocab_size=size, stop_token_ids=ends)
        self._size = size
        self._ends = tuple(ends)
        self._special = {token: token_id for token, token_id in table.special.items() if token}
        # This engine keeps grammars itself.
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, wanted: ResponseFormat) -> XgrammarGrammar:
        """As the protocol says."""
        try:
            compiled = self._compiled(wanted)
        except RuntimeError as error:
            raise ValueError(_WHERE_IN_ITS_SOURCE.sub("", str(error)).strip()) from error
        # Free text around tags is any bytes.
        never = set(self._special.values()) - set(self._ends) if isinstance(wanted, StructuralTags) else ()
        grammar = XgrammarGrammar(compiled, self._ends, self._size, row_of(never, num_words(self._size)))
        if grammar.matcher().finished:
            raise ValueError("no text but the empty one matches it")
        return grammar

    def _compiled(self, wanted: ResponseFormat) -> xgrammar.CompiledGrammar:
        compiler = self._compiler
        if isinstance(wanted, JsonObject):
            return compiler.compile_grammar(_json_grammar('{"type": "object"}', wanted.whitespace))
        if isinstance(wanted, JsonSchema):
            return compiler.compile_grammar(_json_grammar(wanted.schema, wanted.whitespace))
        if isinstance(wanted, Regex):
            return compiler.compile_regex(wanted.regex)
        if isinstance(wanted, EbnfGrammar):
            if "::=" not in wanted.grammar:
                return compiler.compile_lark(lark.with_ids(wanted.grammar, self._special))
            return compiler.compile_grammar(wanted.grammar)
        if isinstance(wanted, Choice):
            texts = (json.dumps(text, ensure_ascii=False) for text in wanted.choices)
            return compiler.compile_grammar("root ::= " + " | ".join(texts))
        return compiler.compile_structural_tag(self._structural_tag(wanted))

    def _structural_tag(self, wanted: StructuralTags) -> dict[str, Any]:
        """The tags in xgrammar's own terms."""
        assert isinstance(wanted.tags, tuple) and isinstance(wanted.triggers, tuple)
        if wanted.at_least_one or wanted.stop_after_first or not wanted.free_text:
            raise ValueError("xgrammar takes tags with free text around them, as many as come")
        for text in (*wanted.triggers, *(part for tag in wanted.tags for part in (tag.begin, tag.end))):
            for special in self._special:
                if special in text:
                    raise ValueError(f"xgrammar takes no special token in a tag, and {text!r} has {special!r}")
        tags = [
            {
                "type": "tag",
                "begin": tag.begin,
                "content": {"type": "grammar", "grammar": _json_grammar(tag.schema, wanted.whitespace)},
                "end": tag.end,
            }
            for tag in wanted.tags
        ]
        triggered = {"type": "triggered_tags", "triggers": list(wanted.triggers), "tags": tags}
        return {"type": "structural_tag", "format": triggered}


def _json_grammar(schema: str, whitespace: Whitespace) -> str:
    """A schema as a grammar.

    The library takes no notice of keywords that it does not know, and its strings may have surrogates in them and,
    where their length is bounded, control characters, which those of JSON may not.

    Raises:
        ValueError: The schema has a keyword that the library would leave out.
    """
    for keyword in _left_out(json.loads(schema)):
        raise ValueError(f"xgrammar does not know the schema's {keyword}")
    text = str(xgrammar.Grammar.from_json_schema(schema, strict_mode=False, **_SPACES[whitespace]))
    # It writes \xdf before an "e", and would read it as \xdfe.
    text = _ESCAPE.sub(lambda escape: rf"\u00{escape[1]}" if escape[1] else escape[0], text)
    for characters in _OF_STRINGS:
        text = text.replace(characters, _OF_JSON_STRINGS)
    return text


_WHERE_IN_ITS_SOURCE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|.)")
_OF_STRINGS = (r"[^\"\\\r\n]", r"[^\0-\u001f\"\\\r\n]")
_OF_JSON_STRINGS = r"[^\0-\u001f\"\\\ud800-\udfff]"
_UNKNOWN = frozenset({
    "contains", "dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxContains", "minContains",
    "not", "then",
})  # fmt: skip
_MAX_MULTIPLE = 1024
_MAX_MULTIPLES_RANGE = 10_000


def _left_out(schema: object) -> Iterator[str]:
    """What there is anywhere in a schema that xgrammar takes no notice of."""
    for node in nodes(schema):
        yield from (repr(key) for key in node if key in _UNKNOWN)
        if node.get("uniqueItems") is True:
            yield "'uniqueItems'"
        if "multipleOf" in node and node.get("type") != "integer":
            yield "'multipleOf' where 'type' is not 'integer'"
        elif not _keeps_multiple(node):
            yield f"'multipleOf' above {_MAX_MULTIPLE}, or in a range that is open or over {_MAX_MULTIPLES_RANGE}"
        if isinstance(node.get("allOf"), list) and len(node["allOf"]) > 1:
            yield "'allOf' of more than one"
    for node, keyword, number in large_numbers(schema):
        if keyword in ("const", "enum"):
            if not -(2**63) <= number < 2**63:
                yield f"'{keyword}' of integers beyond 64 bits, as {number}"
        elif "integer" not in str(node.get("type")) and not is_double(number):
            yield f"'{keyword}' of {number} but as a double, which is another number"


def _keeps_multiple(node: Mapping[str, Any]) -> bool:
    multiple = node.get("multipleOf", 1)
    low = node.get("minimum", node.get("exclusiveMinimum"))
    high = node.get("maximum", node.get("exclusiveMaximum"))
    if not isinstance(multiple, (int, float)) or not all(
        isinstance(end, (int, float, NoneType)) for end in (low, high)
    ):
        return True  # which is an error of its own
    if multiple > _MAX_MULTIPLE or multiple != int(multiple):
        return False
    if multiple == 1 or low is high is None:
        return True
    return low is not None and high is not None and bool(high - low < _MAX_MULTIPLES_RANGE)


class XgrammarGrammar:
    """As `asyncengine.grammar.protocol.Grammar`."""

    def __init__(
        self, compiled: xgrammar.CompiledGrammar, end_token_ids: tuple[int, ...], size: int, never: Int32
    ) -> None:
        self._compiled = compiled
        self._words = num_words(size)
        self._drawable = ~never if never.any() else None
        self.end_token_ids = end_token_ids

    def matcher(self) -> XgrammarMatcher:
        """As the protocol says."""
        matcher = xgrammar.GrammarMatcher(self._compiled)
        return XgrammarMatcher(matcher, self._words, self.end_token_ids, self._drawable)


class XgrammarMatcher:
    """As `asyncengine.grammar.protocol.Matcher`."""

    __slots__ = ("_computed", "_drawable", "_matcher", "_others", "_ready")

    def __init__(
        self, matcher: xgrammar.GrammarMatcher, words: int, ends: tuple[int, ...], drawable: Int32 | None
    ) -> None:
        self._matcher = matcher
        self._computed = np.zeros((1, words), dtype=np.int32)
        self._ready = False
        self._others = ~row_of(ends, words)
        self._drawable = drawable

    @property
    def finished(self) -> bool:
        """As the protocol says."""
        if self._matcher.is_terminated():
            return True
        if not self._matcher.is_completed():
            return False
        self._compute()  # a text that may end has ended if nothing else can follow
        return not (self._computed[0] & self._others).any()

    @property
    def forces(self) -> bool:
        """As the protocol says."""
        try:
            if self._matcher.find_jump_forward_string():
                return True
        except UnicodeError:  # it begins in the middle of a character; up to xgrammar 0.2.8
            return True
        # Since 0.2.9 the string is empty there. The mask is wanted next in any case.
        self._compute()
        words = self._computed[0][self._computed[0] != 0].view(np.uint32).tolist()
        return len(words) == 1 and not words[0] & (words[0] - 1)

    def fill(self, row: Int32) -> None:
        """As the protocol says."""
        self._compute()
        size = min(len(row), self._computed.shape[1])
        row[:size] = self._computed[0, :size]
        row[size:] = 0

    def accept(self, token_id: int) -> None:
        """As the protocol says."""
        self._ready = False
        if not self._matcher.accept_token(token_id):
            raise ValueError(f"the grammar does not take token {token_id}")

    def _compute(self) -> None:
        if not self._ready:
            if not self._matcher.fill_next_token_bitmask(self._computed):
                self._computed[:] = -1
            if self._drawable is not None:
                self._computed &= self._drawable
            self._ready = True
