from __future__ import annotations

import json
from typing import Any

import pytest

from asyncengine import InvalidRequestError
from asyncengine.response_format import (
    Choice,
    EbnfGrammar,
    JsonObject,
    JsonSchema,
    Regex,
    StructuralTag,
    StructuralTags,
    response_format,
)

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TAG = {"begin": "<fn=a>", "schema": SCHEMA, "end": "</fn>"}


@pytest.mark.parametrize(
    ("mapping", "format_"),
    [
        ({"type": "json_object"}, JsonObject()),
        ({"type": "json_object", "whitespace": "any"}, JsonObject("any")),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA}}, JsonSchema(SCHEMA)),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA, "name": "x", "strict": True}}, JsonSchema(SCHEMA)),
        ({"type": "regex", "regex": "a+"}, Regex("a+")),
        ({"type": "grammar", "grammar": "start: /a/"}, EbnfGrammar("start: /a/")),
        ({"type": "choice", "choice": ["a", "b"]}, Choice(("a", "b"))),
        (
            {"type": "structural_tag", "structures": [TAG], "triggers": ["<fn="]},
            StructuralTags([StructuralTag("<fn=a>", SCHEMA, "</fn>")], ["<fn="]),
        ),
        (
            {"type": "structural_tag", "structures": [TAG], "free_text": False, "at_least_one": True},
            StructuralTags([StructuralTag("<fn=a>", SCHEMA, "</fn>")], free_text=False, at_least_one=True),
        ),
        (
            {"type": "structural_tag", "structures": [TAG], "stop_after_first": True},
            StructuralTags([StructuralTag("<fn=a>", SCHEMA, "</fn>")], stop_after_first=True),
        ),
        ({"type": "text"}, None),
        (None, None),
    ],
)
def test_a_mapping_and_its_class_are_equal(mapping: Any, format_: Any) -> None:
    assert response_format(mapping) == format_
    assert hash(response_format(mapping)) == hash(format_)
    assert response_format(format_) == format_


def test_a_schema_is_the_same_as_mapping_and_as_text_and_keeps_the_order_of_its_keys() -> None:
    assert JsonSchema(json.dumps(SCHEMA)) == JsonSchema(SCHEMA)
    other = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
    assert JsonSchema(other) != JsonSchema(SCHEMA)


def test_a_pydantic_model_is_its_schema() -> None:
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Point", x=(int, ...), y=(int, ...))
    assert JsonSchema(model) == JsonSchema(model.model_json_schema())


def test_triggers_are_the_beginnings_where_none_are_given() -> None:
    tags = StructuralTags(
        [StructuralTag("<a>", True, ""), StructuralTag("<b>", True, ""), StructuralTag("<a>", {}, "")]
    )
    assert tags.triggers == ("<a>", "<b>")


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (3, ("response_format is 3", "mapping with 'type'", "JsonSchema")),
        ("json_object", ("response_format is 'json_object'",)),
        ({"type": "json"}, ("response_format.type is 'json'", "'json_object'")),
        ({"type": "json_shema"}, ("did you mean 'json_schema'?",)),
        ({"type": ["regex"]}, ("response_format.type is ['regex']",)),
        ({}, ("response_format.type is None",)),
        ({"type": "regex", "regx": "a"}, ("unknown key 'regx'", "did you mean 'regex'?")),
        ({"type": "regex"}, ("response_format.regex is missing",)),
        ({"type": "regex", "regex": ""}, ("response_format.regex is ''", "non-empty")),
        ({"type": "regex", "regex": 3}, ("response_format.regex is 3",)),
        ({"type": "grammar", "grammar": None}, ("response_format.grammar is None",)),
        ({"type": "choice", "choice": []}, ("choice is empty", "at least one")),
        ({"type": "choice", "choice": "ab"}, ("choice is 'ab'", "list of strings")),
        ({"type": "choice", "choice": ["a", ""]}, ("choice has ''",)),
        ({"type": "json_schema"}, ("json_schema is missing",)),
        ({"type": "json_schema", "json_schema": SCHEMA}, ("unknown key 'type'", "'schema'")),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, ("json_schema.schema is missing",)),
        ({"type": "json_schema", "json_schema": {"schema": 3}}, ("schema is 3",)),
        ({"type": "json_schema", "json_schema": {"schema": "{"}}, ("it is not JSON",)),
        ({"type": "json_schema", "json_schema": {"schema": {"a": {1, 2}}}}, ("cannot be written as JSON",)),
        ({"type": "json_schema", "json_schema": {"schema": {"a": float("nan")}}}, ("cannot be written as JSON",)),
        ({"type": "json_object", "whitespace": "some"}, ("whitespace is 'some'", "'none', 'bounded', 'any'")),
        ({"type": "structural_tag", "structures": []}, ("structures is []", "at least one")),
        ({"type": "structural_tag", "structures": [3]}, ("structures has 3",)),
        ({"type": "structural_tag", "structures": [{"begin": "<a>"}]}, ("structures.end is missing",)),
        ({"type": "structural_tag", "structures": [TAG], "triggers": ["<x"]}, ("begin '<fn=a>'", "'<x'")),
        ({"type": "structural_tag", "structures": [TAG], "free_text": 1}, ("free_text is 1", "True, False")),
        ({"type": "structural_tag", "structures": [TAG], "triggers": "<fn"}, ("triggers is '<fn'",)),
    ],
)
def test_a_mistake_is_named(value: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        response_format(value)
    for part in parts:
        assert part in str(caught.value)


def test_a_schema_that_refers_to_itself_as_an_object_is_refused() -> None:
    schema: dict[str, Any] = {}
    schema["properties"] = schema
    with pytest.raises(InvalidRequestError, match="cannot be written as JSON"):
        JsonSchema(schema)
