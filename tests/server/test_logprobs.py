"""Tokens by their texts and bytes, and where they begin in the text that is returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from asyncengine import AsyncEngine, EngineConfig, RequestOutput, TokenLogprobs
from asyncengine.server.chunks import ChatLogprob, CompletionLogprobs
from asyncengine.server.logprobs import CompletionTokens, chat_logprobs
from asyncengine.testing import ByteTokenizer, ScriptedLoader, echo
from asyncengine.tokenizer import Tokenizer
from tests.model.sentencepiece import sentencepiece
from tests.server.serving import MODEL, chat, completion, events, scripted_engine, served

pytestmark = pytest.mark.loops("either")

TEXT = "日本 is 🌶 hot"
PIECES = sentencepiece()
SPACE, SPACED_TRUE, TRUE = (PIECES.encode(text)[-1] for text in (" ", "true", "xtrue"))


class Unknowing:
    """Bytes, of a tokenizer that cannot say so."""

    def __init__(self) -> None:
        bytes_ = ByteTokenizer()
        self.encode, self.decode, self.encode_chat = bytes_.encode, bytes_.decode, bytes_.encode_chat


def pieces_engine() -> AsyncEngine:
    return AsyncEngine(EngineConfig(MODEL), loader=ScriptedLoader(echo, tokenizer=PIECES, vocab_size=400))


async def choice(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The choice of a completion, which is the same when it is streamed."""
    body = completion(**fields, model=None)
    [found] = (await client.post("/v1/completions", json=body)).json()["choices"]
    chunks = events((await client.post("/v1/completions", json=body | {"stream": True})).text)
    parts = [part for chunk in chunks for part in chunk["choices"]]
    assert "".join(part["text"] for part in parts) == found["text"]
    for name, whole in found["logprobs"].items():
        if whole is not None:
            assert [entry for part in parts for entry in part["logprobs"][name]] == whole
    result: dict[str, Any] = found
    return result


def check_places(found: dict[str, Any], special: Sequence[str] = ()) -> None:
    """Whole tokens stand in the text where they are said to begin, and parts of a character where it begins."""
    text, entries = found["text"], found["logprobs"]
    for token, offset in zip(entries["tokens"], entries["text_offset"], strict=True):
        if token == "\ufffd":
            assert len(text[offset].encode()) > 1
        elif token not in special:
            assert text[offset:].startswith(token), (token, offset, text)


def completion_logprobs(tokenizer: Tokenizer, token_ids: list[int], top: Sequence[int] = ()) -> CompletionLogprobs:
    entry = TokenLogprobs(-3.0, tuple(top), tuple(-float(at) for at in range(len(top))))
    found = CompletionTokens(tokenizer, len(top), False, True).of(
        RequestOutput("", token_ids, [entry] * len(token_ids))
    )
    assert found is not None
    return found


def chat_entries(tokenizer: Tokenizer, token_ids: list[int], top: Sequence[int] = ()) -> list[ChatLogprob]:
    entry = TokenLogprobs(-3.0, tuple(top), (-1.0,) * len(top))
    found = chat_logprobs(RequestOutput("", token_ids, [entry] * len(token_ids)), tokenizer)
    assert found is not None
    return found.content


async def test_offsets_are_characters_of_the_text() -> None:
    async with served(scripted_engine(TEXT)) as client:
        found = await choice(client, logprobs=0, max_tokens=50)
        assert found["text"] == TEXT
        check_places(found)
        offsets = found["logprobs"]["text_offset"]
        assert offsets == [0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 6, 6, 6, 7, 8, 9, 10]


@pytest.mark.usefixtures("one_torch_thread")
async def test_offsets_of_what_is_echoed() -> None:
    async with served(AsyncEngine(EngineConfig("tiny", mode="local"))) as client:
        special = ("<|bos|>", "<|end|>")
        for limit in (0, 2):
            fields: dict[str, Any] = {"logprobs": 0, "max_tokens": limit, "temperature": 0, "echo": True}
            for skip in (True, False):
                found = await choice(client, prompt=TEXT, skip_special_tokens=skip, **fields)
                assert found["text"].startswith(TEXT)
                assert found["logprobs"]["text_offset"][:2] == [0, 0] and found["logprobs"]["tokens"][0] == special[0]
                check_places(found, special)
            ids = (await client.post("/tokenize", json={"prompt": TEXT})).json()["tokens"]
            found = await choice(client, prompt=ids, skip_special_tokens=False, **fields)
            assert found["text"].startswith(f"<|bos|>{TEXT}")
            check_places(found, special[1:])
            # Special tokens that the text itself spells are part of it.
            found = await choice(client, prompt="<|user|>What is<|bos|> the", **fields)
            assert found["text"].startswith("<|user|>What is<|bos|> the")
            assert found["logprobs"]["tokens"][:3] == ["<|bos|>", "<|user|>", "What"]
            assert found["logprobs"]["text_offset"][:3] == [0, 0, 8]
            check_places({**found, "logprobs": {k: v and v[1:] for k, v in found["logprobs"].items()}}, special[1:])


async def test_sentencepiece_s_tokens_have_their_spaces() -> None:
    async with served(pieces_engine()) as client:
        found = await choice(client, prompt="hello Paris is 🌶", logprobs=1, echo=True, max_tokens=0)
        entries = found["logprobs"]
        assert entries["tokens"] == ["<s>", " hello", " Paris", " is", " ", *["\ufffd"] * 4]
        # The text has no space where it begins: the decoder leaves it out.
        assert entries["text_offset"] == [0, 0, 5, 11, 14, 15, 15, 15, 15]
        found = (await client.post("/tokenize", json={"prompt": "hello Paris", "return_token_strs": True})).json()
        assert found["token_strs"] == ["<s>", " hello", " Paris"]
        body = completion("hello Paris", prompt_logprobs=1, max_tokens=1)
        [found] = (await client.post("/v1/completions", json=body)).json()["choices"]
        named = [entry["decoded_token"] for place in found["prompt_logprobs"][1:] for entry in place.values()]
        assert named == [" hello", " Paris"]


def test_a_text_that_never_becomes_whole_has_places_as_well() -> None:
    broken = [0xE6, *b"a", 0xE6, 0x97, 0xE6, 0x97, 0xA5, 0xA5, *b"b"]
    assert bytes(broken).decode(errors="replace") == "�a�日�b"
    assert completion_logprobs(ByteTokenizer(), broken).text_offset == [0, 1, 2, 2, 3, 3, 3, 4, 5]


def test_likely_tokens_have_a_name_each() -> None:
    found = completion_logprobs(PIECES, [TRUE], [SPACED_TRUE, TRUE])
    assert found.tokens == ["true"] and found.top_logprobs == [{" true": 0.0, "true": -1.0}]
    parts = [0xE6, 0xE7, 0x97, ord("a")]
    found = completion_logprobs(ByteTokenizer(), [0xE7], parts)
    assert found.tokens == ["\ufffd"]
    assert found.top_logprobs == [{"bytes:\\xe6": 0.0, "\ufffd": -1.0, "bytes:\\x97": -2.0, "a": -3.0}]
    found = completion_logprobs(Unknowing(), [0xE7], parts)
    assert found.top_logprobs == [{"token_id:230": 0.0, "\ufffd": -1.0, "token_id:151": -2.0, "a": -3.0}]
    byte, letter = 3 + ord("a"), PIECES.encode("xa")[-1]
    found = completion_logprobs(PIECES, [TRUE], [byte, letter])
    assert found.top_logprobs == [{"a": 0.0, f"token_id:{letter}": -1.0, "true": -3.0}]


def test_bytes_add_up_to_the_text() -> None:
    raw = [entry.bytes or [] for entry in chat_entries(ByteTokenizer(), list(TEXT.encode()))]
    assert bytes(byte for entry in raw for byte in entry).decode() == TEXT
    ids = PIECES.encode(f"hello {TEXT}")[1:]
    entries = chat_entries(PIECES, ids, [SPACED_TRUE, 3 + 0xE6])
    assert bytes(byte for entry in entries for byte in entry.bytes or []).decode() == f" hello {TEXT}"
    assert [(top.token, top.bytes) for top in entries[0].top_logprobs] == [(" true", [*b" true"]), ("\ufffd", [0xE6])]


def test_a_space_is_one() -> None:
    [entry] = chat_entries(PIECES, [SPACE])
    assert (entry.token, entry.bytes) == (" ", [32])


def test_a_tokenizer_that_does_not_know_bytes_knows_those_of_whole_characters() -> None:
    entries = chat_entries(Unknowing(), [*b"a ", 0xE6])
    assert [(entry.token, entry.bytes) for entry in entries] == [("a", [97]), (" ", [32]), ("\ufffd", None)]


async def test_streamed_or_whole_a_chat_has_the_bytes_of_its_tokens() -> None:
    async with served(scripted_engine("é🌶")) as client:
        url, body = "/v1/chat/completions", chat(logprobs=True)
        [whole] = (await client.post(url, json=body)).json()["choices"]
        chunks = events((await client.post(url, json=body | {"stream": True})).text)
        parts = [part["logprobs"] for chunk in chunks for part in chunk["choices"] if part["logprobs"]]
        assert [entry for part in parts for entry in part["content"]] == whole["logprobs"]["content"]
        raw = [byte for entry in whole["logprobs"]["content"] for byte in entry["bytes"]]
        assert bytes(raw).decode() == "é🌶"
