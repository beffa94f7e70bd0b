"""How products with weights of four bits are cut."""

from __future__ import annotations

import dataclasses

import pytest

from asyncengine.model.quantised.four_bit_tiles import rows_for, tile_for


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tokens", [0.5, 2, 5, 16, 17, 48, 49, 160, 161, 9999])
def test_both_products_of_experts_share_a_list_of_work(tokens: float, itemsize: int) -> None:
    tiles = [tile_for(tokens, outputs, itemsize, gated) for gated in (True, False) for outputs in (64, 1 << 20)]
    assert len({tile.tokens for tile in tiles}) == 1
    for size in (value for tile in tiles for value in dataclasses.astuple(tile) if value != tile.stages):
        assert size & (size - 1) == 0


@pytest.mark.parametrize("inputs", [32, 96, 2880, 4096, 14336])
def test_a_row_is_read_in_whole_pieces_by_enough_warps(inputs: int) -> None:
    for outputs in (64, 4096, 11520, 131072):
        for gated in (False, True):
            rows = rows_for(inputs, outputs, gated)
            assert rows.units & (rows.units - 1) == 0 and rows.units <= 32 * rows.warps
            assert rows.warps == 1 or inputs % (32 * rows.units) == 0
            assert 2 * inputs > 32 * rows.units  # of a piece half is there
    assert rows_for(4096, 4096, gated=False).warps == 4
    assert rows_for(4096, 131072, gated=False).warps == 1
