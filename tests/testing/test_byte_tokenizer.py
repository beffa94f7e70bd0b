from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncengine.testing import ByteTokenizer

tokenizer = ByteTokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_the_round_trip(text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= token_id < ByteTokenizer.vocab_size for token_id in ids)
    assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, ByteTokenizer.vocab_size - 1)))
def test_any_tokens_can_be_decoded(ids: list[int]) -> None:
    assert "<end>" not in tokenizer.decode(ids) or b"<end>" in bytes(i for i in ids if i < 256)
    assert tokenizer.decode(ids, skip_special_tokens=False).count("<end>") >= ids.count(256)


@pytest.mark.parametrize(
    ("ids", "skip", "text"),
    [
        ([], True, ""),
        ([256], True, ""),
        ([256], False, "<end>"),
        ([*b"a", 256, *b"b"], True, "ab"),
        ([*b"a", 256, *b"b"], False, "a<end>b"),
        (list("ü".encode()[:1]), True, "�"),
    ],
)
def test_the_end_token_and_broken_text(ids: list[int], skip: bool, text: str) -> None:
    assert tokenizer.decode(ids, skip) == text


def test_conversations_become_lines() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": None}, {"role": "tool"}]
    text = tokenizer.decode(tokenizer.encode_chat(messages, {}))
    assert text == "system: Be brief.\nuser: \ntool: \nassistant: "


def test_its_tokens_are_bytes() -> None:
    assert [tokenizer.token_bytes(token_id) for token_id in (0, 255, 256, 257)] == [b"\x00", b"\xff", b"<end>", None]
