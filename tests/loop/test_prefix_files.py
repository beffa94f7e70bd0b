"""Prefix caches in files, by way of the engine's own methods."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from harness import Rig, cancelled_at_every_await

from asyncengine import EngineClosedError, EngineConfig, IllegalStateError, InvalidRequestError, PrefixCacheError
from asyncengine.loop import prefixes
from asyncengine.testing.scripted import echo

PROMPT = "a prompt of many letters, which is computed once"


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig(echo) as rig:
        yield rig


async def saved(rig: Rig, path: Path) -> int:
    await rig.engine.generate(PROMPT)
    return await rig.engine.save_prefix_cache(path)


async def test_another_engine_goes_on_with_it(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    count = await saved(rig, path)
    assert count >= 48 and os.listdir(tmp_path) == ["prefixes"]
    async with Rig(echo) as other:
        assert await other.engine.load_prefix_cache(str(path)) == count
        assert await other.engine.load_prefix_cache(path) == 0
        result = await other.engine.generate(PROMPT)
        assert result.text == PROMPT and result.usage.cached_tokens == 44
        assert other.metrics().kv_blocks_cached == count // 4
        await other.engine.reset()
        assert await other.engine.save_prefix_cache(path) == 0  # in place of the other
        assert await other.engine.load_prefix_cache(path) == 0


def rewritten(path: Path, **arrays: Any) -> None:
    """Puts other arrays, or another identity, into a file."""
    with safetensors.safe_open(path, framework="numpy") as file:
        about, found = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about |= {name: arrays.pop(name) for name in ("format", "identity") if name in arrays}
    safetensors.numpy.save_file(found | arrays, path, about)


OTHER = {"model": "scripted", "page size": "8"}
BROKEN: list[tuple[Any, str]] = [
    (lambda path: path.unlink(), "there is no file"),
    (lambda path: path.write_bytes(b""), "is damaged, or not a prefix cache"),
    (lambda path: path.write_bytes(path.read_bytes()[:-7]), "is damaged, or not a prefix cache"),
    (lambda path: path.write_bytes(b"no safetensors at all"), "is damaged, or not a prefix cache"),
    (
        lambda path: safetensors.numpy.save_file({"x": np.zeros(3)}, path),
        "is damaged, or not a prefix cache: x is malformed",
    ),
    (lambda path: rewritten(path, format="asyncengine prefix cache 0"), "not a prefix cache that this version"),
    (lambda path: rewritten(path, identity="3"), "is damaged, or not"),
    (
        lambda path: rewritten(path, identity=json.dumps({"model": "scripted", "page size": "8"})),
        "differs in page size",
    ),
    (lambda path: rewritten(path, before=np.arange(3, dtype=np.int32)), "is damaged, or not .* malformed|in no order"),
    (lambda path: rewritten(path, tokens=np.zeros((2, 4), dtype=np.int64)), "malformed"),
    (lambda path: rewritten(path, **{"content.cells": np.zeros((2, 32), dtype=np.uint8)}), "content is malformed"),
    (lambda path: rewritten(path, **{"content.more": np.zeros((0, 2), dtype=np.uint8)}), "malformed"),
]


@pytest.mark.loops("either")
@pytest.mark.parametrize(("change", "message"), BROKEN)
async def test_a_file_that_cannot_be_used_is_told(change: Any, message: str, rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    await saved(rig, path)
    change(path)
    await rig.engine.reset()
    with pytest.raises(PrefixCacheError, match=message):
        await rig.engine.load_prefix_cache(path)
    await rig.serves()


@pytest.mark.loops("either")
async def test_blocks_that_follow_themselves_are_no_file(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    count = await saved(rig, path) // 4
    for before in (np.arange(count), np.full(count, -2), np.arange(count)[::-1]):
        rewritten(path, before=before.astype(np.int32))
        with pytest.raises(PrefixCacheError, match="in no order"):
            await rig.engine.load_prefix_cache(path)


@pytest.mark.loops("either")
async def test_where_it_cannot_be_written(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind, and a file that was there stays."""
    with pytest.raises(PrefixCacheError, match=r"cannot write .*: No such file or directory"):
        await saved(rig, tmp_path / "nowhere" / "prefixes")
    path = tmp_path / "prefixes"
    path.write_bytes(b"before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PrefixCacheError, match=r"cannot write .*: No space left on device"):
        await saved(rig, path)
    assert os.listdir(tmp_path) == ["prefixes"] and path.read_bytes() == b"before"


@pytest.mark.loops("either")
@pytest.mark.parametrize("path", [None, 3, "", b"bytes"])
async def test_a_path_must_be_one(path: Any, rig: Rig) -> None:
    for call in (rig.engine.save_prefix_cache, rig.engine.load_prefix_cache):
        with pytest.raises(InvalidRequestError, match="expected the path of a file"):
            await call(path)


@pytest.mark.loops("either")
async def test_what_keeps_none_says_why(tmp_path: Path) -> None:
    async with Rig(echo, kept_states=3) as rig:
        for call in (rig.engine.save_prefix_cache, rig.engine.load_prefix_cache):
            with pytest.raises(PrefixCacheError, match="of 'scripted' cannot be kept: states are not kept"):
                await call(tmp_path / "prefixes")


async def test_another_model_that_is_loaded_meanwhile_is_the_one_that_counts(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prefixes"
    count = await saved(rig, path)
    identity = prefixes._identity

    async def reloading(view: Any) -> Any:
        monkeypatch.setattr(prefixes, "_identity", identity)
        await rig.engine.reload(rig.config)
        return await identity(view)

    monkeypatch.setattr(prefixes, "_identity", reloading)
    assert await rig.engine.load_prefix_cache(path) == count
    assert rig.metrics().kv_blocks_cached == count // 4
    monkeypatch.setattr(prefixes, "_identity", reloading)
    assert await rig.engine.save_prefix_cache(path) == 0


async def test_in_states_in_which_there_is_none(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    await saved(rig, path)
    await rig.engine.sleep()
    for call in (rig.engine.save_prefix_cache, rig.engine.load_prefix_cache):
        with pytest.raises(IllegalStateError, match="while the engine is sleeping"):
            await call(path)
    await rig.engine.shutdown()
    for call in (rig.engine.save_prefix_cache, rig.engine.load_prefix_cache):
        with pytest.raises(EngineClosedError):
            await call(path)


async def test_at_every_await(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    await rig.engine.generate(PROMPT)

    async def both() -> None:
        await rig.engine.save_prefix_cache(path)
        await rig.engine.load_prefix_cache(path)

    async def settled() -> None:
        await rig.engine.unpin_prompt("nothing")

    await cancelled_at_every_await(both, settled)
    await rig.serves()
    assert os.listdir(tmp_path) == ["prefixes"]  # and no file that was not whole
    assert rig.metrics().kv_blocks_used == 0
    assert isinstance(rig.config, EngineConfig) and await rig.engine.load_prefix_cache(path) == 0
