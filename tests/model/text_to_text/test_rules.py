"""What may not be written, compared with transformers' own processors of logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from asyncengine.logits_processor import LogitsRow
from asyncengine.model.text_to_text.rules import Rules, notes_of

SIZE, END = 9, 2
TOKENS = st.lists(st.integers(0, SIZE - 1), max_size=9)


def held(rules: Rules, source: list[int], prompt: list[int], text: list[int]) -> list[int]:
    """Which tokens may be written."""
    [hold] = rules.of(source)
    logits = torch.zeros(SIZE)
    hold(logits, LogitsRow(np.array(prompt, np.int32), np.array(text, np.int32), 0))
    return torch.isfinite(logits).nonzero()[:, 0].tolist()


@settings(max_examples=60)
@given(TOKENS.filter(bool), st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=3), TOKENS, st.integers(1, 3))
def test_they_are_transformers(source: list[int], prompt: list[int], text: list[int], size: int) -> None:
    words = [[3], [4, 5], [6, 7, 6], [END]]
    generation = GenerationConfig(
        no_repeat_ngram_size=size, encoder_no_repeat_ngram_size=4 - size, min_length=5, bad_words_ids=words,
        suppress_tokens=[0, SIZE + 4], begin_suppress_tokens=[1, 8],
    )  # fmt: skip
    ids = torch.tensor([prompt + text])
    theirs = LogitsProcessorList(
        [
            NoRepeatNGramLogitsProcessor(size),
            EncoderNoRepeatNGramLogitsProcessor(4 - size, torch.tensor([source])),
            NoBadWordsLogitsProcessor(words, torch.tensor([END])),
            MinLengthLogitsProcessor(5, torch.tensor([END])),
            SuppressTokensLogitsProcessor([0]),
            SuppressTokensAtBeginLogitsProcessor([1, 8], len(prompt)),
        ]
    )
    expected = torch.isfinite(theirs(ids, torch.zeros(1, SIZE)))[0].nonzero()[:, 0].tolist()
    assert held(Rules(generation, (END,), SIZE), source, prompt, text) == expected


def test_new_tokens_may_be_demanded() -> None:
    rules = Rules(GenerationConfig(min_new_tokens=2), (END,), SIZE)
    assert END not in held(rules, [], [4, 4, 4], [5])
    assert END in held(rules, [], [4, 4, 4], [5, 6])


def test_where_there_are_none_nothing_is_called() -> None:
    assert not Rules(GenerationConfig(min_length=0, bad_words_ids=[[END]]), (END,), SIZE).of([1])


@pytest.mark.parametrize(
    ("says", "notes"),
    [
        ({}, []),
        ({"num_beams": 1, "length_penalty": 2.0}, []),
        ({"num_beams": 4}, ["a beam search; requests with num_beams = 4 get one"]),
        ({"encoder_repetition_penalty": 1.2}, ["says encoder_repetition_penalty = 1.2, which is passed over"]),
        ({"encoder_repetition_penalty": 1.0, "num_beam_groups": 1, "diversity_penalty": 0.0}, []),
    ],
)
def test_what_does_not_hold_is_said(says: dict[str, Any], notes: list[str]) -> None:
    found = notes_of(GenerationConfig(**says))
    assert len(found) == len(notes) and all(part in note for part, note in zip(notes, found, strict=True))
