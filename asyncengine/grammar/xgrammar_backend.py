"""Grammars over xgrammar: pushdown automata whose masks are mostly computed ahead."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import xgrammar

from asyncengine.grammar.bits import num_words, row_of
from asyncengine.grammar.vocabulary import Vocabulary
from asyncengine.response_format import (
    Choice,
    EbnfGrammar,
    JsonObject,
    JsonSchema,
    Regex,
    ResponseFormat,
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
        else:
            tokens: list[bytes] = [*table.tokens, *[b""] * (size - len(table.tokens))]
            for special in table.special.values():
                tokens[special] = b""  # which it takes for special
            info = xgrammar.TokenizerInfo(tokens, vocab_size=size, stop_token_ids=ends)
        self._size = size
        self._ends = tuple(ends)
        # This engine keeps grammars itself.
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, wanted: ResponseFormat) -> XgrammarGrammar:
        """As the protocol says."""
        compiler = self._compiler
        if isinstance(wanted, JsonObject):
            compiled = compiler.compile_json_schema(
                '{"type": "object"}', strict_mode=False, **_SPACES[wanted.whitespace]
            )
        elif isinstance(wanted, JsonSchema):
            compiled = compiler.compile_json_schema(wanted.schema, strict_mode=False, **_SPACES[wanted.whitespace])
        elif isinstance(wanted, Regex):
            compiled = compiler.compile_regex(wanted.regex)
        elif isinstance(wanted, EbnfGrammar):
            if "::=" not in wanted.grammar:
                compiled = compiler.compile_lark(wanted.grammar)
            else:
                compiled = compiler.compile_grammar(wanted.grammar)
        elif isinstance(wanted, Choice):
            compiled = compiler.compile_grammar("root ::= " + " | ".join(json.dumps(text) for text in wanted.choices))
        else:
            assert isinstance(wanted.tags, tuple) and isinstance(wanted.triggers, tuple)
            if wanted.at_least_one or wanted.stop_after_first or not wanted.free_text:
                raise ValueError("xgrammar takes tags with free text around them, as many as come")
            tags = [
                {"type": "tag", "begin": tag.begin, "end": tag.end, "content": _content(tag.schema)}
                for tag in wanted.tags
            ]
            compiled = compiler.compile_structural_tag(
                {
                    "type": "structural_tag",
                    "format": {"type": "triggered_tags", "triggers": list(wanted.triggers), "tags": tags},
                }
            )
        return XgrammarGrammar(compiled, self._ends, self._size)


class XgrammarGrammar:
    """As `asyncengine.grammar.protocol.Grammar`."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, end_token_ids: tuple[int, ...], size: int) -> None:
        self._compiled = compiled
        self._words = num_words(size)
        self.end_token_ids = end_token_ids

    def matcher(self) -> XgrammarMatcher:
        """As the protocol says."""
        return XgrammarMatcher(xgrammar.GrammarMatcher(self._compiled), self._words, self.end_token_ids)


class XgrammarMatcher:
    """As `asyncengine.grammar.protocol.Matcher`."""

    __slots__ = ("_computed", "_matcher", "_others", "_ready")

    def __init__(self, matcher: xgrammar.GrammarMatcher, words: int, ends: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._computed = np.zeros((1, words), dtype=np.int32)
        self._ready = False
        self._others = ~row_of(ends, words)

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
            return bool(self._matcher.find_jump_forward_string())
        except UnicodeError:  # it begins in the middle of a character
            return True

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
            self._ready = True


def _content(schema: str) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": json.loads(schema)}
