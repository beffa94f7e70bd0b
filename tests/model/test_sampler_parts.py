"""The parts of the sampler that are functions of tensors: ranking, inverse CDF, filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncengine.model.slot_entries import SlotEntries
from asyncengine.model.token_filters import _weights, drop_outside_nucleus, nucleus
from asyncengine.model.token_mass import TICKS, chunk_mass, draw_dense, draw_sparse, log_total
from asyncengine.model.token_ranking import top_tokens

ALMOST_ONE = 1 - 2.0**-53


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


class TestInverseCdf:
    @pytest.mark.parametrize("vocab", [1, 4, 127, 128, 129, 1000, 50_257])
    def test_extremes_draw_the_first_and_the_last_with_mass(self, vocab: int) -> None:
        first, last = vocab // 3, vocab - 1 - vocab // 4
        weights = torch.zeros(4, vocab)
        weights[:, first] = 1e-3
        weights[:, last] = 0.7
        u = column(0.0, 2.0**-53, 0.5, ALMOST_ONE)
        assert draw_dense(weights, u).tolist() == [first, first, last, last]
        ids = torch.arange(vocab).expand(4, -1)
        assert draw_sparse(ids, (weights * TICKS).long(), u).tolist() == [first, first, last, last]

    @pytest.mark.parametrize("vocab", [130, 5000, 151_936])
    def test_a_dropped_token_is_never_drawn(self, vocab: int) -> None:
        generator = torch.Generator().manual_seed(vocab)
        weights = torch.rand(1, vocab, generator=generator) ** 8
        weights *= torch.rand(1, vocab, generator=generator) < 0.05
        u = torch.cat([column(0.0, ALMOST_ONE), torch.rand(200, 1, generator=generator, dtype=torch.float64)])
        tokens = torch.cat([draw_dense(weights, point.view(1, 1)) for point in u])
        assert (weights[0, tokens] > 0).all()

    def test_tiny_weights_are_drawn_within_their_chunk(self) -> None:
        weights = torch.zeros(1, 300)
        weights[0, 0] = 1.0
        weights[0, 200], weights[0, 201] = 1e-12, 3e-12
        tokens = [int(draw_dense(weights, column(1 - tail))[0]) for tail in (5e-12, 3.5e-12, 2e-12, 1e-13)]
        assert tokens == [0, 200, 201, 201]

    def test_rows_without_mass_give_a_token_all_the_same(self) -> None:
        for vocab in (5, 500):
            nothing = torch.tensor([0.0, float("nan")]).unsqueeze(1).expand(2, vocab).clone()
            assert (draw_dense(nothing, column(0.5, 0.5)) < vocab).all()

    def test_is_the_inverse_of_the_cumulative_sum(self) -> None:
        weights = torch.rand(1, 3000, generator=torch.Generator().manual_seed(1)).pow(4)
        until = weights[0].double().cumsum(0) / weights.double().sum()
        for u in np.linspace(0, ALMOST_ONE, 97):
            token = int(draw_dense(weights, column(u))[0])
            assert until[token] > u - 1e-7
            assert token == 0 or until[token - 1] <= u + 1e-7


class TestTopTokens:
    @pytest.mark.parametrize("vocab", [1, 9, 1000, 4097, 50_257])
    @pytest.mark.parametrize("levels", [1, 3, 40, 10**6])
    def test_follow_the_ranking(self, vocab: int, levels: int) -> None:
        generator = torch.Generator().manual_seed(levels)
        values = torch.randint(-levels, levels + 1, (3, vocab), generator=generator).float() / 7
        values[1] *= 0.0  # zeros of both signs
        values[2, values[2] > 0] = -torch.inf
        for k in {1, min(2, vocab), min(50, vocab), min(333, vocab), vocab}:
            found = top_tokens(values, k)
            for row in range(3):
                ranking = np.lexsort((np.arange(vocab), -values[row].numpy()))
                assert found[row].tolist() == ranking[:k].tolist()


class TestNucleus:
    @pytest.mark.parametrize("levels", [0, 1, 5, 10**6])
    def test_a_search_of_the_whole_row_finds_the_same_as_one_of_the_likeliest(self, levels: int) -> None:
        generator = torch.Generator().manual_seed(levels)
        logits = torch.randint(0, levels + 1, (5, 200), generator=generator) * (8.0 / max(levels, 1))
        top_p = column(0.01, 0.3, 0.5, 0.9, 1 - 1e-6)
        (part,) = nucleus(logits.clone(), None, None, top_p)
        assert part.ids is not None
        weights = _weights(logits.clone(), None, None)
        drop_outside_nucleus(weights, top_p)
        assert torch.equal(part.mask(200), weights > 0)

    def test_rows_are_split_by_whether_the_likeliest_suffice(self) -> None:
        logits = torch.zeros(3, 4096)
        logits[1, 7] = 50.0
        peaked, flat = sorted(nucleus(logits, None, None, column(0.5, 0.9, 0.25)), key=lambda part: part.ids is None)
        assert peaked.rows is not None
        assert flat.rows is not None
        assert peaked.rows.tolist() == [1]
        assert flat.rows.tolist() == [0, 2]
        assert flat.mask(4096).sum(-1).tolist() == [2048, 1024]


class TestBatchShape:
    @pytest.mark.parametrize("vocab", [97, 1000, 32_001, 49_152])
    def test_weights_and_masses_are_bitwise_those_of_the_row_alone(self, vocab: int) -> None:
        logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
        scale = torch.full((64, 1), 1 / 0.7)
        alone = torch.cat([_weights(row.clone(), scale[:1], None) for row in logits.split(1)])
        mass = torch.cat([chunk_mass(row) for row in alone.split(1)])
        for size in range(1, 65, 1 if vocab < 30_000 else 7):
            together = _weights(logits[:size].clone(), scale[:size], None)
            assert torch.equal(together, alone[:size])
            assert torch.equal(chunk_mass(together), mass[:size])

    def test_softmax_in_place_is_softmax(self) -> None:
        logits = torch.randn(5, 7001, generator=torch.Generator().manual_seed(0)) * 4
        assert torch.equal(_weights(logits.clone(), None, None), torch.softmax(logits, -1))

    def test_log_total_is_logsumexp(self) -> None:
        for vocab in (1, 100, 50_257):
            logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(0)) * 4
            expected = torch.logsumexp(logits.double(), -1, keepdim=True)
            assert torch.allclose(log_total(logits), expected, rtol=0, atol=1e-5)


class TestSlotEntries:
    def test_come_with_the_rows_of_their_slots(self) -> None:
        entries = SlotEntries(4)
        entries.put(2, [5, 6], [0.5, 0.25])
        entries.put(0, [7], [1.0])
        entries.put(3, [8, 9], [2.0, 4.0])
        rows, ids, values = entries.of_batch(np.array([3, 1, 2, 3]))
        assert list(zip(rows.tolist(), ids.tolist(), values.tolist(), strict=True)) == [
            (0, 8, 2.0),
            (0, 9, 4.0),
            (2, 5, 0.5),
            (2, 6, 0.25),
            (3, 8, 2.0),
            (3, 9, 4.0),
        ]
        entries.remove(2)
        entries.remove(1)
        assert len(entries) == 3
        assert [a.tolist() for a in entries.of_batch(np.array([0, 2, 3]))] == [[0, 2, 2], [7, 8, 9], [1.0, 2.0, 4.0]]
        wanted = np.array([True, False])
        assert entries.of_batch(np.array([0, 3]), wanted)[1].tolist() == [7]
        entries.put(2, [1], [8.0])
        assert entries.of_batch(np.array([2, 3]))[1].tolist() == [1, 8, 9]
