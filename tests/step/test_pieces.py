from __future__ import annotations

import numpy as np
import pytest

from asyncengine.step.pieces import Pieces


@pytest.mark.parametrize("count", [0, 1, 499, 500, 501, 1024])
def test_pieces_are_the_whole(count: int) -> None:
    pieces, random = Pieces(count), np.random.default_rng(0)
    column = random.integers(0, 100, count)
    assert pieces.plus_one(column).tolist() == (column + 1).tolist()
    assert pieces.plus_one(np.stack([column, -column])).tolist() == [(column + 1).tolist(), (1 - column).tolist()]
    index = random.permutation(2000)[:count]
    table = random.integers(0, 100, 2000)
    assert pieces.take(table, index).tolist() == table[index].tolist()
    expected = table.copy()
    expected[index] = column
    pieces.put(table, index, column)
    assert table.tolist() == expected.tolist()
    pieces.put_all(table, index, 7)
    assert (table[index] == 7).all() and table.sum() == expected.sum() - column.sum() + 7 * count


def test_a_new_column_is_another_one() -> None:
    column = np.arange(3)
    assert not np.shares_memory(Pieces(3).plus_one(column), column)
    column = np.arange(1024)
    assert not np.shares_memory(Pieces(1024).plus_one(column), column)
