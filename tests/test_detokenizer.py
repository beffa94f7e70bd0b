from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine.detokenizer import BEFORE, Detokenizer, TextStream
from asyncengine.testing import ByteTokenizer
from tests.model.sentencepiece import sentencepiece

TOKENIZER = ByteTokenizer()

TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.text("aé€😀\ufffd", max_size=60)


def pieces(tokens: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Tokens cut into pieces of the given sizes, over and over."""
    cut, at = [], 0
    for size in itertools.cycle(sizes):
        if at >= len(tokens):
            return cut
        cut.append(list(tokens[at : at + size]))
        at += size
    raise AssertionError


SIZES = st.lists(st.integers(1, 70), min_size=1, max_size=5) | st.just([1]) | st.just([2]) | st.just([3])


class TestText:
    @settings(max_examples=100)
    @given(TEXTS, SIZES)
    def test_pieces_are_the_whole_however_it_is_cut_and_break_no_character(self, text: str, sizes: list[int]) -> None:
        stream = Detokenizer(TOKENIZER)
        shown = ""
        for piece in pieces(list(text.encode()), sizes):
            shown += stream.push(piece)
            assert text.startswith(shown)
        assert shown + stream.flush() == text

    @settings(max_examples=100)
    @given(st.binary(max_size=90) | st.lists(st.sampled_from([0x80, 0xC3, 0xE2, 0xF0, 0x9F, 65, 0xEF, 0xBF, 0xBD]),
                                              max_size=90).map(bytes), SIZES)  # fmt: skip
    def test_garbage_is_told_as_the_tokenizer_tells_it(self, garbage: bytes, sizes: list[int]) -> None:
        stream = Detokenizer(TOKENIZER)
        out = "".join(stream.push(piece) for piece in pieces(list(garbage), sizes)) + stream.flush()
        assert out == TOKENIZER.decode(list(garbage))

    def test_a_character_comes_with_its_last_byte(self) -> None:
        stream = Detokenizer(TOKENIZER)
        assert [stream.push([byte]) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]

    def test_text_before_an_incomplete_character_is_not_held(self) -> None:
        stream = Detokenizer(TOKENIZER)
        assert stream.push(list(b"abc\xe2\x82")) == "abc"
        assert stream.push([0xAC]) == "€"

    def test_an_incomplete_end_is_flushed_once(self) -> None:
        stream = Detokenizer(TOKENIZER)
        assert stream.push([0xE2, 0x82]) == ""
        assert stream.flush() == "\ufffd"
        assert stream.flush() == ""

    @pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100, 500])
    def test_a_long_piece_may_end_within_a_character(self, length: int) -> None:
        stream = Detokenizer(TOKENIZER)
        assert stream.push([*b"x" * length, 0xC3]) == "x" * length
        assert stream.push([0xA9]) == "é"

    @pytest.mark.parametrize("size", [2, 3, 5, 40])
    def test_pieces_that_always_end_within_a_character(self, size: int) -> None:
        text = "a" + "é" * 300
        stream = Detokenizer(TOKENIZER)
        longest = 0
        out = ""
        for piece in pieces(list(text.encode()), [size]):
            out += stream.push(piece)
            longest = max(longest, len(stream._ids))
        assert out + stream.flush() == text
        assert longest <= 4 * 32 + size, "what is decoded again grows with the text"

    def test_undecodable_output_is_shown_at_last(self) -> None:
        stream = Detokenizer(TOKENIZER)
        shown = ""
        for _ in range(200):
            shown += stream.push([0xFF])
        assert set(shown) == {"\ufffd"} and len(shown) > 100
        assert len(stream._ids) <= 100

    def test_special_tokens_are_skipped_or_not(self) -> None:
        tokens = [*b"ab", 256, *b"c"]
        for skip, text in ((True, "abc"), (False, "ab<end>c")):
            stream = Detokenizer(TOKENIZER, skip)
            assert "".join(stream.push([token]) for token in tokens) + stream.flush() == text

    def test_many_special_tokens_are_not_decoded_again_and_again(self) -> None:
        stream = Detokenizer(TOKENIZER)
        stream.push(list(b"ab"))
        for _ in range(1000):
            assert stream.push([256]) == ""
        assert len(stream._ids) < 200
        assert stream.push(list(b"c")) == "c"

    @pytest.mark.parametrize("skip", [True, False])
    def test_what_stands_before_decides_how_the_first_token_is_taken(self, skip: bool) -> None:
        """A decoder may leave out the space that a text begins with; behind a prompt, it is no text's beginning."""
        tokenizer = sentencepiece()
        tokens = tokenizer.encode("hello Paris is true, hé €uro hello")
        whole = tokenizer.decode(tokens, skip)
        for end in range(1, len(tokens)):
            before = tokenizer.decode(tokens[:end], skip)
            stream = Detokenizer(tokenizer, skip, tokens[max(0, end - BEFORE) : end])
            text = "".join(stream.push([token]) for token in tokens[end:]) + stream.flush()
            assert text == whole[len(before.rstrip("\ufffd")) :], end

    def test_a_character_that_the_prompt_began_is_whole(self) -> None:
        stream = Detokenizer(TOKENIZER, before=[*"a€".encode()[:-1]])
        assert stream.push("€".encode()[-1:]) == "€"
        assert Detokenizer(TOKENIZER, before=[*b"ab"]).flush() == ""

    @pytest.mark.parametrize("prompt", ["", "hello 😀", "😀😀"])
    @pytest.mark.parametrize("sizes", [[1], [2], [5], [50]])
    def test_bytes_by_name_that_never_become_a_character_spoil_no_other(self, prompt: str, sizes: list[int]) -> None:
        """Such a decoder tells the bytes of whole characters for undecodable, too, if more follow that are."""
        tokenizer = sentencepiece()
        face, first = tokenizer.encode("😀")[-4:], tokenizer.encode("😀")[-4]
        for answer, text in (([first], "\ufffd"), ([*face, first], "😀\ufffd"), ([*face, *face], "😀😀")):
            stream = Detokenizer(tokenizer, before=tokenizer.encode(prompt)[-BEFORE:] if prompt else ())
            assert "".join(stream.push(piece) for piece in pieces(answer, sizes)) + stream.flush() == text
        stream = Detokenizer(tokenizer, before=[*face, first])
        assert stream.push(face[1:]) == "😀", "which the prompt had begun"

    @pytest.mark.parametrize(
        ("before", "after", "text"),
        [
            (b"a\xff", b"bc", "bc"),
            (b"a\xe2\x82", b"bc", "bc"),
            (b"a\xe2", b"\x82\xac\xff", "€\ufffd"),
            (b"\xff\xff", b"\xffa", "\ufffda"),
            (b"\xe2", b"", ""),
            (b"\xe2", b"\xe2", "\ufffd"),
        ],
    )
    def test_what_cannot_be_decoded_in_a_prompt_is_no_part_of_the_text(
        self, before: bytes, after: bytes, text: str
    ) -> None:
        stream = Detokenizer(TOKENIZER, before=[*before])
        assert "".join(stream.push([byte]) for byte in after) + stream.flush() == text


def naive(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Character by character: the stop string that completes first, of those the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


class TestStopStrings:
    @settings(max_examples=60)
    @given(
        st.text("abé", max_size=40),
        st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=4),
        SIZES,
    )
    def test_the_first_to_complete_ends_the_text(self, text: str, stops: list[str], sizes: list[int]) -> None:
        stream = TextStream(TOKENIZER, tuple(stops))
        expected, stopped_by = naive(text, stops)
        shown = ""
        for piece in pieces(list(text.encode()), sizes):
            shown += stream.push(piece)
            assert expected.startswith(shown), "text of a stop string was shown"
        shown += stream.flush()
        assert (shown, stream.stopped_by) == (expected, stopped_by)

    @settings(max_examples=60)
    @given(
        st.binary(max_size=80) | st.lists(st.sampled_from([0xC3, 0xA9, 0xFF, 97]), max_size=80).map(bytes),
        st.lists(st.sampled_from(["a", "é", "aé", "éa", "aa"]), min_size=1, max_size=2),
        SIZES,
    )
    def test_one_by_one_and_in_pieces_end_alike(self, data: bytes, stops: list[str], sizes: list[int]) -> None:
        """The step thread reads token by token, the loop in pieces."""
        ends = []
        for cut in ([1], sizes):
            stream = TextStream(TOKENIZER, tuple(stops))
            text = "".join(stream.push(piece) for piece in pieces(list(data), cut))
            ends.append((text + stream.flush(), stream.stopped_by))
        assert ends[0] == ends[1]

    def test_of_two_that_complete_together_the_longer_counts(self) -> None:
        stream = TextStream(TOKENIZER, ("bc", "abc", "c"))
        assert stream.push(list(b"xabcy")) == "x"
        assert stream.stopped_by == "abc"

    def test_text_before_it_inside_the_same_piece_is_shown(self) -> None:
        stream = TextStream(TOKENIZER, ("STOP",))
        assert stream.push(list(b"hello STOP world")) == "hello "

    def test_nothing_after_it_is_shown(self) -> None:
        stream = TextStream(TOKENIZER, ("x",))
        assert stream.push(list(b"ax")) == "a"
        assert stream.push(list(b"more")) == "" and stream.flush() == ""

    def test_what_may_begin_one_is_held_back_and_no_more(self) -> None:
        stream = TextStream(TOKENIZER, ("abc",))
        assert [stream.push([byte]) for byte in b"xaabd"] == ["x", "", "a", "", "abd"]
        assert stream.push(list(b"ab")) == ""
        assert stream.flush() == "ab"

    def test_it_may_lie_across_tokens_and_characters(self) -> None:
        stream = TextStream(TOKENIZER, ("é€",))
        shown = [stream.push([byte]) for byte in "aé€b".encode()]
        assert "".join(shown) == "a" and stream.stopped_by == "é€"

    def test_without_any_nothing_is_held(self) -> None:
        stream = TextStream(TOKENIZER)
        assert stream.push(list(b"abc")) == "abc" and stream.stopped_by is None
