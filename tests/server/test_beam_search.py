"""Beam searches over HTTP, by the names of transformers and by vLLM's."""

from __future__ import annotations

from typing import Any

import pytest

from asyncengine import GenerationConfig
from tests.server.serving import completion, echo_engine, error, events, served

pytestmark = [pytest.mark.loops("either"), pytest.mark.usefixtures("one_torch_thread")]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 3, "n": 3, "length_penalty": 2.0, "early_stopping": "never"},
        {"use_beam_search": True, "n": 3, "length_penalty": 2.0, "early_stopping": "never", "temperature": 0},
    ],
    ids=["num_beams", "use_beam_search"],
)
async def test_choices_are_what_the_engine_finds_best_first(fields: dict[str, Any]) -> None:
    engine = echo_engine()
    config = GenerationConfig(num_beams=3, n=3, length_penalty=2.0, early_stopping="never", max_tokens=9)
    async with served(engine) as client:
        expected = [output.text for output in (await engine.generate("some text", config)).outputs]
        assert len(set(expected)) == 3
        body = completion("some text", max_tokens=9, **fields)
        found = (await client.post("/v1/completions", json=body)).json()
        assert [choice["text"] for choice in found["choices"]] == expected
        chunks = events((await client.post("/v1/completions", json=body | {"stream": True})).text)
        texts = [(choice["index"], choice["text"]) for chunk in chunks for choice in chunk["choices"] if choice["text"]]
        assert texts == list(enumerate(expected))
        chat = {"messages": [{"role": "user", "content": "some text"}], "max_tokens": 9, **fields}
        found = (await client.post("/v1/chat/completions", json=chat)).json()
        contents = [choice["message"]["content"] for choice in found["choices"]]
        assert len(set(contents)) == 3
        ranked = await engine.chat(chat["messages"], config)
        assert contents == [output.text for output in ranked.outputs]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 65}, "num_beams"),
        ({"num_beams": 9}, "num_beams"),
        ({"num_beams": 2, "n": 3}, "n"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "n": 2, "top_p": 0.5}, "top_p"),
        ({"num_beams": 2, "stop": "x"}, "stop"),
        ({"num_beams": 2, "length_penalty": 6}, "length_penalty"),
        ({"num_beams": 2, "early_stopping": "sometimes"}, "early_stopping"),
        ({"num_beams": "two"}, "num_beams"),
        ({"use_beam_search": True}, "n"),
        ({"use_beam_search": True, "num_beams": 1, "n": 2}, "num_beams"),
    ],
    ids=str,
)
async def test_what_is_wrong_is_a_400_that_names_it(fields: dict[str, Any], param: str) -> None:
    async with served(echo_engine(max_num_sequence=8)) as client:
        response = await client.post("/v1/completions", json=completion("text", **fields))
        assert response.status_code == 400
        assert error(response)["param"] == param


async def test_what_says_how_to_search_changes_nothing_without_a_search() -> None:
    """vLLM's clients send it along."""
    async with served() as client:
        body = completion("text", length_penalty=1.0, early_stopping=False, use_beam_search=False)
        found = (await client.post("/v1/completions", json=body)).json()
        assert found["choices"][0]["text"] == "text"
