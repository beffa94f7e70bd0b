from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncengine.grammar.bits import num_words, row_of
from asyncengine.model.token_masks import TokenMasks

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
