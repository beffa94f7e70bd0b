"""Which tokens stand for languages, as transformers' tokenizers have it, and how prompts are read with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import MBart50Tokenizer, MBartTokenizer

from asyncengine import InvalidRequestError, SourcePrompt
from asyncengine.model.text_to_text.languages import Languages
from asyncengine.model.text_to_text.reader import Beginning, Sizes, TextReader
from asyncengine.model.text_to_text.rules import Rules
from asyncengine.model.tokenizer import FastTokenizer, SlowTokenizer
from tests.model.text_to_text.checkpoints import nllb

SIZES = Sizes(20, 20, 4, 500, 500)
NO_RULES: Any = SimpleNamespace(spec=Rules)


def reader(tokenizer: Any, forced: int | None = None) -> TextReader:
    wrapped: Any = FastTokenizer(tokenizer) if tokenizer.is_fast else SlowTokenizer(tokenizer)
    return TextReader("key", wrapped, Languages.of(tokenizer), Beginning(2, forced), NO_RULES, SIZES)


def read(prompt: SourcePrompt, tokenizer: Any, forced: int | None = None) -> tuple[list[int], list[int]]:
    """Token ids of the source and of the decoder."""
    found = reader(tokenizer, forced).read(prompt)
    [item] = found.media.items
    assert len(item.places) % 4 == 0 and found.media.source == item.inputs["input_ids"].shape[1]
    return item.inputs["input_ids"][0].tolist(), found.token_ids[len(item.places) :]


@pytest.mark.parametrize(("make", "starts"), [(nllb, False), (MBart50Tokenizer, False), (MBartTokenizer, True)])
def test_sources_are_tokenized_as_transformers_does(make: Any, starts: bool) -> None:
    tokenizer = make()
    own = "eng_Latn" if make is nllb else "en_XX"
    other = "ron_Latn" if make is nllb else "ro_RO"
    plain = tokenizer("a b")["input_ids"]
    tokenizer.src_lang = other
    expected = tokenizer("a b")["input_ids"]
    token = tokenizer.convert_tokens_to_ids(other)
    assert expected != plain and token in expected
    tokenizer.src_lang = own
    begin = [token] if starts else [2, token]
    assert read(SourcePrompt("a b", src_lang=other, tgt_lang=other), tokenizer) == (expected, begin)
    assert read(SourcePrompt("a b"), tokenizer, 7) == (plain, [2, 7])
    assert read(SourcePrompt("a b", [9, 8], tgt_lang=other), tokenizer, 7) == (plain, [*begin, 9, 8])
    assert read(SourcePrompt("a b", "a"), tokenizer)[1] == [2, *tokenizer("a", add_special_tokens=False)["input_ids"]]
    assert read(SourcePrompt(expected), tokenizer)[0] == expected
    assert tokenizer("a b")["input_ids"] == plain  # which is left as it was


class Slow:
    """As tokenizers of transformers' that are pure Python, where SentencePiece is not installed to have a real one."""

    is_fast, chat_template, all_special_tokens = False, None, ()

    def __init__(self, **attributes: Any) -> None:
        self.target = False
        vars(self).update(attributes)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) + 200 * self.target for letter in text] + [2] * add_special_tokens

    def _switch_to_target_mode(self) -> None:
        self.target = True

    def _switch_to_input_mode(self) -> None:
        self.target = False


def test_marians_are_told_by_a_mark_in_the_text() -> None:
    tokenizer = Slow(supported_language_codes=[">>fra<<", ">>ron<<"])
    source, decoder = read(SourcePrompt("a", "b", tgt_lang="ron"), tokenizer)
    assert bytes(source[:-1]) == b">>ron<< a" and decoder == [2, ord("b") + 200] and not tokenizer.target
    assert read(SourcePrompt("a", tgt_lang=">>fra<<"), tokenizer)[0][2] == ord("f")
    with pytest.raises(InvalidRequestError, match=r"tgt_lang is 'rum'.* near it: 'fra', 'ron'"):
        read(SourcePrompt("a", tgt_lang="rum"), tokenizer)
    with pytest.raises(InvalidRequestError, match="a mark in the source's text"):
        read(SourcePrompt([5], tgt_lang="ron"), tokenizer)
    with pytest.raises(InvalidRequestError, match=r"src_lang is 'ron'; .* no languages"):
        read(SourcePrompt("a", src_lang="ron"), tokenizer)


def with_languages(**attributes: Any) -> Slow:
    return Slow(set_src_lang_special_tokens=None, **attributes)


def test_m2m100s_languages() -> None:
    codes = {"en": 300, "ro": 301, "fr": 302}
    tokenizer = with_languages(lang_code_to_id=codes, prefix_tokens=[300], suffix_tokens=[2])
    assert read(SourcePrompt("a", src_lang="ro", tgt_lang="fr"), tokenizer) == ([301, 97, 2], [2, 302])


def test_plbarts_languages() -> None:
    """It knows none by itself; what it is told stands behind the source."""
    codes = {"__java__": 300, "__python__": 301}
    kind: Any = type("PLBartTokenizer", (Slow,), {})
    tokenizer = kind(set_src_lang_special_tokens=None, lang_code_to_id=codes, prefix_tokens=[], suffix_tokens=[2])
    assert read(SourcePrompt("a", src_lang="java", tgt_lang="__python__"), tokenizer) == ([97, 2, 300], [301])
    with pytest.raises(InvalidRequestError, match=r"src_lang is 'jaba'.* near it: 'java'.*\(2 in all\)"):
        read(SourcePrompt("a", src_lang="jaba"), tokenizer)
