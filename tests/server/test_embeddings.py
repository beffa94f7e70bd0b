from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.testing import ScriptedLoader
from tests.server.serving import MODEL, Later, error, served
from tests.server.test_clients import clients

openai = Later("openai")

pytestmark = pytest.mark.loops("either")

URL = "/v1/embeddings"


def asked(text: Any = "ab", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": text, **fields}


async def test_one_text_and_many_as_text_and_as_token_ids() -> None:
    async with served() as client:
        for given, count in (("ab", 1), ([97, 98], 1), (["ab", "b"], 2), ([[97, 98], [98]], 2)):
            answer = await client.post(URL, json=asked(given, normalize=False, user="me"))
            assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "user"
            found = answer.json()
            assert (found["object"], found["model"]) == ("list", MODEL)
            assert [(item["index"], item["object"]) for item in found["data"]] == [
                (index, "embedding") for index in range(count)
            ]
            assert found["data"][0]["embedding"] == [97.5, 0.5, 1.0]  # the means of token id, position and one
            assert found["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), 2 + (count > 1))


async def test_fields_say_how() -> None:
    async with served() as client:

        async def vector(**fields: Any) -> Any:
            return (await client.post(URL, json=asked(**fields))).json()["data"][0]["embedding"]

        assert await vector(pooling="last", normalize=False) == [98.0, 1.0, 1.0]
        assert await vector(dimensions=2, normalize=False) == [97.5, 0.5]
        assert await vector(truncate_prompt_tokens=1, pooling="last", normalize=False) == [97.0, 0.0, 1.0]
        assert np.linalg.norm(await vector()) == pytest.approx(1.0)
        plain, packed = await vector(), base64.b64decode(await vector(encoding_format="base64"))
        assert np.frombuffer(packed, "<f4").tolist() == pytest.approx(plain)


async def test_what_is_wrong_is_refused_by_name() -> None:
    wrong: list[tuple[Any, str]] = [
        (asked([]), "input"), (asked(""), "input"), (asked(["a", ""]), "input"), (asked([1, "a"]), "input"),
        (asked([99999]), "input"), (asked(["a"] * 2049), "input"), (asked({"a": 1}), "input"), ({}, "input"),
        (asked(encoding_format="int8"), "encoding_format"), (asked(dimensions=4), "dimensions"),
        (asked(dimensions=0), "dimensions"), (asked(pooling="cls"), "pooling"), (asked(messages=[]), "messages"),
        (asked(prompt_name="query"), "prompt_name"), (asked(truncate_prompt_tokens=10**6), "truncate_prompt_tokens"),
        (asked(truncate_prompt_tokens=0), "truncate_prompt_tokens"), (asked(colour="red"), "colour"),
    ]  # fmt: skip
    async with served() as client:
        for body, param in wrong:
            refused = await client.post(URL, json=body)
            assert refused.status_code == 400 and error(refused)["param"] == param, (body, refused.text)
        assert (await client.post(URL, json=asked(model="other"))).status_code == 404


async def test_a_model_that_cannot_embed_says_so() -> None:
    loader = ScriptedLoader()
    loader.hidden_size = None
    async with served(AsyncEngine(EngineConfig(MODEL), loader=loader)) as client:
        refused = await client.post(URL, json=asked([1, 2]))
        assert refused.status_code == 400 and "cannot embed" in error(refused)["message"]


async def test_openai_asks_for_base64_and_reads_it() -> None:
    async with clients() as (client, options, _):
        # Not strictly: the client's own type has no place for the base64 that it asks for.
        async with openai.AsyncOpenAI(**options | {"_strict_response_validation": False}) as lenient:
            found = await lenient.embeddings.create(model=MODEL, input=["ab", "b"])
        assert [len(item.embedding) for item in found.data] == [3, 3]
        assert np.linalg.norm(found.data[0].embedding) == pytest.approx(1.0) and found.usage.total_tokens == 3
        short = await client.embeddings.create(model=MODEL, input="ab", dimensions=2, encoding_format="float")
        assert len(short.data[0].embedding) == 2
