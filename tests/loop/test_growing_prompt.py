"""The tokens of a prompt that came in pieces are those of the whole, wherever it was cut."""

from __future__ import annotations

import itertools
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackEnd
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncengine import EngineConfig, GenerationConfig, InvalidRequestError, tiny
from asyncengine.loop import growing_prompt
from asyncengine.loop.growing_prompt import GrowingPrompt
from asyncengine.model.tokenizer import FastTokenizer, load_tokenizer
from asyncengine.step.model import ModelView
from asyncengine.testing import ByteTokenizer
from asyncengine.tokenizer import Message, Tokenizer

STORY = (
    "Once upon a time there was a young horse who lived near a quiet lake. The horse liked to pick flowers; it's 12 "
    "of them,\n\n  every   day!  One evening, the horse found a red ball beside the path. "
)
TEXTS = st.lists(
    st.sampled_from(["horse", " horse", " the", "\n", "  ", "12", "é", "e\u0301", "🐴", "日本", "'", "s", "<|user|>"])
    | st.text(max_size=6),
    max_size=40,
).map("".join)


def unigram() -> Tokenizer:
    """As SentencePiece makes them: no word boundaries, and one space before every text."""
    pieces = ["▁", "▁a", "a", "b", "ab", "ba", "aab", "▁ab", "▁b", "bb▁a", "h", "o", "r", "s", "e", "▁horse", "hors"]
    backend = BackEnd(models.Unigram([("<unk>", 0.0), *((piece, -1.0 - len(piece) % 3) for piece in pieces)], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Metaspace()
    return FastTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


class Fickle:
    """The worst there could be: with every further character all tokens are others."""

    def encode(self, text: str) -> list[int]:
        return [(ord(letter) + len(text)) % 256 for letter in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return ""

    def encode_chat(self, messages: Sequence[Message], template_arguments: Mapping[str, Any]) -> list[int]:
        return []


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    tiny_one = load_tokenizer(tiny.PATH)
    assert tiny_one is not None
    return {"tiny": tiny_one, "unigram": unigram(), "bytes": ByteTokenizer(), "fickle": Fickle()}


def view(tokenizer: Tokenizer | None, max_tokens: int = 4096) -> ModelView:
    config = EngineConfig("m", kv_cache_page_size=8)
    return ModelView(1, config, 2000, (), max_tokens, max_tokens - 1, "so many", GenerationConfig(), tokenizer, None)


def now(coroutine: Coroutine[Any, Any, tuple[int, Any]]) -> tuple[int, list[int]]:
    """The result of a coroutine that does not wait: short texts are encoded in place."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        keep, tokens = stop.value
        return keep, tokens.tolist()
    raise AssertionError("it waits")


def fed(prompt: GrowingPrompt, pieces: Sequence[Any]) -> tuple[list[int], list[int], int]:
    """What was given ahead, what all of it is in the end, and how many tokens were taken back."""
    tokens: list[int] = []
    back = 0
    for piece in pieces:
        keep, more = now(prompt.add(piece))
        back += len(tokens) - keep
        tokens = tokens[:keep] + more
    ahead = tokens
    keep, more = now(prompt.finish())
    assert prompt.token_ids.tolist() == tokens[:keep] + more
    return ahead, tokens[:keep] + more, back + len(ahead) - keep


@pytest.mark.parametrize("name", ["tiny", "unigram", "bytes", "fickle"])
@given(text=TEXTS, cuts=st.lists(st.integers(0, 200), max_size=30))
@settings(max_examples=30, deadline=None)
@pytest.mark.in_short("bytes", "unigram", "fickle")
def test_the_tokens_are_those_of_the_whole_text(
    tokenizers: dict[str, Tokenizer], name: str, text: str, cuts: list[int]
) -> None:
    tokenizer = tokenizers[name]
    text += "!"
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    assert fed(GrowingPrompt(view(tokenizer)), pieces)[1] == tokenizer.encode(text)


@given(pieces=st.lists(st.lists(st.integers(0, 1999), max_size=5) | st.integers(0, 1999), max_size=20))
@settings(max_examples=30, deadline=None)
def test_token_ids_are_certain_at_once(pieces: list[list[int] | int]) -> None:
    expected = [token for piece in pieces for token in ([piece] if isinstance(piece, int) else piece)]
    prompt = GrowingPrompt(view(None))
    if expected:
        assert fed(prompt, pieces) == (expected, expected, 0)
    else:
        with pytest.raises(InvalidRequestError, match="empty"):
            fed(prompt, pieces)


def test_token_ids_are_put_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    put_together = []

    def concatenate(arrays: Sequence[Any]) -> Any:
        put_together.append(sum(map(len, arrays)))
        return together(arrays)

    together = np.concatenate
    monkeypatch.setattr(growing_prompt.np, "concatenate", concatenate)
    assert fed(GrowingPrompt(view(None)), range(1000))[1] == list(range(1000))
    assert put_together == [1000]


@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_of_an_ordinary_text_nearly_all_is_given_ahead_and_nothing_is_taken_back(
    tokenizers: dict[str, Tokenizer], size: int
) -> None:
    text = STORY * 4
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    ahead, whole, back = fed(GrowingPrompt(view(tokenizers["tiny"])), pieces)
    assert back == 0
    assert len(whole) - len(ahead) <= 8 + len(whole) // 16 + 8


def test_a_long_text_is_not_encoded_with_every_piece() -> None:
    class Counting(ByteTokenizer):
        encoded = 0

        def encode(self, text: str) -> list[int]:
            self.encoded += len(text)
            return super().encode(text)

    tokenizer = Counting()
    pieces = ["ab"] * 500
    fed(GrowingPrompt(view(tokenizer)), pieces)
    assert tokenizer.encoded < 20 * 1000


@pytest.mark.parametrize("pieces", [["x" * 60, "x" * 60], [[1] * 60, [1] * 60]])
def test_it_is_too_long_as_soon_as_it_must_be(pieces: list[Any]) -> None:
    prompt = GrowingPrompt(view(ByteTokenizer(), max_tokens=100))
    now(prompt.add(pieces[0]))
    with pytest.raises(InvalidRequestError, match=r"1\.\.99"):
        now(prompt.add(pieces[1]))


def test_what_is_at_the_end_of_every_text_is_not_given_ahead() -> None:
    class Closing(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [*super().encode(text), 256]

    ahead, whole, back = fed(GrowingPrompt(view(Closing())), ["ten letter"] * 5)
    assert 256 not in ahead
    assert whole[-1] == 256
    assert back == 0
    assert np.array_equal(whole, Closing().encode("ten letter" * 5))


def test_a_text_may_begin_with_what_has_no_tokens() -> None:
    class Stripping(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.strip())

    prompt = GrowingPrompt(view(Stripping()))
    assert fed(prompt, [" " * 20, " " * 20, "the words"])[1] == [*b"the words"]
