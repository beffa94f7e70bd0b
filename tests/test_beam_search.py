"""What a beam search may be asked for, and what becomes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from asyncengine import GenerationConfig, InvalidRequestError
from asyncengine.generation import SamplingParams, SearchParams, resolve
from asyncengine.grammar.protocol import Grammar, Matcher

EOS = 9


def resolved(defaults: GenerationConfig | None = None, **fields: Any) -> SamplingParams:
    config, limits = (
        GenerationConfig(**fields),
        {"vocab_size": 100, "eos_token_ids": (EOS,), "max_tokens": 50, "seed": 0},
    )
    return resolve(config, defaults or GenerationConfig(), **limits)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 0}, r"num_beams is 0; allowed: 1\.\.64"),
    ({"num_beams": 65}, r"num_beams is 65; allowed: 1\.\.64"),
    ({"num_beams": 2.0}, r"num_beams is 2\.0; allowed: 1\.\.64, an integer"),
    ({"num_beams": 2, "n": 3}, r"n is 3; allowed: 1\.\.num_beams = 2"),
    ({"num_beams": 2, "temperature": 1.0}, r"temperature is 1\.0; a beam search \(num_beams = 2\) draws nothing"),
    ({"num_beams": 2, "top_p": 0.9}, "top_p is 0.9; a beam search"),
    ({"num_beams": 2, "top_k": 5}, "top_k is 5; a beam search"),
    ({"num_beams": 2, "min_p": 0.1}, "min_p is 0.1; a beam search"),
    ({"num_beams": 2, "stop_strs": "end"}, r"stop_strs is \('end',\); a beam search .* has stop_token_ids alone"),
    ({"num_beams": 2, "logprobs": True, "logprobs_mode": "masked"}, "logprobs_mode is 'masked'; a beam search"),
    ({"num_beams": 2, "length_penalty": 5.5}, r"length_penalty is 5\.5; allowed: \[-5, 5\]"),
    ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty is nan"),
    ({"num_beams": 2, "early_stopping": "always"}, "early_stopping is 'always'; allowed: True, False, 'never'"),
    ({"num_beams": 2, "early_stopping": 1}, "early_stopping is 1; allowed"),
    ({"num_beams": 2, "early_stopping": np.True_}, r"early_stopping is np\.True_; allowed"),
    ({"num_beams": 2, "early_stopping": np.arange(2)}, r"early_stopping is array\(\[0, 1\]\); allowed"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[str(fields) for fields, _ in WRONG])
def test_what_is_wrong_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        GenerationConfig(**fields)


@pytest.mark.parametrize("fields", [{"length_penalty": 1.0}, {"early_stopping": False}], ids=str)
def test_what_needs_a_search_is_refused_without(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(InvalidRequestError, match=f"{name} is .*; it needs a beam search: num_beams of 2 or more"):
        resolved(**fields)


def test_where_nothing_is_said_the_checkpoint_s_word_holds() -> None:
    stated = GenerationConfig(length_penalty=2.0, early_stopping=True, temperature=0.7, top_k=50)
    params = resolved(stated, num_beams=4, n=2)
    assert params.search == SearchParams(4, 2.0, True) and params.temperature == 0.0
    assert resolved(stated, num_beams=4, length_penalty=0, early_stopping=False).search == SearchParams(4, 0.0, False)
    assert resolved(num_beams=4).search == SearchParams(4, 1.0, False)
    assert resolved(stated).search is None and resolved(stated).temperature == 0.7


def test_it_is_as_many_sequences_as_it_has_beams() -> None:
    """And looks at so many tokens of each that enough of them end no text."""
    params = resolved(num_beams=4, n=2)
    assert (params.num_sequences, params.num_candidates) == (4, 8)
    assert resolved(num_beams=4, stop_token_ids=[1, 2]).num_candidates == 16
    assert resolved(num_beams=4, ignore_eos=True).num_candidates == 8
    assert resolved(n=3).num_sequences == 3


def test_what_a_grammar_ends_by_ends_texts_though_the_end_token_is_ignored() -> None:
    class Ends(Grammar):
        end_token_ids = (EOS, 8)

        def matcher(self) -> Matcher:
            raise NotImplementedError

    params = dataclasses.replace(resolved(num_beams=4, ignore_eos=True, stop_token_ids=[1]), grammar=Ends())
    assert params.ending_token_ids == (1, EOS, 8) and params.num_candidates == 16


def test_a_copy_without_search_draws() -> None:
    config = GenerationConfig(num_beams=4, length_penalty=2.0, early_stopping=True, max_tokens=3)
    assert config.without_search() == GenerationConfig(max_tokens=3)
