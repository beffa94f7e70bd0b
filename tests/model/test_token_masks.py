from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from asyncengine.grammar.bits import num_words, row_of
from asyncengine.model.token_masks import TokenMasks
from tests.model.test_sampler import params

CPU = torch.device("cpu")


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 199, 1024])
@pytest.mark.parametrize("rows", [[0], [2], [0, 1, 2, 3], [1, 3], [1, 2]])
def test_exactly_the_tokens_without_a_bit_are_taken_out(vocab: int, rows: list[int]) -> None:
    generator = np.random.default_rng(vocab)
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(0)) * 1e3
    allowed = generator.random((len(rows), vocab)) < 0.5
    words = np.stack([row_of(np.flatnonzero(row).tolist(), num_words(vocab)) for row in allowed])
    expected = logits.clone()
    for row, own in zip(rows, allowed, strict=True):
        expected[row][torch.from_numpy(~own)] = -torch.inf
    TokenMasks(4, vocab, CPU).apply(logits, np.array(rows), words)
    assert torch.equal(logits, expected)


def test_a_forbidden_token_is_out_however_likely_it_is() -> None:
    logits = torch.tensor([[torch.inf, 1.0, torch.inf]])
    TokenMasks(1, 3, CPU).apply(logits, np.array([0]), row_of([1, 2], 1)[None])
    assert logits.tolist() == [[-torch.inf, 1.0, torch.inf]]


class Choosing:
    """A grammar, and its matcher, of tokens 1, 2, 3, ...: after each odd one there is a choice of two."""

    end_token_ids: tuple[int, ...] = ()
    finished = False

    def __init__(self) -> None:
        self.last = 1
        self.filled: list[int] = []

    def matcher(self) -> Any:
        return self

    @property
    def forces(self) -> bool:
        return self.last % 2 == 0

    def fill(self, row: Any) -> None:
        self.filled.append(self.last)
        row[:] = row_of([self.last + 1] if self.forces else [self.last + 1, 0], len(row))

    def accept(self, token_id: int) -> None:
        assert token_id == self.last + 1
        self.last = token_id


def test_a_row_is_filled_when_the_logits_are_under_way_and_not_when_a_token_is_accepted() -> None:
    grammar, masks = Choosing(), TokenMasks(1, 64, CPU)
    masks.put(0, params(grammar=grammar, jumps=True, max_tokens=100), np.empty(0, np.int32))
    rows, failed = np.zeros(1, np.int64), dict[int, Exception]()
    for drawn in (2, 4, 6):
        before = len(grammar.filled)
        words = masks.fill(rows, rows, np.array([drawn - 2]), failed)
        assert words[0].tolist() == row_of([drawn, 0], 2).tolist()
        assert grammar.filled[before:] == [drawn - 1]
        _, forced = masks.accept(rows, rows, np.array([drawn - 2]), np.array([drawn], np.int32), failed)
        assert forced == {0: [drawn + 1]}
        assert grammar.filled[before + 1 :] == [drawn]  # to find the token that is forced, and no further
    assert not failed
