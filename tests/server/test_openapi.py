from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from asyncengine.server import create_app
from tests.server.serving import AUTH, KEY, chat, completion, echo_engine, served

pytestmark = pytest.mark.loops("either")


async def test_every_route_is_in_the_document() -> None:
    app = create_app(echo_engine(), api_key=KEY, admin=True)
    async with served(api_key=KEY, admin=True) as client:
        found = (await client.get("/openapi.json", headers=AUTH)).json()
    documented = {(path, method) for path, methods in found["paths"].items() for method in methods}
    there = {
        (route.path.replace(":path", ""), method.lower())  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    assert documented == there - {("/ui", "get"), ("/openapi.json", "get")}


async def test_what_goes_in_and_out_is_as_the_document_says() -> None:
    async with served() as client:
        found: dict[str, Any] = (await client.get("/openapi.json")).json()
        assert not [path for path in found["paths"] if path.startswith("/admin")]

        def check(name: str, value: Any) -> bool:
            schema = {"$ref": f"#/components/schemas/{name}", "components": found["components"]}
            return bool(jsonschema.Draft202012Validator(schema).is_valid(value))

        for path, body, shape, answer in (
            ("/v1/chat/completions", chat(user="a", stop=None), "ChatBody", "ChatCompletion"),
            ("/v1/completions", completion([1, 2], logprobs=1), "CompletionBody", "Completion"),
            ("/v1/embeddings", {"input": ["a", "b"]}, "EmbeddingsBody", "Embeddings"),
        ):
            assert check(shape, body)
            assert not check(shape, body | {"colour": "red"}) and not check(shape, body | {"priority": "two"})
            assert check(answer, (await client.post(path, json=body)).json())
            assert check("Error", (await client.post(path, json={"colour": "red"})).json())
