"""The bytes of tokens, put together, are the text that the library's decoder makes of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackEnd
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from asyncengine import tiny
from asyncengine.model.token_spelling import spelling_of
from asyncengine.model.tokenizer import FastTokenizer, load_tokenizer
from tests.model.sentencepiece import sentencepiece

TINY = load_tokenizer(tiny.PATH)
PIECES = sentencepiece()
TEXTS = st.lists(
    st.sampled_from(["hello", " hello", " true", "is", "  ", "\n", "é", "🌶", "日本", "<|user|>", "<s>", "<0x41>"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    max_size=12,
).map("".join)


def joined(tokenizer: FastTokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(token_id) or b"" for token_id in ids)


@given(TEXTS)
def test_of_gpt_2_s_letters(text: str) -> None:
    assert isinstance(TINY, FastTokenizer)
    assert joined(TINY, TINY.encode(text)) == f"<|bos|>{text}".encode()


@given(TEXTS.filter(lambda text: "<" not in text and "▁" not in text))
def test_of_sentencepiece_s_signs_with_the_space_that_is_put_before_a_text(text: str) -> None:
    ids = PIECES.encode(text)
    assert joined(PIECES, ids) == (f"<s> {text}" if text else "<s>").encode()
    assert PIECES.decode(ids, True) == text


@given(st.lists(st.integers(0, 1023), max_size=12))
def test_of_any_tokens(ids: list[int]) -> None:
    assert isinstance(TINY, FastTokenizer)
    assert joined(TINY, ids).decode(errors="replace") == TINY.decode(ids, False)


def test_each_byte_has_its_token() -> None:
    assert isinstance(TINY, FastTokenizer)
    for tokenizer, first in ((TINY, 6), (PIECES, 3)):
        found = {tokenizer.token_bytes(token_id) for token_id in range(first, first + 256)}
        assert found == {bytes([byte]) for byte in range(256)}
        assert tokenizer.token_bytes(1 << 20) == b"", "ids that the tokenizer has none for have no text"


@pytest.mark.parametrize(
    ("decoder", "token", "raw"),
    [
        (decoders.Metaspace(), "▁a", b" a"),
        (decoders.Replace("▁", " "), "▁▁", b"  "),
        (decoders.Sequence([decoders.ByteLevel()]), "Ġé", b" \xe9"),
        (decoders.ByteLevel(), "two words", b"two words"),
        (decoders.ByteFallback(), "<0xe6>", b"\xe6"),
        (decoders.ByteFallback(), "<0xE6>x", b"<0xE6>x"),
        (decoders.Fuse(), "<0xE6>", b"<0xE6>"),
        (decoders.WordPiece(), "a", None),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "a", None),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), "a", None),
        (None, "a", None),
    ],
)
def test_of_decoders(decoder: Any, token: str, raw: bytes | None) -> None:
    backend = BackEnd(models.WordLevel({token: 0}, token))
    if decoder is not None:
        backend.decoder = decoder
    made = FastTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert made.token_bytes(0) == raw
    assert (spelling_of(decoder) is None) == (raw is None)
