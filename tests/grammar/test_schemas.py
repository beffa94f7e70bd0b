"""Whatever a model with random weights is made to write, `jsonschema` accepts it, or `max_tokens` has cut it."""

from __future__ import annotations

import json

import jsonschema
import pytest

from asyncengine import AsyncEngine, FinishReason, GenerationConfig
from asyncengine.response_format import JsonObject, JsonSchema, Whitespace
from tests.grammar.schemas import SCHEMAS

pytestmark = pytest.mark.loops("either")

SEEDS = 5
CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER
# A model that has learnt nothing ends its texts no more often than it does anything else; this makes it want to.
WISH_TO_END = {7: 3.0, 66: 2.0, 98: 3.0}  # the tokens '"', ']' and '}'


def is_prefix_of_json(text: str) -> bool:
    """Whether some way of closing what is open makes it JSON."""
    closers: list[str] = []
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            closers.append({"[": "]", "{": "}"}[character])
        elif character in "]}" and (not closers or closers.pop() != character):
            return False
    rest = "".join(reversed(closers))
    inside = ["", "0", "0000", "n", "\\", '"', '0"', '00"', '000"', '0000"', 'n"', '":0', ":0", "0:0", '"":0', "null"]
    inside += [word[i:] for word in ("true", "false", "null") for i in range(1, len(word))]
    tails = [a + b for a in inside for b in ("", '"', ":0", '":0')]
    for tail in tails:
        try:
            json.loads(text + tail + rest, strict=False)
        except ValueError:
            continue
        return True
    return False


async def test_every_document_is_valid_or_cut_by_max_tokens(engine: AsyncEngine) -> None:
    assert len(SCHEMAS) >= 60
    names = [name for name in SCHEMAS for _ in range(SEEDS)]
    configs = [
        GenerationConfig(
            temperature=1.0,
            seed=seed,
            max_tokens=150,
            logit_bias=WISH_TO_END,
            response_format=JsonSchema(SCHEMAS[name]),
        )
        for name in SCHEMAS
        for seed in range(SEEDS)
    ]
    results = await engine.generate_many(["x"] * len(configs), configs)
    assert engine.metrics().kv_blocks_used == 0
    complete = set()
    for name, result in zip(names, results, strict=True):
        text = result.text
        if result.finish_reason is FinishReason.LENGTH:
            assert len(result.token_ids) == 150
            assert is_prefix_of_json(text.rstrip("\ufffd")), (name, text)
            continue
        assert result.finish_reason is FinishReason.STOP
        validator = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=CHECKER)
        errors = list(validator.iter_errors(json.loads(text)))
        assert not errors, (name, text, errors)
        complete.add(name)
    assert complete == set(SCHEMAS), set(SCHEMAS) - complete


@pytest.mark.parametrize("whitespace", ["none", "bounded"])
async def test_white_space_is_bounded(engine: AsyncEngine, whitespace: Whitespace) -> None:
    space = {226: 100.0, 204: 100.0}  # ' ' and a line break
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    config = GenerationConfig(
        temperature=0, max_tokens=200, logit_bias=space, response_format=JsonSchema(schema, whitespace)
    )
    result = await engine.generate("x", config)
    assert result.finish_reason is FinishReason.STOP
    assert json.loads(result.text) == {"a": 1}
    if whitespace == "none":
        assert result.text == '{"a":1}'
    longest = await engine.generate("x", config.replace(response_format=JsonSchema(schema, "any")))
    assert longest.finish_reason is FinishReason.LENGTH, "the test would not notice unbounded white space"


async def test_any_object_is_an_object(engine: AsyncEngine) -> None:
    config = GenerationConfig(max_tokens=120, logit_bias=WISH_TO_END, response_format=JsonObject(), n=16, seed=5)
    result = await engine.generate("x", config)
    done = [branch for branch in result.outputs if branch.finish_reason is FinishReason.STOP]
    assert len(done) >= 4
    assert all(isinstance(json.loads(branch.text, strict=True), dict) for branch in done)
