"""The fused kernels where there is something to run them: a CUDA device, else Triton's interpreter."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from asyncengine.model import verification
from asyncengine.model.fused import choice, tiles
from asyncengine.model.fused.tiles import Tile
from asyncengine.model.quantised import four_bit_product
from asyncengine.model.quantised.four_bit_tiles import rows_for, tile_for
from tests.model.attention.triton_device import DEVICE, require_triton

__all__ = ["DEVICE", "fuse_here", "large_tiles", "on_one_loop", "require_triton"]


def on_one_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The interpreter takes its time, and no loop has anything to do with what is tested."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


def large_tiles(monkeypatch: pytest.MonkeyPatch, outputs: int = 256) -> None:
    """The interpreter takes about as long for a program whatever its size: so there are few."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(tiles, "tile_for", lambda *_: Tile(outputs, 128))
        monkeypatch.setattr(tiles, "HEADS_EACH", 16)
        for cut in (rows_for, tile_for):
            larger = functools.partial(_larger, cut, outputs)
            monkeypatch.setattr(four_bit_product, cut.__name__, larger)


def _larger(cut: Callable[..., Any], outputs: int, *given: Any) -> Any:
    return dataclasses.replace(cut(*given), outputs=outputs)


def fuse_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the loader take the fused kernels for models on the CPU as well."""
    require_triton()
    large_tiles(monkeypatch)
    monkeypatch.setattr(choice, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(verification, "_FUSED_TOKENS", 4)
    monkeypatch.setattr(verification, "_TOKENS", 5)
    monkeypatch.setattr(verification, "_CUTS", (0, 3, 5))
