from __future__ import annotations

from typing import Any

import pytest

from tests.server.serving import USER, error, served

pytestmark = pytest.mark.loops("either")


async def test_tokens_of_a_prompt_and_back() -> None:
    async with served() as client:
        found = (await client.post("/tokenize", json={"prompt": "héllo", "return_token_strs": True})).json()
        assert found["tokens"] == list("héllo".encode()) and found["count"] == 6
        assert found["max_model_len"] == 4096 and found["token_strs"][0] == "h"
        back = await client.post("/detokenize", json={"tokens": found["tokens"]})
        assert back.json() == {"prompt": "héllo"}


async def test_tokens_of_a_conversation_are_those_of_its_template() -> None:
    async with served() as client:
        found = (await client.post("/tokenize", json={"messages": USER})).json()
        assert bytes(found["tokens"]) == b"user: hello\nassistant: "


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": False}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [104, 257]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1 << 40]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_what_is_wrong_is_said_by_name(path: str, body: Any, param: str) -> None:
    async with served() as client:
        refused = await client.post(path, json=body)
        assert refused.status_code == 400 and error(refused)["param"] == param, refused.text
