"""Response formats in the terms of llguidance: its options for JSON, and its dialect of Lark for tagged text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from asyncengine.grammar.schema import EXACT, is_double, large_numbers
from asyncengine.response_format import JsonObject, JsonSchema, StructuralTags, Whitespace

_JSON_OPTIONS: dict[Whitespace, dict[str, object]] = {
    "none": {"whitespace_flexible": False},
    "bounded": {"whitespace_pattern": r"( |\n {0,16})"},
    "any": {"whitespace_flexible": True},
}
_LARGEST = 2**63 - 1
_LEXEME = re.compile(r'"(?:\\.|[^"\\])*"|//.*|/(?:\\.|[^/\\])+/|(<[^<>\s]+>)')
"""A string, a comment, a regular expression, or the name of a token."""


def json_schema(schema: str, whitespace: Whitespace) -> str:
    """A schema's JSON with the library's options in it.

    Raises:
        ValueError: Nothing matches it, or a number in it would become another.
    """
    value = json.loads(schema)
    if isinstance(value, bool):
        if not value:
            raise ValueError("the schema is false, which nothing matches")
        value = {}
    for node, keyword, number in large_numbers(value):
        if not _keeps(node, keyword, number):
            raise ValueError(
                f"llguidance would take another number for {keyword} {number}; allowed: below 2**53, {EXACT}"
            )
    return json.dumps({**value, "x-guidance": _JSON_OPTIONS[whitespace]})


def _keeps(node: Mapping[str, object], keyword: str, number: float) -> bool:
    """Whether the library, which reads numbers as doubles and makes ranges of 64-bit integers, keeps it.

    It does not come back from a range whose ends are both the smallest such integer, or less.
    """
    if abs(number) >= _LARGEST:
        return keyword == "maximum" and number > 0 and node.get("type") == "integer"  # its integers end there anyway
    if isinstance(number, float) and node.get("type") == "number":
        return True
    return "exclusive" not in keyword and is_double(number)  # to an exclusive one it adds 1


def json_of(wanted: JsonObject | JsonSchema) -> str:
    """The schema of a JSON format, with the library's options in it."""
    schema = wanted.schema if isinstance(wanted, JsonSchema) else '{"type": "object"}'
    return json_schema(schema, wanted.whitespace)


def with_ids(grammar: str, tokens: Mapping[str, int]) -> str:
    """A grammar in which the names of some tokens have become their ids; one in GBNF as it is."""
    if not tokens or "::=" in grammar:
        return grammar
    return _LEXEME.sub(lambda found: f"<[{tokens[found[1]]}]>" if found[1] in tokens else found[0], grammar)


def structural_tags(wanted: StructuralTags, special: Mapping[str, int]) -> str:
    """Free text in which a trigger begins a tagged piece.

    A trigger ends the free text before it as soon as it appears (a lazy lexeme), so that no free text contains one.
    Special tokens have no text; a trigger may begin with one, and beginnings and ends may have them anywhere.

    Args:
        wanted: The tags.
        special: Special tokens to their ids.

    Raises:
        ValueError: A trigger has a special token that is not its beginning.
    """
    assert isinstance(wanted.triggers, tuple) and isinstance(wanted.tags, tuple)
    rules = [f"start: {_start(wanted)}", "tags: " + " | ".join(f"tag_{t}" for t in range(len(wanted.triggers)))]
    if wanted.free_text:
        rules.append("rest: FREE")
    if wanted.otherwise is not None:
        rules.append(f"otherwise: %json {json_of(wanted.otherwise)}")
    terminals = ["FREE: /(.|\\n)*/"]
    taken: set[int] = set()
    for number, trigger in enumerate(wanted.triggers):
        pieces = _pieces(trigger, special)
        if any(not isinstance(piece, str) for piece in pieces[1:]):
            raise ValueError(f"trigger {trigger!r} has a special token that is not its beginning")
        first = pieces[0]
        head = "" if isinstance(first, str) else first_special(trigger, special)
        until = trigger if isinstance(first, str) else head
        bodies = []
        for index, tag in enumerate(wanted.tags):
            if index in taken or not tag.begin.startswith(trigger):
                continue
            taken.add(index)
            schema = f"%json {json_schema(tag.schema, wanted.whitespace)}"
            parts = [*_terms(tag.begin[len(until) :], special), schema, *_terms(tag.end, special)]
            bodies.append(" ".join(parts))
        if not bodies:
            raise ValueError(f"no tag begins with trigger {trigger!r}")
        if not wanted.free_text:
            begin = json.dumps(trigger) if isinstance(first, str) else f"<[{first}]>"
        elif isinstance(first, str):
            rules.append(f"trigger_{number}[lazy]: FREE {json.dumps(trigger)}")
            begin = f"trigger_{number}"
        else:
            begin = f"FREE <[{first}]>"
        for index, body in enumerate(bodies):
            rules.append(f"tag_{number}_{index}: {body}")
        rules.append(f"tag_{number}: {begin} (" + " | ".join(f"tag_{number}_{i}" for i in range(len(bodies))) + ")")
    return "\n".join(["%llguidance {}", *rules, *(terminals if wanted.free_text else ())]) + "\n"


def _start(wanted: StructuralTags) -> str:
    if wanted.otherwise is not None:
        return ("tags" if wanted.stop_after_first else "tags+") + " | otherwise"
    rest = " rest" if wanted.free_text else ""
    if not wanted.stop_after_first:
        return ("tags+" if wanted.at_least_one else "tags*") + rest
    if wanted.at_least_one:
        return "tags"
    return "tags |" + rest if rest else "tags?"


def first_special(text: str, special: Mapping[str, int]) -> str:
    """The special token that a text begins with."""
    return max((token for token in special if token and text.startswith(token)), key=len)


def _pieces(text: str, special: Mapping[str, int]) -> list[str | int]:
    """A text cut at its special tokens, which become their ids."""
    known = sorted((token for token in special if token), key=len, reverse=True)
    if not known:
        return [text]
    parts = re.split("(" + "|".join(map(re.escape, known)) + ")", text)
    return [special.get(part, part) for part in parts if part]


def _terms(text: str, special: Mapping[str, int]) -> list[str]:
    return [json.dumps(piece) if isinstance(piece, str) else f"<[{piece}]>" for piece in _pieces(text, special)]
