"""Turns whose tokens are known, in conversations of a tokenizer whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from asyncengine import InvalidRequestError
from asyncengine.known_turns import encode_known_turns, has_known_turns
from asyncengine.testing import ByteTokenizer, echo_engine

BYTES = ByteTokenizer()
USER = {"role": "user", "content": "hi"}


def render(messages: Sequence[Any]) -> str:
    return "".join(f"[{message['role']}]{message['content']}<end>" for message in messages) + "[assistant]"


def encode(text: str) -> list[int]:
    """Bytes, and the mark that ends a turn as one token."""
    ids: list[int] = []
    for piece in text.split("<end>"):
        ids += [*piece.encode(), BYTES.eos_token_id]
    return ids[:-1]


def ids_of(messages: Sequence[Any]) -> list[int]:
    return encode_known_turns(messages, render, encode, BYTES.decode)


def known(*token_ids: int, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "said", "token_ids": [*token_ids], **more}


def test_they_take_the_place_of_the_content() -> None:
    before, after = encode("[user]hi<end>[assistant]"), encode("<end>[user]hi<end>[assistant]")
    assert ids_of([USER, known(1, 2, 3), USER]) == [*before, 1, 2, 3, *after]


def test_what_ended_the_generation_is_there_once() -> None:
    assert ids_of([USER, known(1, 2, 256), USER]) == ids_of([USER, known(1, 2), USER])


def test_an_ordinary_last_token_stays_even_if_the_template_goes_on_with_the_same() -> None:
    def lines(messages: Sequence[Any]) -> str:
        return "\n".join(message["content"] for message in messages)

    ids = encode_known_turns([known(65, 10), USER], lines, encode, BYTES.decode)
    assert ids == [65, 10, *b"\nhi"]


def test_they_stand_for_calls_and_reasoning_too() -> None:
    seen: list[Any] = []

    def look(messages: Sequence[Any]) -> str:
        seen.extend(messages)
        return render(messages)

    encode_known_turns([known(1, tool_calls=[{}], reasoning_content="hm")], look, encode, BYTES.decode)
    assert set(seen[0]) == {"role", "content"}


def test_several_and_empty_ones() -> None:
    messages = [known(), USER, known(7), known(8)]
    expected = ["[assistant]", "<end>[user]hi<end>[assistant]", "<end>[assistant]", "<end>[assistant]"]
    assert ids_of(messages) == encode(expected[0]) + encode(expected[1]) + [7] + encode(expected[2]) + [8] + encode(
        expected[3]
    )


@pytest.mark.parametrize("write", [str.upper, lambda mark: mark * 2, lambda mark: ""])
def test_a_template_that_changes_the_content_is_refused(write: Any) -> None:
    def changed(messages: Sequence[Any]) -> str:
        return "".join(write(message["content"]) for message in messages)

    with pytest.raises(ValueError, match=r"messages\[1\].*leave them out"):
        encode_known_turns([USER, known(1)], changed, encode, BYTES.decode)


def test_without_any_nothing_changes() -> None:
    assert not has_known_turns([USER, {"role": "assistant", "content": "x", "token_ids": None}])
    assert BYTES.encode_chat([USER], {}) == [*b"user: hi\nassistant: "]
    assert BYTES.encode_chat([USER, known(9)], {}) == [*b"user: hi\nassistant: ", 9, *b"\nassistant: "]


@pytest.mark.parametrize(
    ("token_ids", "says"),
    [("abc", "token_ids 'abc'"), ([1.5], "1.5"), ([True], "True"), ([-1], "-1"), ([999], "999; allowed: 0..256")],
)
async def test_wrong_ones_are_refused(token_ids: Any, says: str) -> None:
    async with echo_engine() as engine:
        message = {"role": "assistant", "content": "said", "token_ids": token_ids}
        with pytest.raises(InvalidRequestError, match=says.replace(".", r"\.")):
            await engine.chat([USER, message, USER])
        assert (await engine.chat([USER, {**message, "token_ids": [7]}])).token_ids[-14] == 7
