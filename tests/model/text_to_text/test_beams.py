"""Beam searches of models that write one text of another: what transformers finds, and how likely it says it is."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, RequestResult, SourcePrompt
from tests.model.text_to_text import checkpoints
from tests.model.text_to_text.checkpoints import EOS, LANGUAGE, MOST, source

pytestmark = pytest.mark.loops("either")

SOURCES = [source(seed, length) for seed, length in enumerate((3, 9, 20))]


def engine(path: Path, **changes: Any) -> AsyncEngine:
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_page_size": 4, "max_num_sequence": 12}
    return AsyncEngine(EngineConfig(str(path), **(values | changes)))


def found(path: Path, ids: Sequence[int], begun: int, **asked: Any) -> list[tuple[list[int], float]]:
    """What transformers finds, best first, with its scores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = checkpoints.loaded(path).generate(
            torch.tensor([list(ids)]), do_sample=False, return_dict_in_generate=True, output_scores=True, **asked
        )
    texts = [sequence[begun:] for sequence in made.sequences.tolist()]
    texts = [text[: text.index(EOS) + 1] if EOS in text else text for text in texts]
    return list(zip(texts, made.sequences_scores.tolist(), strict=True))


def agree(result: RequestResult, expected: list[tuple[list[int], float]]) -> None:
    assert [output.token_ids for output in result.outputs] == [tokens for tokens, _ in expected]
    assert [output.score for output in result.outputs] == pytest.approx([score for _, score in expected], abs=1e-4)


@pytest.mark.parametrize("kind", ["bart", "marian", "m2m_100", "pegasus", "t5", "umt5"])
@pytest.mark.in_short("marian", "t5")
async def test_they_find_what_transformers_finds(kind: str, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, kind, 1)
    async with engine(path, prefill_chunk_size=10) as serving:
        searching = GenerationConfig(num_beams=4, n=4, max_tokens=MOST, length_penalty=0.6)
        results = await asyncio.gather(*[serving.generate(each, searching) for each in SOURCES])
        for given, result in zip(SOURCES, results, strict=True):
            asked = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.6, "max_new_tokens": MOST}
            agree(result, found(path, given, 1, **asked))


async def test_with_all_that_the_checkpoint_says_of_it(tmp_path: Path) -> None:
    """As transformers' own ``generate`` goes by it where nothing is asked for."""
    stated = {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 2, "min_length": 4}
    path = checkpoints.write(tmp_path, "bart", 2, {**stated, "max_length": MOST})
    async with engine(path) as serving:
        for given in SOURCES:
            result = await serving.generate(given, GenerationConfig(num_beams=3, n=2, max_tokens=MOST - 1))
            agree(result, found(path, given, 1, num_return_sequences=2))
        [note] = serving.health().notes
        assert "requests with num_beams = 3 get one" in note
        greedy = await serving.generate(SOURCES[1], GenerationConfig(max_tokens=MOST - 1))
        assert list(greedy.token_ids) == checkpoints.reference(path, SOURCES[1], MOST - 1)


@pytest.mark.parametrize("stated", [True, False])
async def test_a_language_that_is_forced_counts_as_a_token_of_the_text(stated: bool, tmp_path: Path) -> None:
    """It is part of the prompt here, and of the answer there: the length by which scores are divided has it."""
    path = checkpoints.write_nllb(tmp_path)
    language = LANGUAGE["fra_Latn"]
    if stated:
        values = json.loads((path / "generation_config.json").read_text())
        (path / "generation_config.json").write_text(json.dumps(values | {"forced_bos_token_id": language}))
    async with engine(path) as serving:
        asked = SourcePrompt("abc def", tgt_lang=None if stated else "fra_Latn")
        result = await serving.generate(asked, GenerationConfig(num_beams=4, n=4, max_tokens=MOST - 1))
        ids = checkpoints.nllb()("abc def")["input_ids"]
        there = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": MOST, "forced_bos_token_id": language}
        agree(result, found(path, ids, 2, **there))
        begun = SourcePrompt("abc def", "d", tgt_lang="fra_Latn")
        assert (await serving.generate(begun, GenerationConfig(num_beams=2, max_tokens=2))).outputs[0].score is not None
