"""What stands in a JSON schema, for libraries that do not keep all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

EXACT = 2**53
"""Beyond it a double does not have every integer."""
_BOUNDS = frozenset({"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"})
_SCHEMAS_BY_NAME = frozenset({"$defs", "definitions", "patternProperties", "properties"})
_VALUES = frozenset({"const", "default", "enum", "examples"})


def nodes(schema: object) -> Iterator[dict[str, Any]]:
    """The schema and those within it. Names of properties and values are none."""
    rest = [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, list):
            rest += node
        if not isinstance(node, dict):
            continue
        yield node
        for key, value in node.items():
            if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
                rest += value.values()
            elif key not in _VALUES:
                rest.append(value)


def large_numbers(schema: object) -> Iterator[tuple[dict[str, Any], str, int | float]]:
    """Each bound and each integer of a ``const`` or ``enum`` from 2**53 on, with its node and keyword."""
    for node in nodes(schema):
        for key, value in node.items():
            kinds: tuple[type, ...] = (int, float) if key in _BOUNDS else (int,)
            for number in _numbers(value) if key in _BOUNDS or key in ("const", "enum") else ():
                if isinstance(number, kinds) and abs(number) >= EXACT:
                    yield node, key, number


def is_double(number: float) -> bool:
    """Whether a double has it."""
    try:
        return int(float(number)) == number
    except OverflowError:
        return False


def _numbers(value: object) -> Iterator[int | float]:
    """Those in a value of JSON."""
    rest = [value]
    while rest:
        part = rest.pop()
        if isinstance(part, (int, float)):
            yield part
        elif isinstance(part, (list, dict)):
            rest += part.values() if isinstance(part, dict) else part
