"""The draw at drafted positions: token for token that of decoding one by one, and so of the model's distribution."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncengine import tiny
from asyncengine.model import verified_draw
from asyncengine.model.sampler import Sampler
from asyncengine.step.batch import StepBatch
from tests.model.test_sampler import params

VOCAB = 24
CPU = torch.device("cpu")
NONE = np.empty(0, np.int32)


def logits_after(token_id: int) -> torch.Tensor:
    """A model whose next token depends on the last one alone."""
    return torch.from_numpy(np.random.default_rng(token_id).normal(0, 1.5, VOCAB).astype(np.float32))


def batch_of(last: NDArray[np.int64], drafts: NDArray[np.int64], position: int) -> StepBatch:
    """One step of rows with (rows, drafts) drafts each."""
    rows, length = drafts.shape
    count = length + 1
    nothing = np.empty(0, np.int64)
    return StepBatch(
        token_ids=np.concatenate([last[:, None], drafts], axis=1).reshape(-1).astype(np.int32),
        positions=np.zeros(rows * count, np.int32),
        query_start=(np.arange(rows + 1) * count).astype(np.int32),
        context_lens=np.zeros(rows, np.int32),
        block_tables=np.zeros((rows, 1), np.int32),
        slot_mapping=np.arange(rows * count),
        sample_index=np.arange(rows * count),
        sample_slots=np.repeat(np.arange(rows), count),
        sample_positions=np.tile(np.arange(count), rows) + position,
        copies=nothing.reshape(0, 2),
        num_decodes=rows,
        draft_lengths=np.full(rows, length, np.int64),
    )


def drawn_with_drafts(sampler: Sampler, rows: int, tokens: int, seed: int) -> list[list[int]]:
    """What `rows` slots generate after token 0, with drafts that are right now and then."""
    random = np.random.default_rng(seed)
    table = torch.stack([logits_after(token) for token in range(VOCAB)])
    found: list[list[int]] = [[0] for _ in range(rows)]
    for slot in range(rows):  # slots advance at their own pace
        while len(found[slot]) <= tokens:
            length = int(random.integers(1, 5))
            batch = batch_of(np.array([found[slot][-1]]), random.integers(0, VOCAB, (1, length)), len(found[slot]) - 1)
            batch = dataclasses.replace(batch, sample_slots=np.full(length + 1, slot))
            result = verified_draw.draw(sampler, table[batch.token_ids].clone(), batch)
            assert result.taken is not None and 1 <= result.taken[0] <= length + 1
            found[slot] += result.token_ids[: result.taken[0]].tolist()
            for row, forced in result.forced.items():
                assert row == result.taken[0] - 1
                found[slot] += forced
    return [own[1 : tokens + 1] for own in found]


def drawn_one_by_one(sampler: Sampler, rows: int, tokens: int) -> list[list[int]]:
    table = torch.stack([logits_after(token) for token in range(VOCAB)])
    found: list[list[int]] = [[0] for _ in range(rows)]
    for position in range(tokens):
        last = [own[-1] for own in found]
        drawn = sampler.sample(table[last].clone(), np.arange(rows), np.full(rows, position))
        for own, token_id in zip(found, drawn.token_ids.tolist(), strict=True):
            own.append(token_id)
    return [own[1:] for own in found]


def p_value(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """Of Pearson's chi-square test: how often counts would be as far from what is expected, if that is right."""
    assert counts.sum() == pytest.approx(expected.sum())
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def merged(
    counts: NDArray[np.int64], expected: NDArray[np.float64], least: float = 5.0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Cells of which fewer than `least` are expected put together, from the rarest on, until each has as many."""
    order = np.argsort(expected)
    cells = np.zeros(len(order), dtype=np.int64)
    cell, held = 0, 0.0
    left = float(expected.sum())
    for index in order.tolist():
        cells[index] = cell
        held += float(expected[index])
        left -= float(expected[index])
        if held >= least and left >= least:
            cell, held = cell + 1, 0.0
    number = cell + 1
    return np.bincount(cells, counts, number).astype(np.int64), np.bincount(cells, expected, number)


def push(logits: torch.Tensor, row: Any) -> None:
    logits[(5 * len(row.token_ids)) % VOCAB] += 3.0


@pytest.mark.parametrize(
    "wishes",
    [
        {"temperature": 0.0},
        {},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.02},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.7},
        {"temperature": 0.0, "presence_penalty": 1.5},
        {"bad_words": ((3, 4), (7,)), "allowed_token_ids": tuple(range(1, 20))},
        {"logits_processors": (push,)},
        {"min_tokens": 9, "stop_token_ids": (1, 2, 3), "logit_bias": ((2, 4.0),)},
    ],
    ids=lambda wishes: "+".join(wishes) or "plain",
)
def test_tokens_are_those_of_drawing_one_by_one(wishes: dict[str, Any]) -> None:
    rows, tokens = 4, 16
    samplers = [Sampler(rows, VOCAB, CPU) for _ in range(2)]
    for sampler in samplers:
        for slot in range(rows):
            sampler.place(slot, params(seed=100 * slot, **wishes), 0, np.zeros(1, np.int32), NONE)
    assert drawn_with_drafts(samplers[0], rows, tokens, seed=1) == drawn_one_by_one(samplers[1], rows, tokens)


def test_rows_with_and_without_state_share_a_step() -> None:
    sampler, alone = Sampler(3, VOCAB, CPU), Sampler(3, VOCAB, CPU)
    wishes = [params(seed=1, num_logprobs=2), params(seed=2, presence_penalty=2.0, num_logprobs=0), params(seed=3)]
    for slot, wish in enumerate(wishes):
        sampler.place(slot, wish, 0, NONE, NONE)
        alone.place(slot, wish, 0, NONE, NONE)
    table = torch.stack([logits_after(token) for token in range(VOCAB)])
    right = np.array(drawn_one_by_one(alone, 3, 3))
    drafts = right.copy()
    drafts[2, 1] = (drafts[2, 1] + 1) % VOCAB
    batch = batch_of(np.zeros(3, np.int64), drafts, 0)
    result = verified_draw.draw(sampler, table[batch.token_ids].clone(), batch)
    assert result.taken is not None and result.taken.tolist() == [4, 4, 2]
    found = result.token_ids.reshape(3, 4)
    assert found[:2, :3].tolist() == right[:2].tolist()
    assert found[2, :2].tolist() == right[2, :2].tolist()
    assert result.logprobs is not None
    wanted = [None if entry is None else len(entry.top_ids) for entry in result.logprobs]
    assert wanted == [2] * 4 + [0] * 4 + [None] * 4
    for row in range(2):
        given = np.concatenate([[0], right[row]])
        for token, before, entry in zip(found[row], given, result.logprobs[4 * row :], strict=False):
            expected = torch.log_softmax(logits_after(int(before)).double(), 0)[int(token)].item()
            assert entry is not None and entry.logprob == pytest.approx(expected, abs=1e-5)


def test_a_processor_that_raises_at_a_draft_leaves_the_tokens_before() -> None:
    def fussy(logits: torch.Tensor, row: Any) -> None:
        if len(row.token_ids) == 2:
            raise RuntimeError("enough")

    sampler, alone = Sampler(1, VOCAB, CPU), Sampler(1, VOCAB, CPU)
    alone.place(0, params(seed=1), 0, NONE, NONE)
    sampler.place(0, params(seed=1, logits_processors=(fussy,)), 0, NONE, NONE)
    right = drawn_one_by_one(alone, 1, 4)
    table = torch.stack([logits_after(token) for token in range(VOCAB)])
    batch = batch_of(np.zeros(1, np.int64), np.array(right), 0)
    result = verified_draw.draw(sampler, table[batch.token_ids].clone(), batch)
    assert result.taken is not None and result.taken.tolist() == [2]
    assert result.token_ids[:2].tolist() == right[0][:2]
    assert {entry: str(error) for entry, error in result.failed.items()} == {2: "enough"}


@pytest.mark.parametrize("draft", ["likeliest", "likely", "random"])
def test_the_second_token_of_a_run_has_the_models_distribution(draft: str) -> None:
    """20,000 draws at temperature 1, whatever the drafts are like; also of the token after a draft that was kept."""
    rows = 20_000
    sampler = Sampler(rows, VOCAB, CPU)
    random = np.random.default_rng(7)
    sampler._key[:] = random.integers(0, 2**63, rows).astype(np.uint64)
    sampler._way[:] = 3  # plain
    table = torch.stack([logits_after(token) for token in range(VOCAB)])
    first = torch.softmax(table[0].double(), 0).numpy()
    guesses = {
        "likeliest": np.full(rows, int(first.argmax())),
        "likely": random.choice(VOCAB, rows, p=first),
        "random": random.integers(0, VOCAB, rows),
    }[draft]
    batch = batch_of(np.zeros(rows, np.int64), guesses[:, None], 0)
    result = verified_draw.draw(sampler, table[batch.token_ids].clone(), batch)
    tokens = result.token_ids.reshape(rows, 2)
    assert result.taken is not None
    expected = first * rows
    assert p_value(np.bincount(tokens[:, 0], minlength=VOCAB), expected) > 0.01
    kept = result.taken == 2
    assert np.array_equal(kept, tokens[:, 0] == guesses)
    given = torch.softmax(table.double(), 1).numpy()[guesses[kept]].sum(axis=0)
    assert p_value(np.bincount(tokens[kept, 1], minlength=VOCAB), given) > 0.01


def test_over_the_tiny_models_vocabulary_the_distribution_is_the_models() -> None:
    """20,000 draws of the embedded model at temperature 1.5, with drafts of the embedded draft model.

    Of the first token, and of the one after a draft that was kept; cells of which fewer than 5 are expected are merged.
    """
    rows, part = 20_000, 2_000
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    prompt = torch.tensor(tokenizer("It was a very").input_ids)
    model, draft = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny.PATH, tiny.DRAFT_PATH))
    random = np.random.default_rng(3)
    with torch.inference_mode():
        first, guess = (torch.log_softmax(own(prompt[None]).logits[0, -1].double() / 1.5, 0) for own in (model, draft))
        guesses = random.choice(len(guess), rows, p=guess.exp().numpy())
        known, which = np.unique(guesses, return_inverse=True)
        texts = torch.cat([prompt.expand(len(known), -1), torch.from_numpy(known)[:, None]], dim=1)
        second = torch.log_softmax(model(texts, logits_to_keep=1).logits[:, 0].double() / 1.5, 1)
    vocabulary = len(first)
    assert vocabulary == 1024
    keys = random.integers(0, 2**63, rows).astype(np.uint64)
    tokens, kept = np.empty((rows, 2), np.int64), np.empty(rows, np.bool_)
    for start in range(0, rows, part):
        own = slice(start, start + part)
        sampler = Sampler(part, vocabulary, CPU)
        sampler._key[:], sampler._way[:] = keys[own], 3  # plain
        logits = torch.stack([first.expand(part, -1), second[which[own]]], dim=1).float().reshape(2 * part, -1)
        result = verified_draw.draw(sampler, logits, batch_of(np.zeros(part, np.int64), guesses[own, None], 0))
        assert result.taken is not None
        tokens[own], kept[own] = result.token_ids.reshape(part, 2), result.taken == 2
    assert np.array_equal(kept, tokens[:, 0] == guesses)
    assert 0.02 < kept.mean() < 0.9, "some drafts are right and some are wrong"
    for drawn, expected in (
        (tokens[:, 0], first.exp().numpy() * rows),
        (tokens[kept, 1], second.exp().numpy()[which[kept]].sum(axis=0)),
    ):
        counts, cells = merged(np.bincount(drawn, minlength=vocabulary), expected)
        assert len(cells) > 10
        assert p_value(counts, cells) > 0.01
        wrong = np.roll(cells, 1)
        assert p_value(counts, wrong * cells.sum() / wrong.sum()) < 1e-6, "the test would not notice"
