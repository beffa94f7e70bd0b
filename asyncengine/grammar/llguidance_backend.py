"""Grammars over llguidance: an Earley parser over derivatives of regular expressions, masks in tens of microseconds."""

from __future__ import annotations

import json
import re
import threading

import llguidance
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from asyncengine.grammar import lark
from asyncengine.grammar.bits import num_words, row_of
from asyncengine.grammar.vocabulary import TokenTable, Vocabulary
from asyncengine.response_format import Choice, EbnfGrammar, JsonObject, JsonSchema, Regex, ResponseFormat
from asyncengine.step.batch import Int32

_QUIET = LLParserLimits(verbose_errors=False)


class LlguidanceBackend:
    """As `asyncengine.grammar.protocol.GrammarBackend`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        table, size = vocabulary.table, vocabulary.size
        ends = [end for end in vocabulary.end_token_ids if end < size]
        if table.tokenizer_json is not None:
            read = _read(table.tokenizer_json, size, ends)
            tokens = llguidance.TokenizerWrapper(_Read(read, table, ends))
            self._tokenizer = LLTokenizer(tokens, eos_token=read.eos_tokens)
        else:
            self._tokenizer = LLTokenizer(
                llguidance.TokenizerWrapper(_Bytes(table.tokens, [*table.special.values()], ends)), n_vocab=size
            )

    def compile(self, wanted: ResponseFormat) -> LlguidanceGrammar:
        """As the protocol says."""
        matcher = LLMatcher(self._tokenizer, self._text(wanted), log_level=0, limits=_QUIET)
        if matcher.is_error():
            raise ValueError(_reason(matcher))
        ends = tuple(self._vocabulary.end_token_ids)
        grammar = LlguidanceGrammar(matcher, self._tokenizer, ends)
        first = grammar.matcher()
        row = np.zeros(num_words(self._tokenizer.vocab_size), dtype=np.int32)
        first.fill(row)
        if first.finished or not (row & ~row_of(ends, len(row))).any():
            raise ValueError("no text but the empty one matches it")
        return grammar

    def _text(self, wanted: ResponseFormat) -> str:
        """The format in llguidance's own terms."""
        if isinstance(wanted, (JsonObject, JsonSchema)):
            text: str = LLMatcher.grammar_from_json_schema(lark.json_of(wanted))
        elif isinstance(wanted, Regex):
            text = LLMatcher.grammar_from_regex(wanted.regex)
        elif isinstance(wanted, EbnfGrammar):
            text = llguidance.grammar_from("grammar", lark.with_ids(wanted.grammar, self._vocabulary.table.added))
        elif isinstance(wanted, Choice):
            # One lexeme: an alternative of a rule is an item of the parser, which takes 2,000 of them.
            texts = " | ".join(json.dumps(choice) for choice in wanted.choices)
            text = LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
        else:
            text = LLMatcher.grammar_from_lark(lark.structural_tags(wanted, self._vocabulary.table.special))
        return text


class LlguidanceGrammar:
    """As `asyncengine.grammar.protocol.Grammar`."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, end_token_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._lock = threading.Lock()
        # Where the model has no end token the library makes one up, which then must not be drawn.
        not_ends = [end for end in tokenizer.eos_tokens if end not in end_token_ids]
        self._drawable = ~row_of(not_ends, num_words(tokenizer.vocab_size))
        self._has_ends = not not_ends
        self.end_token_ids = end_token_ids

    def matcher(self) -> LlguidanceMatcher:
        """As the protocol says."""
        with self._lock:
            return LlguidanceMatcher(self._matcher.deep_copy(), self._drawable, self._has_ends)


class LlguidanceMatcher:
    """As `asyncengine.grammar.protocol.Matcher`."""

    __slots__ = ("_drawable", "_has_ends", "_matcher", "_next")

    def __init__(self, matcher: LLMatcher, drawable: Int32, has_ends: bool) -> None:
        self._matcher = matcher
        self._drawable = drawable
        self._has_ends = has_ends
        self._next: Int32 | None = None  # a row that was computed ahead

    @property
    def finished(self) -> bool:
        """As the protocol says."""
        if self._matcher.is_stopped():
            return True
        if self._has_ends or not self._matcher.is_accepting():
            return False
        # Without an end token, a text that may end and cannot go on has ended; the mask tells whether it can.
        self._next = np.zeros_like(self._drawable)
        self._compute(self._next)
        return not self._next.any()

    @property
    def forces(self) -> bool:
        """As the protocol says. A token that has no rival leaves its first byte none either."""
        return bool(self._matcher.compute_ff_bytes())

    def fill(self, row: Int32) -> None:
        """As the protocol says."""
        if self._next is not None:
            computed, self._next = self._next, None
        elif len(row) == len(self._drawable):
            self._compute(row)
            return
        else:
            computed = np.zeros_like(self._drawable)
            self._compute(computed)
        size = min(len(row), len(computed))
        row[:size] = computed[:size]
        row[size:] = 0

    def accept(self, token_id: int) -> None:
        """As the protocol says."""
        self._next = None
        if not self._matcher.consume_token(token_id):
            raise ValueError(f"the grammar does not take token {token_id}: {_reason(self._matcher)}")

    def _compute(self, row: Int32) -> None:
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot go on: {_reason(self._matcher)}")
        if not self._has_ends:
            row &= self._drawable


def _reason(matcher: LLMatcher) -> str:
    return matcher.get_error().replace("<non-verbose/>", "").strip()


def _read(tokenizer_json: str, size: int, ends: list[int]) -> LLTokenizer:
    """A tokenizer as llguidance reads it, which knows SentencePiece's sign for a space only where it is replaced."""
    try:
        return LLTokenizer(tokenizer_json, n_vocab=size, eos_token=ends or None, slices=[])
    except ValueError:
        values = json.loads(tokenizer_json)
        decoder = values.get("decoder") or {}
        if decoder.get("type") != "Metaspace":
            raise
        replaced = {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
        values["decoder"] = {"type": "Sequence", "decoders": [replaced, {"type": "ByteFallback"}, {"type": "Fuse"}]}
        return LLTokenizer(json.dumps(values), n_vocab=size, eos_token=ends or None, slices=[])


class _Read:
    """Tokens that llguidance has read from a tokenizer's JSON, as they are meant here.

    By itself it takes every added token like ``<this>`` for special, and finds special tokens in the text that a
    grammar forces, which the grammar then does not take.
    """

    def __init__(self, read: LLTokenizer, table: TokenTable, ends: list[int]) -> None:
        texts = set(table.added.values()) - set(ends)
        ids = range(read.vocab_size)
        self.tokens = [read.decode_bytes([token_id]) for token_id in ids]
        self.special_token_ids = [i for i in ids if read.is_special_token(i) and i not in texts]
        self.eos_token_id = read.eos_token
        self.bos_token_id = None
        self._read = read
        names = sorted((name.encode() for name in table.special if name), key=len, reverse=True)
        self._special = re.compile(b"|".join(map(re.escape, names)) or b"(?!)")

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text. That of a special token is spelled by others."""
        ids: list[int] = []
        begin = 0
        for special in self._special.finditer(text):
            ids += self._read.tokenize_bytes(text[begin : special.start()])
            ids += self._read.greedy_tokenize(special[0].decode())
            begin = special.end()
        return ids + self._read.tokenize_bytes(text[begin:])


class _Bytes:
    """Tokens that are given as bytes, in the way that llguidance asks for them."""

    def __init__(self, tokens: tuple[bytes, ...], special: list[int], ends: list[int]) -> None:
        self.tokens = list(tokens)
        self.special_token_ids = special
        self.eos_token_id = ends[0] if ends else special[0] if special else len(tokens) - 1
        self.bos_token_id = None
        self._ids = {token: index for index, token in reversed(list(enumerate(tokens)))}

    def __call__(self, text: bytes) -> list[int]:
        return [self._ids[bytes([byte])] for byte in text if bytes([byte]) in self._ids]
