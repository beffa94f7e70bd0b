"""``suffix``: honoured by models that can fill a gap, refused by name for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers, processors

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.server.infilling import MARKS, around_gap
from asyncengine.server.refusal import Refusal
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.server.serving import MODEL, completion, error, served

pytestmark = pytest.mark.loops("either")

BEFORE, AFTER, MIDDLE = MARKS[0]


class CoderTokenizer(ByteTokenizer):
    """Bytes, and three of those that no UTF-8 has for the tokens of a coder."""

    _marks: ClassVar = dict(zip(MARKS[0], (0xFD, 0xFE, 0xFF), strict=True))

    def encode(self, text: str) -> list[int]:
        raw = text.encode()
        for mark, byte in self._marks.items():
            raw = raw.replace(mark.encode(), bytes([byte]))
        return list(raw)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        for mark, byte in self._marks.items():
            if list(token_ids) == [byte]:
                return "" if skip_special_tokens else mark
        return super().decode(token_ids, skip_special_tokens)


def coder(seen: list[bytes]) -> AsyncEngine:
    def script(prompt: Sequence[int], branch: int) -> bytes:
        seen.append(bytes(prompt))
        return b"a + b"

    return AsyncEngine(EngineConfig(MODEL), loader=ScriptedLoader(script, tokenizer=CoderTokenizer()))


async def test_a_model_that_can_is_asked_for_what_stands_between() -> None:
    seen: list[bytes] = []
    async with served(coder(seen)) as client:
        body = completion(["return ", "give "], suffix="\n# done")
        answer = await client.post("/v1/completions", json=body)
        assert [choice["text"] for choice in answer.json()["choices"]] == ["a + b"] * 2
        assert sorted(seen) == [b"\xfdgive \xfe\n# done\xff", b"\xfdreturn \xfe\n# done\xff"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": 3}, "suffix"),
    ],
)
async def test_what_has_no_gap_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    async with served(coder([])) as client:
        refused = await client.post("/v1/completions", json=completion(**{"suffix": "x"} | fields))
        assert refused.status_code == 400 and error(refused)["param"] == param


async def test_an_empty_suffix_is_none() -> None:
    seen: list[bytes] = []
    async with served(coder(seen)) as client:
        assert (await client.post("/v1/completions", json=completion(suffix=""))).status_code == 200
        assert seen == [b"hello"]


class Wrapped:
    """A fast tokenizer as the engine has it."""

    def __init__(self, fast: Fast) -> None:
        self.fast = fast

    def encode(self, text: str) -> list[int]:
        return list(self.fast.encode(text).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self.fast.decode(token_ids, skip_special_tokens=skip_special_tokens))

    encode_chat = ByteTokenizer.encode_chat


def fast(marks: Sequence[str]) -> Wrapped:
    tokenizer = Fast(models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", *marks])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Wrapped(tokenizer)


@pytest.mark.parametrize("marks", MARKS, ids=["qwen", "starcoder", "santacoder", "deepseek"])
def test_the_tokens_are_found_in_the_tokenizer(marks: tuple[str, str, str]) -> None:
    tokenizer = fast(marks)
    [prompt] = around_gap(["a"], "a", tokenizer)
    assert prompt == f"{marks[0]}a{marks[1]}a{marks[2]}"
    assert tokenizer.encode(prompt) == [0, 3, 1, 4, 1, 5]
    with pytest.raises(Refusal, match="no tokens for filling a gap"):
        around_gap(["a"], "a", fast(marks[:2]))
