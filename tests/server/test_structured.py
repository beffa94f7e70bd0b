"""Answers that must look like something, over HTTP: the embedded model knows nothing of JSON, and cannot help it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import jsonschema
import pytest

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.server import create_app
from tests.server.serving import (
    MODEL,
    Later,
    chat,
    client_of,
    completion,
    error,
    events,
    listening,
    scripted_engine,
    served,
)

openai = Later("openai")
pydantic = pytest.importorskip("pydantic")
pytestmark = [pytest.mark.loops("either"), pytest.mark.usefixtures("one_torch_thread")]

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Who are you?"}], "model": "tiny", "max_tokens": 200}


class Pet(pydantic.BaseModel, extra="forbid"):  # type: ignore[name-defined, misc]
    kind: Literal["cat", "dog"]
    age: int = pydantic.Field(ge=0, le=30)


class Person(pydantic.BaseModel, extra="forbid"):  # type: ignore[name-defined, misc]
    name: str = pydantic.Field(max_length=8)
    pets: list[Pet] = pydantic.Field(max_length=2)


SCHEMA = Person.model_json_schema()
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "person", "strict": True, "schema": SCHEMA},
    "whitespace": "none",
}


def tiny() -> AsyncEngine:
    return AsyncEngine(EngineConfig("tiny", mode="local"))


@asynccontextmanager
async def strict_client() -> AsyncIterator[Any]:
    async with tiny() as engine, listening(create_app(engine)) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", _strict_response_validation=True) as client:
            yield client


async def test_openai_parses_what_a_schema_allows() -> None:
    async with strict_client() as client:
        found = await client.chat.completions.parse(**ASK, response_format=Person, n=6, seed=1, temperature=1)
        people = [choice.message.parsed for choice in found.choices]
        assert all(isinstance(person, Person) for person in people)
        assert len({person.model_dump_json() for person in people}) > 1, "one text only: the test would notice little"
        async with client.chat.completions.stream(**ASK, response_format=Person, seed=2) as stream:
            final = await stream.get_final_completion()
        assert isinstance(final.choices[0].message.parsed, Person)
        asked = {"model": "tiny", "input": "Who are you?", "max_output_tokens": 200}
        response = await client.responses.parse(**asked, text_format=Person, temperature=0)
        assert isinstance(response.output_parsed, Person)
        async with client.responses.stream(**asked, text_format=Person, temperature=0) as stream:
            assert isinstance((await stream.get_final_response()).output_parsed, Person)


async def test_every_format_is_honoured_whole_and_streamed_and_so_are_lists_of_tokens() -> None:
    tags = {
        "type": "structural_tag",
        "structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}],
        "triggers": ["<a>"],
        "free_text": False,
        "at_least_one": True,
        "stop_after_first": True,
    }
    formats: list[tuple[dict[str, Any], Any]] = [
        (FORMAT, lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
        ({"type": "json_object", "whitespace": "none"}, lambda text: text.startswith("{") or pytest.fail(text)),
        ({"type": "regex", "regex": "[A-F]{3}-[0-9]{2}"}, lambda text: re.fullmatch("[A-F]{3}-[0-9]{2}", text)[0]),
        ({"type": "choice", "choice": ["yes", "no", "maybe"]}, ["yes", "no", "maybe"].index),
        ({"type": "grammar", "grammar": 'start: "a" B+\nB: "b" | "c"\n'}, lambda text: re.match("a[bc]+", text)[0]),
        (tags, lambda text: Person.model_validate_json(text.removeprefix("<a>").removesuffix("</a>"))),
    ]
    async with served(tiny()) as client:
        for wanted, check in formats:
            limit = 30 if wanted["type"] == "json_object" else 200  # which any number of keys may be in
            body = {
                "prompt": "Once",
                "response_format": wanted,
                "max_tokens": limit,
                "seed": 5,
                "n": 2,
                "temperature": 1,
            }
            for choice in (await client.post("/v1/completions", json=body)).json()["choices"]:
                check(choice["text"])
            streamed = ASK | {
                "max_tokens": limit,
                "response_format": wanted,
                "seed": 5,
                "stream": True,
                "temperature": 1,
            }
            chunks = events((await client.post("/v1/chat/completions", json=streamed)).text)
            check("".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]))

        tokens = (await client.post("/tokenize", json={"prompt": "yes no"})).json()["tokens"]
        body = ASK | {"max_tokens": 6, "allowed_token_ids": tokens, "ignore_eos": True, "min_tokens": 6}
        text = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]["content"]
        parts = (await client.post("/detokenize", json={"tokens": tokens, "skip_special_tokens": True})).json()[
            "prompt"
        ]
        assert text and set(text) <= set(parts)
        greedy = {"prompt": "Once upon a", "temperature": 0, "max_tokens": 3}
        before = (await client.post("/v1/completions", json=greedy)).json()["choices"][0]["text"]
        for bad in (
            [before.split()[0]],
            [[*(await client.post("/tokenize", json={"prompt": before})).json()["tokens"][1:2]]],
        ):
            after = (await client.post("/v1/completions", json=greedy | {"bad_words": bad})).json()["choices"][0][
                "text"
            ]
            assert not after.startswith(before.split()[0]) and after != before


WRONG: list[tuple[Any, str]] = [
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}, "nothing"),
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}, "not"),
    ({"type": "json_schema", "json_schema": {"name": "x"}}, "schema is missing"),
    ({"type": "json_shema"}, "did you mean 'json_schema'?"),
    ({"type": "regex", "regex": "(a"}, "unclosed group"),
    ({"type": "grammar", "grammar": "start: nowhere"}, "nowhere"),
    ({"type": "choice", "choice": []}, "at least one"),
    ({}, "type"),
]


async def test_what_cannot_be_is_a_400_by_name() -> None:
    async with served(scripted_engine("Hi!")) as client:
        for wanted, part in WRONG:
            for stream in (False, True):
                for path, body in (
                    ("/v1/chat/completions", chat(response_format=wanted, stream=stream)),
                    ("/v1/completions", completion(response_format=wanted, stream=stream)),
                ):
                    refused = await client.post(path, json=body)
                    assert refused.status_code == 400, refused.text
                    assert error(refused)["param"] == "response_format" and part in error(refused)["message"]
        flat = {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}
        refused = await client.post("/v1/responses", json={"input": "hi", "text": {"format": flat}})
        assert error(refused)["param"] == "text.format" and "text.format" in error(refused)["message"]
        for name in ("guided_json", "structured_outputs"):
            refused = await client.post("/v1/chat/completions", json=chat(**{name: {}}))
            assert refused.status_code == 400 and "use response_format" in error(refused)["message"]
        for name, value in (("allowed_token_ids", []), ("allowed_token_ids", [10**6]), ("bad_words", [""])):
            refused = await client.post("/v1/completions", json=completion(**{name: value}))
            assert refused.status_code == 400 and error(refused)["param"] == name
        assert (await client.post("/v1/chat/completions", json=chat(response_format={"type": "text"}))).is_success


async def test_an_engine_behind_the_server_keeps_to_the_schema_itself() -> None:
    engine = scripted_engine('{"kind": "cat", "age": 3}')
    async with engine, client_of(create_app(engine)) as client:
        schema = {"type": "json_schema", "json_schema": {"name": "pet", "schema": Pet.model_json_schema()}}
        kept = await client.post("/v1/chat/completions", json=chat(response_format=schema, model=MODEL))
        assert Pet.model_validate_json(kept.json()["choices"][0]["message"]["content"]).kind == "cat"
