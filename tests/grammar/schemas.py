"""Schemas of every kind that a back end has to get right, by name."""

from __future__ import annotations

from typing import Any


def obj(properties: dict[str, Any], *, required: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """An object with these properties, all of them required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
        **more,
    }


INTEGER: dict[str, Any] = {"type": "integer", "minimum": -999, "maximum": 999}
WORD: dict[str, Any] = {"type": "string", "maxLength": 6}

SCHEMAS: dict[str, Any] = {
    # numbers and bounds
    "integer": {"type": "integer", "minimum": -(10**6), "maximum": 10**6},
    "natural": {"type": "integer", "minimum": 0, "maximum": 100000},
    "minimum": {"type": "integer", "minimum": 17, "maximum": 10**5},
    "maximum": {"type": "integer", "maximum": -3, "minimum": -(10**5)},
    "range": {"type": "integer", "minimum": -12, "maximum": 345},
    "exclusive": {"type": "integer", "exclusiveMinimum": 4, "exclusiveMaximum": 8},
    "one integer": {"type": "integer", "minimum": 7, "maximum": 7},
    "number range": {"type": "number", "minimum": 0, "maximum": 1},
    "negative number": {"type": "number", "minimum": -2.5, "exclusiveMaximum": 0},
    "exclusive numbers": {"type": "number", "exclusiveMinimum": 0.5, "exclusiveMaximum": 0.75},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    "multiple of a fraction": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 100},
    "number": obj({"x": {"type": "number", "minimum": -1000, "maximum": 1000}}),
    # constants and enumerations
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "const string": {"const": "exactly this"},
    "const object": {"const": {"a": [1, 2, {"b": None}]}},
    "enum of strings": {"enum": ["red", "green", "blue"]},
    "enum of many types": {"enum": [1, "one", None, True, [1], {"one": 1}]},
    "typed enum": {"type": "string", "enum": ["a", "ab", "abc"]},
    "enum with quotes": {"enum": ['say "hi"', "back\\slash", "tab\there", "line\nbreak"]},
    # strings
    "short string": {"type": "string", "maxLength": 5},
    "long string": {"type": "string", "minLength": 12, "maxLength": 20},
    "one character": {"type": "string", "minLength": 1, "maxLength": 1},
    "empty string": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "pattern with alternatives": {"type": "string", "pattern": "^(cat|dog)s?( and (cat|dog)s?){0,2}$"},
    "pattern with classes": {"type": "string", "pattern": r"^\d{3}\s\w{1,4}$"},
    "pattern of an address": {"type": "string", "pattern": r"^[a-z]{1,6}@[a-z]{1,6}\.(org|net)$"},
    # formats
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    # arrays
    "array": {"type": "array", "items": INTEGER, "maxItems": 5},
    "array of exactly three": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3},
    "array of at least two": {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 2, "maxItems": 4},
    "empty array": {"type": "array", "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [INTEGER, WORD, {"type": "null"}], "items": False, "minItems": 3},
    "tuple with a tail": {
        "type": "array", "prefixItems": [{"const": "head"}], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4,
    },
    "nested arrays": {
        "type": "array", "items": {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 2}, "maxItems": 3,
    },
    "array of objects": {"type": "array", "items": obj({"id": INTEGER}), "minItems": 1, "maxItems": 2},
    # objects
    "object": obj({"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 150}}),
    "optional properties": obj({"a": INTEGER, "b": INTEGER, "c": INTEGER}, required=["b"]),
    "all optional": obj({"a": {"type": "null"}, "b": {"type": "null"}}, required=[]),
    "empty object": obj({}),
    "nested objects": obj({"a": obj({"b": obj({"c": obj({"d": {"type": "boolean"}})})})}),
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    "map of bounded size": {
        "type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1, "maxProperties": 2,
    },
    "map with patterns": {
        "type": "object", "patternProperties": {"^n_[a-z]{1,3}$": INTEGER, "^s_[a-z]{1,3}$": WORD},
        "additionalProperties": False, "maxProperties": 3,
    },
    "property names that need escapes": obj({'a "b"': {"type": "null"}, "c\\d": {"type": "null"}, "e f": {"const": 1}}),
    # combinations
    "anyOf": {"anyOf": [INTEGER, {"type": "null"}, {"const": "none"}]},
    "anyOf objects": {"anyOf": [obj({"circle": INTEGER}), obj({"square": WORD})]},
    "oneOf": {"oneOf": [obj({"kind": {"const": "a"}, "x": INTEGER}), obj({"kind": {"const": "b"}, "y": WORD})]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 1000}]},
    "several types": {"type": ["integer", "null", "boolean"], "minimum": 0, "maximum": 5000},
    "nullable": obj({"x": {"type": ["string", "null"], "maxLength": 4}}),
    "anyOf inside": obj({
        "value": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": INTEGER, "maxItems": 2}]},
    }),
    # references
    "ref": {"$ref": "#/$defs/point", "$defs": {"point": obj({"x": INTEGER, "y": INTEGER})}},
    "nested refs": {
        "$defs": {"id": {"type": "string", "pattern": "^[0-9a-f]{4}$"}, "edge": obj({"to": {"$ref": "#/$defs/id"}})},
        **obj({"from": {"$ref": "#/$defs/id"}, "edges": {
            "type": "array", "items": {"$ref": "#/$defs/edge"}, "maxItems": 2,
        }}),
    },
    "recursive list": {
        "$ref": "#/$defs/list",
        "$defs": {"list": {"anyOf": [
            {"type": "null"}, obj({"head": {"enum": [0, 1]}, "tail": {"$ref": "#/$defs/list"}}),
        ]}},
    },
    "recursive tree": {
        "$ref": "#/$defs/node",
        "$defs": {"node": obj({"v": {"enum": [0, 1]}, "kids": {
            "type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1,
        }})},
    },
    "mutually recursive": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": obj({"b": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/b"}]}}),
            "b": obj({"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}),
        },
    },
    "definitions of old": {"definitions": {"w": WORD}, **obj({"w": {"$ref": "#/definitions/w"}})},
    "root reference": {
        "type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"], "additionalProperties": False,
    },
    # unicode
    "unicode enum": {"enum": ["Zürich", "東京", "🙂", "naïve café"]},
    "unicode keys": obj({"größe": INTEGER, "名前": {"enum": ["花子", "太郎"]}}),
    "unicode pattern": {"type": "string", "pattern": "^[äöüß]{2,4}$"},
    # things of everyday use
    "person": obj({
        "name": WORD, "email": {"type": "string", "pattern": r"^[a-z]{1,8}@x\.org$"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        "address": obj({"city": WORD, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}),
    }),
    "tool call": obj({
        "name": {"const": "get_weather"}, "arguments": obj({"city": WORD, "unit": {"enum": ["C", "F"]}}),
    }),
    "with titles and descriptions": {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", "description": "D",
        **obj({"a": {"title": "A", "description": "of a", "default": 3, "examples": [1], **INTEGER}}),
    },
}  # fmt: skip
