"""How prompts become token ids: cut where that is asked for, and never without a turn for others."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from asyncengine import InvalidRequestError, RerankPrompt
from asyncengine.errors import ContextLengthExceededError
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.loop.test_classification import ONE, classifying
from tests.loop.test_embedding import loaded

pytestmark = pytest.mark.loops("either")

HOW = RerankPrompt(template="{query}?{document}!")
MERGED = 7
"""What a tokenizer makes of two letters of the same kind."""


class Merging(ByteTokenizer):
    """Two equal letters are one token; what is decoded may be encoded to other tokens."""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for byte in super().encode(text):
            if ids and ids[-1] == byte and byte != MERGED:
                ids[-1] = MERGED
            else:
                ids.append(byte)
        return ids


@pytest.mark.parametrize("most", [200, 6, 4, 3])
async def test_of_a_pair_in_a_template_the_document_is_cut(most: int) -> None:
    engine = await loaded(classifying(ONE))
    (found,) = await engine.relevances([("q", "document")], HOW, truncate_prompt_tokens=most)
    assert found.usage.prompt_tokens == min(most, len("q?document!"))
    assert found.logit == ord("!")  # the prompt ends as it is to end
    (alone,) = await engine.relevances([("q", "document"[: max(most - 3, 0)])], HOW)
    assert (alone.usage.prompt_tokens, alone.logit) == (found.usage.prompt_tokens, found.logit)
    await engine.shutdown()


async def test_what_is_cut_fits_whatever_it_is_encoded_to() -> None:
    loader = classifying(ONE)
    loader.tokenizer = Merging()
    engine = await loaded(loader)
    for document in ("aabbccddeeff", "abcdefgh", "a" * 30, ""):
        for most in (3, 4, 5, 8):
            (found,) = await engine.relevances([("q", document)], HOW, truncate_prompt_tokens=most)
            assert 3 <= found.usage.prompt_tokens <= most and found.logit == ord("!")
    await engine.shutdown()


async def test_a_query_that_is_too_long_is_not_cut() -> None:
    engine = await loaded(classifying(ONE), max_single_sequence_length=16)
    (found,) = await engine.relevances([("q", "d" * 50)], HOW, truncate_prompt_tokens=-1)
    assert found.usage.prompt_tokens == 15
    with pytest.raises(ContextLengthExceededError):
        await engine.relevances([("q" * 50, "d")], HOW, truncate_prompt_tokens=-1)
    with pytest.raises(
        ContextLengthExceededError, match="is to be cut to 4 tokens, and without its last text it has 7"
    ):
        await engine.relevances([("query", "document")], HOW, truncate_prompt_tokens=4)
    with pytest.raises(InvalidRequestError, match=r"truncate_prompt_tokens is 16; allowed: -1 and 1\.\.15"):
        await engine.relevances([("q", "d")], HOW, truncate_prompt_tokens=16)
    await engine.shutdown()


async def test_other_prompts_are_cut_behind_their_first_tokens() -> None:
    engine = await loaded(ScriptedLoader(tokenizer=ByteTokenizer()))
    for prompt in ("abcdef", [97, 98, 99, 100], iter([97, 98, 99])):
        (found,) = await engine.embed([prompt], "last", normalize=False, truncate_prompt_tokens=2)
        assert found.vector.tolist() == [98.0, 1.0, 1.0] and found.usage.prompt_tokens == 2
    with pytest.raises(InvalidRequestError, match="the prompt is ''"):
        await engine.embed([""], truncate_prompt_tokens=2)
    await engine.shutdown()


async def test_two_texts_are_for_models_that_take_them() -> None:
    engine = await loaded(classifying())
    with pytest.raises(InvalidRequestError, match="the prompt is a pair of texts; 'a' takes one text"):
        await engine.classify([("a", "b")])
    await engine.shutdown()


async def test_others_have_their_turn_while_many_prompts_are_encoded() -> None:
    turns = 0
    seen: set[int] = set()

    class Watched(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            seen.add(turns)
            return super().encode(text)

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    loader: Any = ScriptedLoader(tokenizer=Watched())
    engine = await loaded(loader)
    task = asyncio.ensure_future(others())
    found = await engine.embed(["ab"] * 160, "last", normalize=False)
    task.cancel()
    assert all(np.array_equal(each.vector, [98.0, 1.0, 1.0]) for each in found)
    assert len(seen) >= 10
    await engine.shutdown()
