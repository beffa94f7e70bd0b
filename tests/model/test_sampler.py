"""The sampler against a scalar reference in float64, one row at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from asyncengine.generation import GREEDY_BELOW, MAX_FACTOR, SamplingParams
from asyncengine.model.random_stream import uniforms
from asyncengine.model.sampler import Sampler
from asyncengine.step.batch import StepTokens, TokenLogprobs

CPU = torch.device("cpu")
NONE = np.empty(0, np.int32)
Probabilities = NDArray[np.float64]


def params(**changes: Any) -> SamplingParams:
    neutral = SamplingParams(
        n=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        repetition_penalty=1.0,
        num_logprobs=-1,
        logprobs_mode="raw",
        logit_bias=(),
        max_tokens=1000,
        min_tokens=0,
        seed=0,
        stop_strs=(),
        stop_token_ids=(),
        skip_special_tokens=True,
        detokenize=True,
    )
    return dataclasses.replace(neutral, **changes)


def ids(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def run(sampler: Sampler, logits: torch.Tensor, slots: list[int], positions: list[int]) -> StepTokens:
    return sampler.sample(logits.clone(), np.array(slots, np.int64), np.array(positions, np.int64))


def draw(
    logits: torch.Tensor,
    p: SamplingParams,
    *,
    branch: int = 0,
    prompt: NDArray[np.int32] = NONE,
    output: NDArray[np.int32] = NONE,
) -> StepTokens:
    """One token for one row, by a sampler of its own."""
    sampler = Sampler(1, logits.shape[-1], CPU)
    sampler.place(0, p, branch, prompt, output)
    return run(sampler, logits.view(1, -1), [0], [len(output)])


def logprobs_of(tokens: StepTokens, row: int = 0) -> TokenLogprobs:
    assert tokens.logprobs is not None
    entry = tokens.logprobs[row]
    assert entry is not None
    return entry


def adjusted(logits: Probabilities, p: SamplingParams, prompt: list[int], output: list[int]) -> Probabilities:
    x = [float(v) for v in logits]
    for token, bias in p.logit_bias:
        x[token] += bias
    for token in set(output):
        x[token] -= p.presence_penalty + p.frequency_penalty * output.count(token)
    for token in set(prompt) | set(output):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    if len(output) < p.min_tokens:
        for token in p.stop_token_ids:
            x[token] = -np.inf
    return np.array(x)


def distribution(x: Probabilities, p: SamplingParams) -> Probabilities:
    """What is drawn from, after temperature and filters, of adjusted logits."""
    if p.temperature == 0:
        return np.eye(len(x))[int(np.argmax(x))]
    weights = np.exp((x - x.max()) / p.temperature)
    ranking = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if p.top_k:
        ranking = ranking[: p.top_k]
    ranking = [i for i in ranking if weights[i] >= p.min_p * weights[ranking[0]]]
    total = sum(weights[i] for i in ranking)
    kept, mass = [], 0.0
    for i in ranking:
        if mass >= p.top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    result = np.zeros(len(x))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


def uniform(p: SamplingParams, branch: int, position: int) -> float:
    return float(uniforms(np.array([(p.seed + branch) % 2**64], np.uint64), np.array([position]))[0])


def may_be(token: int, x: Probabilities, p: SamplingParams, u: float) -> bool:
    """Whether the token is the inverse CDF at u, give or take the rounding of float32 at every threshold."""
    for top_p in {p.top_p, min(1.0, p.top_p + 1e-6), max(1e-9, p.top_p - 1e-6)}:
        for min_p in {p.min_p, p.min_p * (1 + 1e-5), p.min_p * (1 - 1e-5)}:
            weights = distribution(x, dataclasses.replace(p, top_p=top_p, min_p=min(1.0, min_p)))
            until = np.cumsum(weights)
            if weights[token] > 0 and until[token] - weights[token] <= u + 1e-5 and u - 1e-5 <= until[token]:
                return True
    return False


def vocab_logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


class TestGreedy:
    def test_takes_the_likeliest(self) -> None:
        logits = vocab_logits(7, 1000)
        sampler = Sampler(7, 1000, CPU)
        assert run(sampler, logits, list(range(7)), [0] * 7).token_ids.tolist() == logits.argmax(-1).tolist()

    @pytest.mark.parametrize("vocab", [1, 5, 127, 128, 129, 1000, 4099])
    def test_lowest_id_wins_a_tie(self, vocab: int) -> None:
        for tied in {(0, vocab - 1), (vocab // 2, vocab - 1), (vocab // 3, vocab // 2)}:
            logits = torch.zeros(2, vocab)
            logits[1, list(tied)] = 5.0
            tokens = run(Sampler(2, vocab, CPU), logits, [0, 1], [0, 0]).token_ids
            assert tokens.tolist() == [0, min(tied)]

    def test_ignores_filters_and_seed(self) -> None:
        p = params(temperature=0.0, top_k=3, top_p=0.1, min_p=0.9, seed=9)
        logits = vocab_logits(1, 300)
        assert draw(logits, p).token_ids.tolist() == logits.argmax(-1).tolist()

    def test_comes_after_bias_penalties_and_mask(self) -> None:
        logits = torch.tensor([3.0, 2.9, 2.8, 2.7, 0.0])
        p = params(
            temperature=0.0, presence_penalty=1.0, min_tokens=5, stop_token_ids=(1,), logit_bias=((2, -2.0), (4, 1.0))
        )
        assert draw(logits, p, output=ids(0)).token_ids.tolist() == [3]


class TestRandomStream:
    def test_is_a_function_of_key_and_position_alone(self) -> None:
        keys = np.array([1, 2, 3, 2**64 - 1], np.uint64)
        positions = np.array([0, 5, 6, 7])
        together = uniforms(keys, positions)
        alone = [float(uniforms(keys[i : i + 1], positions[i : i + 1])[0]) for i in range(4)]
        assert together.tolist() == alone

    def test_lies_in_the_unit_interval_evenly(self) -> None:
        n = 40_000
        for u in (
            uniforms(np.full(n, 5, np.uint64), np.arange(n)),
            uniforms(np.arange(n).astype(np.uint64), np.zeros(n, np.int64)),
        ):
            assert u.min() >= 0
            assert u.max() < 1
            counts = np.histogram(u, 100, (0, 1))[0]
            assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 149  # chi-square of 99 degrees, 0.1 %

    def test_neighbouring_seeds_and_positions_are_uncorrelated(self) -> None:
        n = 40_000
        keys, positions = np.arange(n).astype(np.uint64), np.arange(n)
        fixed = np.zeros(n, np.int64)
        pairs = [
            (uniforms(keys, fixed), uniforms(keys + np.uint64(1), fixed)),
            (uniforms(keys, fixed), uniforms(keys, fixed + 1)),
            (uniforms(keys * np.uint64(0) + np.uint64(3), positions), uniforms(keys * np.uint64(0), positions)),
        ]
        for a, b in pairs:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.02

    def test_branch_i_of_a_seed_is_branch_0_of_the_seed_plus_i(self) -> None:
        logits = vocab_logits(1, 2000)
        for seed in (0, 17, 2**64 - 2):
            for branch in (0, 1, 3):
                one = draw(logits, params(seed=seed), branch=branch)
                other = draw(logits, params(seed=(seed + branch) % 2**64))
                assert one.token_ids.tolist() == other.token_ids.tolist()

    def test_token_does_not_depend_on_slot_batch_or_preemption(self) -> None:
        logits = vocab_logits(6, 3000)
        p = params(seed=11, repetition_penalty=1.2, frequency_penalty=0.3, top_p=0.95)
        prompt = ids(1, 2, 3)

        steady = Sampler(8, 3000, CPU)
        steady.place(5, p, 2, prompt, NONE)
        steady.place(0, params(seed=1, top_k=4), 0, prompt, NONE)
        expected: list[int] = []
        for position in range(6):
            rows = torch.stack([logits[0], logits[position]])
            expected.append(int(run(steady, rows, [0, 5], [position, position]).token_ids[1]))

        moved = Sampler(8, 3000, CPU)
        for position in range(6):
            moved.place(position, p, 2, prompt, np.array(expected[:position], np.int32))
            assert (
                run(moved, logits[position : position + 1], [position], [position]).token_ids[0] == expected[position]
            )
            moved.release(position)


class TestFrequencies:
    @pytest.mark.parametrize(
        ("changes", "vocab"),
        [
            ({}, 400),
            ({"temperature": 0.6}, 50),
            ({"temperature": 1.7}, 50),
            ({"top_k": 5}, 50),
            ({"top_p": 0.8}, 50),
            ({"top_p": 0.8}, 400),
            ({"min_p": 0.1}, 50),
            ({"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 1.3}, 50),
            ({"min_p": 0.02, "top_p": 0.9}, 50),
        ],
        ids=str,
    )
    @pytest.mark.in_short("50")
    def test_are_those_of_the_exact_distribution(self, changes: dict[str, Any], vocab: int) -> None:
        draws = 40_000
        p = params(seed=3, **changes)
        logits = vocab_logits(1, vocab, spread=1.5)
        sampler = Sampler(1, vocab, CPU)
        sampler.place(0, p, 0, NONE, NONE)
        tokens = sampler.sample(logits.repeat(draws, 1), np.zeros(draws, np.int64), np.arange(draws)).token_ids

        expected = distribution(logits[0].double().numpy(), p) * draws
        found = np.bincount(tokens, minlength=vocab)
        assert not found[expected == 0].any()
        often = expected > 5
        df = int(often.sum())
        chi_square = ((found - expected)[often] ** 2 / expected[often]).sum()
        assert chi_square < df * (1 - 2 / (9 * df) + 3.1 * (2 / (9 * df)) ** 0.5) ** 3  # 0.1 %, Wilson and Hilferty
        assert abs(found - expected).max() < 8e-3 * draws


class TestFilters:
    def survivors(self, p: SamplingParams, logits: torch.Tensor) -> set[int]:
        """The tokens with a processed log-probability, of a vocabulary that all fits into the list."""
        entry = logprobs_of(draw(logits, dataclasses.replace(p, num_logprobs=len(logits), logprobs_mode="processed")))
        return set(entry.top_ids)

    def test_top_k_keeps_exactly_k_and_the_lowest_ids_of_a_tie(self) -> None:
        logits = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 0.0, 3.0])
        assert self.survivors(params(top_k=4), logits) == {6, 1, 3, 0}
        assert self.survivors(params(top_k=4), torch.zeros(3000)) == {0, 1, 2, 3}
        assert self.survivors(params(top_k=1), torch.zeros(3000)) == {0}

    def test_top_k_finds_ties_across_the_vocabulary(self) -> None:
        logits = torch.zeros(5000)
        logits[[4999, 3000, 2999, 128, 127]] = 7.0
        logits[[10, 4000]] = torch.tensor([-0.0, 0.0])
        assert self.survivors(params(top_k=3), logits) == {127, 128, 2999}
        assert self.survivors(params(top_k=17), logits) == {4999, 3000, 2999, 128, 127, *range(12)}

    @pytest.mark.parametrize("top_k", [1, 2, 50, 700, 2999, 3000])
    def test_top_k_keeps_the_largest(self, top_k: int) -> None:
        logits = vocab_logits(1, 3001)[0]
        assert self.survivors(params(top_k=top_k), logits) == set(logits.topk(top_k).indices.tolist())

    def test_min_p_is_relative_to_the_likeliest_after_temperature(self) -> None:
        logits = torch.tensor([0.0, -0.9, -1.1, -1.9, -2.1])
        assert self.survivors(params(min_p=float(np.exp(-1.0))), logits) == {0, 1}
        assert self.survivors(params(min_p=float(np.exp(-1.0)), temperature=2.0), logits) == {0, 1, 2, 3}
        assert self.survivors(params(min_p=float(np.exp(-1.0)), temperature=2.0, top_k=3), logits) == {0, 1, 2}
        assert self.survivors(params(min_p=1.0), torch.tensor([1.0, 3.0, 3.0, 2.0])) == {1, 2}

    @pytest.mark.parametrize("vocab", [7, 4000])
    def test_top_p_keeps_the_fewest_that_have_the_mass(self, vocab: int) -> None:
        logits = torch.full((vocab,), -50.0)
        logits[[3, 1, 5, 0]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        for top_p, kept in (
            (0.01, {3}),
            (0.39, {3}),
            (0.41, {3, 1}),
            (0.69, {3, 1}),
            (0.71, {3, 1, 5}),
            (0.91, {3, 1, 5, 0}),
        ):
            assert self.survivors(params(top_p=top_p), logits) == kept

    def test_top_p_keeps_the_lowest_ids_of_a_tie(self) -> None:
        assert self.survivors(params(top_p=0.5), torch.zeros(2048)) == set(range(1024))
        assert self.survivors(params(top_p=0.25), torch.zeros(2048)) == set(range(512))

    def test_top_p_is_of_what_top_k_and_min_p_leave(self) -> None:
        logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        assert self.survivors(params(top_p=0.55, top_k=2), logits) == {0}
        assert self.survivors(params(top_p=0.55), logits) == {0, 1}
        assert self.survivors(params(top_p=0.55, min_p=0.6), logits) == {0}

    def test_a_wide_nucleus_equals_the_reference(self) -> None:
        for seed, top_p in enumerate((0.3, 0.5, 0.9, 0.99, 0.9999)):
            logits = vocab_logits(1, 5000, seed=seed, spread=1.0)[0]
            p = params(top_p=top_p, temperature=1.5)
            expected = set(np.flatnonzero(distribution(logits.double().numpy(), p)).tolist())
            assert len(expected) > 256
            assert len(self.survivors(p, logits) ^ expected) <= 1  # float32 may move the last one

    def test_a_batch_may_mix_every_kind_of_row(self) -> None:
        kinds = [
            {"temperature": 0.0},
            {"top_k": 3},
            {},
            {"top_p": 0.5},
            {"temperature": 0.0},
            {"min_p": 0.3},
            {"top_p": 0.95, "temperature": 4.0},
            {"top_k": 500, "top_p": 0.5},
            {"repetition_penalty": 1.3},
        ]
        logits = vocab_logits(len(kinds), 4000)
        sampler = Sampler(len(kinds), 4000, CPU)
        for slot, changes in enumerate(kinds):
            sampler.place(slot, params(seed=slot, **changes), 0, ids(1, 2), NONE)
        rows = list(range(len(kinds)))
        drawn: list[list[int]] = [[] for _ in kinds]
        for order in (rows, rows[::-1], [2, 0, 8, 3, 1]):
            tokens = run(sampler, logits[order], order, [0] * len(order)).token_ids.tolist()
            for slot, token in zip(order, tokens, strict=True):
                p = params(seed=slot, **kinds[slot])
                x = adjusted(logits[slot].double().numpy(), p, [1, 2], drawn[slot])
                assert may_be(token, x, p, uniform(p, 0, 0))
                drawn[slot].append(token)


class TestPenalties:
    logits = torch.tensor([2.0, 1.0, -1.0, 0.5, -2.0])

    def processed(self, p: SamplingParams, prompt: NDArray[np.int32], output: NDArray[np.int32]) -> list[float]:
        p = dataclasses.replace(p, temperature=0.0, num_logprobs=5, logprobs_mode="processed")
        entry = logprobs_of(draw(self.logits, p, prompt=prompt, output=output))
        values = dict(zip(entry.top_ids, entry.top_logprobs, strict=True))
        return [values[i] for i in range(5)]

    @pytest.mark.parametrize(
        "changes",
        [
            {"presence_penalty": 0.7},
            {"presence_penalty": -0.7},
            {"frequency_penalty": 0.4},
            {"repetition_penalty": 1.5},
            {"repetition_penalty": 0.5},
            {"presence_penalty": 1.5, "frequency_penalty": -0.3, "repetition_penalty": 2.0},
        ],
        ids=str,
    )
    def test_equal_the_reference(self, changes: dict[str, Any]) -> None:
        p = params(**changes)
        for prompt, output in (([0, 2], []), ([4], [0, 0, 1]), ([1, 1, 3], [2, 2, 2, 2]), ([], [3]), ([], [])):
            x = adjusted(self.logits.double().numpy(), p, prompt, output)
            expected = x - np.log(np.exp(x).sum())
            assert self.processed(p, ids(*prompt), ids(*output)) == pytest.approx(expected.tolist(), abs=1e-5)

    def test_only_repetition_counts_the_prompt(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            assert self.processed(params(**{name: 1.0}), ids(0, 1), NONE) == self.processed(params(), NONE, NONE)
        repeated = self.processed(params(repetition_penalty=2.0), ids(0, 1), NONE)
        assert repeated != self.processed(params(), NONE, NONE)

    def test_count_the_tokens_that_the_sampler_draws(self) -> None:
        sampler = Sampler(4, 200, CPU)
        p = params(temperature=0.0, frequency_penalty=1.0, presence_penalty=0.5, repetition_penalty=1.1)
        sampler.place(2, p, 0, ids(5, 6), NONE)
        sampler.place(1, params(temperature=0.0), 0, NONE, NONE)
        logits = vocab_logits(2, 200, spread=0.5)
        output: list[int] = []
        for position in range(150):
            tokens = run(sampler, logits, [1, 2], [position, position]).token_ids.tolist()
            x = adjusted(logits[1].numpy(), p, [5, 6], output)
            assert tokens[0] == int(logits[0].argmax())
            assert x[tokens[1]] >= x.max() - 1e-5
            output.append(tokens[1])

    def test_survive_being_placed_again(self) -> None:
        p = params(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.2)
        logits = vocab_logits(1, 300, spread=0.4)
        steady, moved = Sampler(2, 300, CPU), Sampler(2, 300, CPU)
        steady.place(0, p, 0, ids(1), NONE)
        output: list[int] = []
        for position in range(20):
            output += run(steady, logits, [0], [position]).token_ids.tolist()
            moved.place(position % 2, p, 0, ids(1), np.array(output[:-1], np.int32))
            assert run(moved, logits, [position % 2], [position]).token_ids.tolist() == output[-1:]

    def test_are_forgotten_with_the_slot(self) -> None:
        sampler = Sampler(3, 100, CPU)
        p = params(temperature=0.0, presence_penalty=2.0)
        logits = vocab_logits(1, 100, spread=0.1)
        best = int(logits.argmax())
        for _ in range(3):
            for slot in (0, 1, 2):
                sampler.place(slot, p, 0, NONE, ids(best))
                assert run(sampler, logits, [slot], [1]).token_ids[0] != best
            for slot in (0, 1, 2):
                sampler.release(slot)
                sampler.release(slot)
                assert run(sampler, logits, [slot], [1]).token_ids[0] == best
        sampler.place(0, p, 0, NONE, NONE)
        assert run(sampler, logits, [0], [0]).token_ids[0] == best

    def test_tokens_outside_the_vocabulary_are_ignored(self) -> None:
        p = params(repetition_penalty=1.5, frequency_penalty=1.0, min_tokens=9, stop_token_ids=(70, 4))
        assert draw(self.logits, p, prompt=ids(-1, 5, 999), output=ids(77)).token_ids[0] in range(4)


class TestMaskAndBias:
    def test_stop_tokens_are_not_drawn_before_min_tokens(self) -> None:
        logits = torch.zeros(1, 200)
        logits[0, [10, 20]] = 30.0
        sampler = Sampler(2, 200, CPU)
        for temperature in (0.0, 1.0):
            sampler.place(1, params(temperature=temperature, min_tokens=3, stop_token_ids=(10, 20)), 0, NONE, NONE)
            tokens = [int(run(sampler, logits, [1], [position]).token_ids[0]) for position in range(5)]
            assert not set(tokens[:3]) & {10, 20}
            assert set(tokens[3:]) <= {10, 20}

    def test_mask_holds_after_preemption(self) -> None:
        logits = torch.zeros(100)
        logits[10] = 30.0
        p = params(temperature=0.0, min_tokens=3, stop_token_ids=(10,))
        assert draw(logits, p, output=ids(1, 2)).token_ids[0] == 0
        assert draw(logits, p, output=ids(1, 2, 3)).token_ids[0] == 10

    def test_bias_touches_its_own_row_only(self) -> None:
        logits = vocab_logits(3, 500)
        sampler = Sampler(5, 500, CPU)
        sampler.place(4, params(temperature=0.0, logit_bias=((7, 100.0),)), 0, NONE, NONE)
        sampler.place(2, params(temperature=0.0, logit_bias=((1, 50.0), (3, 100.0))), 0, NONE, NONE)
        sampler.place(0, params(temperature=0.0), 0, NONE, NONE)
        assert run(sampler, logits, [4, 0, 2], [0, 0, 0]).token_ids.tolist() == [7, int(logits[1].argmax()), 3]
        sampler.release(2)
        assert run(sampler, logits, [2, 4, 4], [0, 0, 0]).token_ids.tolist() == [int(logits[0].argmax()), 7, 7]

    def test_minus_100_forbids_and_plus_100_forces(self) -> None:
        logits = vocab_logits(1, 50)[0]
        p = params(logit_bias=((3, 100.0),))
        assert {int(draw(logits, dataclasses.replace(p, seed=s)).token_ids[0]) for s in range(50)} == {3}


class TestEverythingAtOnce:
    @settings(max_examples=150, deadline=None)
    @given(
        vocab=st.sampled_from([3, 40, 127, 600, 2500]),
        spread=st.sampled_from([0.0, 0.5, 3.0, 10.0]),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 2, 10, 300]),
        top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
        min_p=st.sampled_from([0.0, 0.05, 0.5]),
        penalties=st.sampled_from([(0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.5, 1.3), (-1.0, -0.5, 0.8)]),
        bias=st.dictionaries(st.integers(0, 2), st.integers(-20, 20).map(lambda quarters: quarters / 4), max_size=3),
        prompt=st.lists(st.integers(0, 2), max_size=5),
        output=st.lists(st.integers(0, 2), max_size=5),
        min_tokens=st.integers(0, 8),
        seed=st.integers(0, 2**64 - 1),
        branch=st.integers(0, 3),
    )
    def test_equals_the_reference(
        self,
        vocab: int,
        spread: float,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        penalties: tuple[float, float, float],
        bias: dict[int, float],
        prompt: list[int],
        output: list[int],
        min_tokens: int,
        seed: int,
        branch: int,
    ) -> None:
        presence, frequency, repetition = penalties
        p = params(
            temperature=temperature,
            top_k=0 if top_k >= vocab else top_k,
            top_p=top_p,
            min_p=min_p,
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
            logit_bias=tuple(sorted(bias.items())),
            min_tokens=min_tokens,
            stop_token_ids=(0, 1),
            seed=seed,
        )
        logits = vocab_logits(1, vocab, seed=seed % 1000, spread=spread)[0]
        token = int(draw(logits, p, branch=branch, prompt=ids(*prompt), output=ids(*output)).token_ids[0])
        x = adjusted(logits.double().numpy(), p, prompt, output)
        if temperature == 0:
            assert x[token] >= x.max() - 1e-5
        else:
            assert may_be(token, x, p, uniform(p, branch, len(output)))


class TestRowsAreIndependent:
    KINDS = (
        {"temperature": 0.0},
        {},
        {"temperature": 0.7},
        {"top_k": 50, "top_p": 0.9},
        {"top_p": 0.9},
        {"top_p": 0.97, "temperature": 3.0},
        {"min_p": 0.05},
        {"top_k": 7},
        {"top_k": 900, "min_p": 0.01},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.2, "top_p": 0.8},
        {"logit_bias": ((5, 3.0),), "min_tokens": 4, "stop_token_ids": (1, 2)},
    )

    @pytest.mark.parametrize("same", [False, True], ids=["mixed", "alike"])
    @pytest.mark.parametrize("vocab", [1000, 32_001])
    def test_bitwise_for_batches_of_1_to_64(self, vocab: int, same: bool) -> None:
        logits = vocab_logits(64, vocab)
        kinds = [self.KINDS[1 if same else i % len(self.KINDS)] for i in range(64)]

        def place(sampler: Sampler, slot: int, row: int) -> None:
            mode = ("raw", "masked", "processed")[row % 3]
            p = params(seed=row, num_logprobs=3, logprobs_mode=mode, **kinds[row])
            sampler.place(slot, p, 0, ids(1, 2, row), ids(row))

        expected = []
        for row in range(64):
            sampler = Sampler(1, vocab, CPU)
            place(sampler, 0, row)
            alone = run(sampler, logits[row : row + 1], [0], [1])
            expected.append((int(alone.token_ids[0]), logprobs_of(alone)))
        sampler = Sampler(64, vocab, CPU)
        for size in (*range(1, 18), 31, 32, 33, 63, 64) if vocab == 1000 and not same else (1, 2, 5, 16, 33, 64):
            rows = [(7 * i + size) % 64 for i in range(size)]
            for row in rows:
                place(sampler, 63 - row, row)
            together = run(sampler, logits[rows], [63 - row for row in rows], [1] * size)
            assert [(int(together.token_ids[i]), logprobs_of(together, i)) for i in range(size)] == [
                expected[row] for row in rows
            ]


class TestRowsThatCannotBeDrawn:
    NAN, INF = float("nan"), float("inf")

    @pytest.mark.parametrize(
        "changes",
        [{"temperature": 0.0}, {}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}],
        ids=str,
    )
    def test_give_the_likeliest_and_disturb_no_other(self, changes: dict[str, Any]) -> None:
        vocab = 700
        good = vocab_logits(1, vocab)
        nan, inf, negative_nan, lonely = (good.clone() for _ in range(4))
        nan[0, [0, 300]] = self.NAN
        negative_nan[0, 300] = -torch.tensor(self.NAN)
        inf[0, 345] = self.INF
        lonely[:] = -self.INF
        lonely[0, 77] = 1.0
        forbidden = torch.full_like(good, -self.INF)
        logits = torch.cat([good, nan, inf, torch.full_like(good, self.NAN), forbidden, lonely, negative_nan, good])
        sampler = Sampler(8, vocab, CPU)
        for slot in range(8):
            sampler.place(slot, params(num_logprobs=2, **changes), 0, NONE, NONE)
        tokens = run(sampler, logits, list(range(8)), [0] * 8)
        alone = draw(good[0], params(**changes)).token_ids[0]
        likeliest = int(torch.nan_to_num(nan, nan=-self.INF).argmax())
        other = int(torch.nan_to_num(negative_nan, nan=-self.INF).argmax())
        assert tokens.token_ids.tolist() == [alone, likeliest, 345, 0, 0, 77, other, alone]

    @pytest.mark.parametrize("mode", ["raw", "masked", "processed"])
    def test_have_logprobs_that_are_numbers(self, mode: str) -> None:
        for logits in (torch.full((300,), self.NAN), torch.full((300,), -self.INF), torch.full((300,), self.INF)):
            for changes in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}):
                tokens = draw(logits, params(num_logprobs=2, logprobs_mode=mode, **changes))
                assert tokens.token_ids.tolist() == [0]
                assert not np.isnan(logprobs_of(tokens).logprob)

    @pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.2}], ids=str)
    def test_a_tiny_temperature_is_greedy(self, changes: dict[str, Any]) -> None:
        logits = vocab_logits(1, 900)[0]
        for temperature in (1e-4, 1e-30, 1e-44, 5e-324):
            assert draw(logits, params(temperature=temperature, **changes)).token_ids[0] == int(logits.argmax())

    @pytest.mark.parametrize("temperature", [GREEDY_BELOW, 1.0, MAX_FACTOR])
    @pytest.mark.parametrize("penalty", [1 / MAX_FACTOR, MAX_FACTOR])
    def test_no_setting_makes_numbers_of_what_is_none(self, temperature: float, penalty: float) -> None:
        logits = vocab_logits(1, 40, spread=1000.0)[0]
        logits[7] = -math.inf
        for changes in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 5e-324}):
            p = params(
                temperature=temperature, repetition_penalty=penalty, frequency_penalty=-2.0, presence_penalty=2.0,
                logit_bias=((1, 100.0), (2, -100.0)), num_logprobs=3, logprobs_mode="processed", **changes,
            )  # fmt: skip
            tokens = draw(logits, p, prompt=ids(*range(40)), output=ids(1, 2, 3))
            assert int(tokens.token_ids[0]) != 7
            assert not np.isnan(logprobs_of(tokens).logprob)

    def test_an_enormous_temperature_is_uniform(self) -> None:
        logits = vocab_logits(1, 4, spread=100.0)[0]
        tokens = {int(draw(logits, params(temperature=1e30, seed=s)).token_ids[0]) for s in range(60)}
        assert tokens == {0, 1, 2, 3}


class TestLogprobs:
    def test_raw_are_of_the_untouched_logits(self) -> None:
        logits = vocab_logits(1, 3000)[0]
        expected = torch.log_softmax(logits.double(), -1)
        for changes in ({}, {"temperature": 0.0}, {"top_k": 3, "temperature": 0.2}, {"logit_bias": ((5, 9.0),)}):
            tokens = draw(logits, params(num_logprobs=4, **changes), prompt=ids(1), output=ids(2))
            entry = logprobs_of(tokens)
            top = expected.topk(4)
            assert entry.logprob == pytest.approx(float(expected[int(tokens.token_ids[0])]), abs=1e-5)
            assert entry.top_ids == tuple(top.indices.tolist())
            assert entry.top_logprobs == pytest.approx(tuple(top.values.tolist()), abs=1e-5)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"temperature": 0.5},
            {"top_k": 3},
            {"top_p": 0.6},
            {"min_p": 0.3, "temperature": 2.0},
            {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.5},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("vocab", [30, 1500])
    def test_processed_are_of_the_distribution_drawn_from(self, changes: dict[str, Any], vocab: int) -> None:
        logits = vocab_logits(1, vocab)[0]
        p = params(num_logprobs=20, logprobs_mode="processed", **changes)
        tokens = draw(logits, p, prompt=ids(1, 2))
        expected = distribution(adjusted(logits.double().numpy(), p, [1, 2], []), p)
        entry = logprobs_of(tokens)
        assert entry.logprob == pytest.approx(np.log(expected[int(tokens.token_ids[0])]), abs=1e-4)
        ranking = [i for i in np.argsort(-expected, kind="stable")[:20].tolist() if expected[i] > 0]
        assert entry.top_ids == tuple(ranking)
        assert entry.top_logprobs == pytest.approx([float(np.log(expected[i])) for i in ranking], abs=1e-4)

    def test_masked_are_of_what_may_be_drawn_at_any_temperature(self) -> None:
        logits = vocab_logits(1, 300)[0]
        allowed = tuple(range(3, 90))
        for changes in ({"temperature": 0.0}, {"temperature": 0.3, "top_k": 4}, {"temperature": 2.0, "top_p": 0.2}):
            p = params(
                num_logprobs=20, logprobs_mode="masked", allowed_token_ids=allowed, logit_bias=((7, 4.0),), **changes
            )
            tokens = draw(logits, p)
            biased = torch.full((300,), -torch.inf, dtype=torch.float64)
            biased[3:90] = logits[3:90].double()
            biased[7] += 4.0
            expected = torch.log_softmax(biased, -1)
            entry = logprobs_of(tokens)
            assert entry.logprob == pytest.approx(float(expected[int(tokens.token_ids[0])]), abs=1e-4)
            assert entry.top_ids == tuple(torch.argsort(expected, descending=True, stable=True)[:20].tolist())

    def test_processed_of_a_greedy_row_are_at_temperature_1(self) -> None:
        logits = vocab_logits(1, 100)[0]
        p = params(num_logprobs=1, logprobs_mode="processed", temperature=0.0, logit_bias=((9, 20.0),), top_k=2)
        biased = logits.clone()
        biased[9] += 20.0
        expected = float(torch.log_softmax(biased.double(), -1)[9])
        assert logprobs_of(draw(logits, p)) == TokenLogprobs(
            pytest.approx(expected, abs=1e-5), (9,), (pytest.approx(expected, abs=1e-5),)
        )

    def test_are_given_only_where_asked_for(self) -> None:
        logits = vocab_logits(3, 100)
        sampler = Sampler(3, 100, CPU)
        sampler.place(1, params(num_logprobs=0), 0, NONE, NONE)
        tokens = run(sampler, logits, [0, 1, 2], [0, 0, 0])
        assert tokens.logprobs is not None
        assert tokens.logprobs[0] is None
        assert tokens.logprobs[2] is None
        assert logprobs_of(tokens, 1).top_ids == ()
        assert run(sampler, logits[:1], [0], [0]).logprobs is None

    def test_do_not_change_the_draw(self) -> None:
        logits = vocab_logits(1, 3000)[0]
        for changes in ({}, {"top_k": 30}, {"top_p": 0.9}, {"temperature": 2.0, "min_p": 0.01}):
            plain = draw(logits, params(seed=5, **changes)).token_ids
            for mode in ("raw", "masked", "processed"):
                asked = draw(logits, params(seed=5, num_logprobs=3, logprobs_mode=mode, **changes)).token_ids
                assert asked.tolist() == plain.tolist()


class TestInputs:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
    def test_any_float_type(self, dtype: torch.dtype, changes: dict[str, Any]) -> None:
        logits = vocab_logits(1, 1000)[0].to(dtype)
        p = params(num_logprobs=2, **changes)
        low, full = draw(logits, p), draw(logits.float(), p)
        assert low.token_ids.dtype == np.int32
        assert low.token_ids.tolist() == full.token_ids.tolist()
        assert low.logprobs == full.logprobs

    def test_no_rows(self) -> None:
        tokens = run(Sampler(1, 10, CPU), torch.zeros(0, 10), [], [])
        assert tokens.token_ids.tolist() == []
        assert tokens.logprobs is None

    def test_a_failed_place_leaves_the_slot_free(self) -> None:
        logits = vocab_logits(1, 50)
        sampler = Sampler(1, 50, CPU)
        p = params(logit_bias=((3, 100.0),), presence_penalty=1.0, num_logprobs=2)
        sampler.place(0, p, 0, NONE, NONE)
        with pytest.raises((TypeError, ValueError)):
            sampler.place(0, dataclasses.replace(p, top_p="much"), 0, NONE, NONE)
        tokens = run(sampler, logits, [0], [0])
        assert tokens.token_ids.tolist() == [int(logits.argmax())]
        assert tokens.logprobs is None

    def test_logits_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            logits = vocab_logits(1, 500)
        sampler = Sampler(1, 500, CPU)
        for _ in range(2):
            sampler.place(0, params(top_p=0.9, frequency_penalty=1.0), 0, ids(1), NONE)
            for position in range(70):
                run(sampler, logits, [0], [position])
