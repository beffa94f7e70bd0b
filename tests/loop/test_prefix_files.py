"""Prefix caches in files, by way of the engine's own methods."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from harness import Rig, cancelled_at_every_await, eventually

from asyncengine import (
    EngineClosedError,
    EngineConfig,
    EngineState,
    IllegalStateError,
    InvalidRequestError,
    ModelNotLoadedError,
    PrefixCacheError,
    ReloadError,
    catalogue,
)
from asyncengine.loop import prefixes
from asyncengine.prefix_file import PrefixReader, PrefixWriter
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
    about |= {name: arrays.pop(name) for name in ("format", "identity", "parts") if name in arrays}
    safetensors.numpy.save_file(found | arrays, path, about)


OTHER = {"model": "scripted", "page size": "8"}
BROKEN: list[tuple[Any, str]] = [
    (lambda path: path.unlink(), "there is no file"),
    (lambda path: path.write_bytes(b""), "is damaged, or not a prefix cache"),
    (lambda path: path.write_bytes(path.read_bytes()[:-7]), "is damaged, or not a prefix cache"),
    (lambda path: path.write_bytes(b"no safetensors at all"), "is damaged, or not a prefix cache"),
    (lambda path: safetensors.numpy.save_file({"x": np.zeros(3)}, path), "is damaged, or not a prefix cache: it has x"),
    (lambda path: rewritten(path, format="asyncengine prefix cache 0"), "not a prefix cache that this version"),
    (lambda path: rewritten(path, identity="3"), "is damaged, or not"),
    (
        lambda path: rewritten(path, identity=json.dumps({"model": "scripted", "page size": "8"})),
        "differs in page size",
    ),
    (lambda path: rewritten(path, before=np.arange(3, dtype=np.int32)), "is damaged, or not .* different numbers"),
    (lambda path: rewritten(path, tokens=np.zeros((2, 4), dtype=np.int64)), "tokens is malformed"),
    (lambda path: rewritten(path, content=np.zeros((2, 32), dtype=np.uint8)), "different numbers of blocks"),
    (lambda path: rewritten(path, parts='{"cells": -32, "more": 64}'), "its parts are malformed"),
    (lambda path: rewritten(path, parts='{"sells": 32}'), "of another KV cache"),
    (lambda path: rewritten(path, more=np.zeros((0, 2), dtype=np.uint8)), "it has .*more"),
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
@pytest.mark.parametrize("path", [None, 3, "", b"bytes", "with\0"])
async def test_a_path_must_be_one(path: Any, rig: Rig) -> None:
    for call in (rig.engine.save_prefix_cache, rig.engine.load_prefix_cache):
        with pytest.raises(InvalidRequestError, match="expected the path of a file"):
            await call(path)


@pytest.mark.loops("either")
async def test_what_keeps_none_says_why(tmp_path: Path) -> None:
    async with Rig(echo) as rig:
        assert rig.engine.no_prefix_file == ""
        await rig.engine.unload()
        with pytest.raises(ModelNotLoadedError):
            _ = rig.engine.no_prefix_file
    async with Rig(echo, kept_states=3) as rig:
        assert rig.engine.no_prefix_file == "states are not kept"
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


class Gate:
    """Holds a method up, on the thread where it is called."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self._reached, self._open = threading.Event(), threading.Event()
        original = getattr(owner, name)

        def held(*given: Any) -> Any:
            self._reached.set()
            assert self._open.wait(10)
            return original(*given)

        patch.setattr(owner, name, held)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, 10)

    def open(self) -> None:
        self._open.set()


FULL: dict[str, Any] = {"max_total_sequence_length": 128, "max_single_sequence_length": 64}


async def fill(rig: Rig) -> None:
    for letter in "abcdefgh":
        await rig.engine.generate(letter * 14)
    assert rig.metrics().kv_blocks_free < 2


@pytest.mark.loops("either")
async def test_requests_have_all_the_room_while_a_full_cache_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the disk is: what they take is not in the file, and the rest is."""
    monkeypatch.setattr(catalogue, "PIECE_BYTES", 1)
    path = tmp_path / "prefixes"
    async with Rig(echo, **FULL) as rig:
        await fill(rig)
        gate = Gate(monkeypatch, PrefixWriter, "add")
        saving = asyncio.create_task(rig.engine.save_prefix_cache(path))
        await gate.reached()
        for letter in "xy":
            assert (await rig.engine.generate(letter * 20)).text == letter * 20
        gate.open()
        count = await saving
        assert 0 < count < 128
        await rig.comes_to_rest()
    async with Rig(echo, **FULL) as other:
        assert await other.engine.load_prefix_cache(path) == count
        assert (await other.engine.generate("h" * 14)).usage.cached_tokens == 12


@pytest.mark.loops("either")
@pytest.mark.parametrize("piece", [1, 1 << 25])
async def test_what_is_there_stays_and_no_more_is_read_than_there_is_room_for(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "PIECE_BYTES", piece)
    path = tmp_path / "prefixes"
    async with Rig(echo, **FULL) as rig:
        await fill(rig)
        await rig.engine.save_prefix_cache(path)
    async with Rig(echo, **FULL) as other:
        await other.engine.generate("x" * 40)
        before = other.metrics()
        loaded = await other.engine.load_prefix_cache(path)
        after = other.metrics()
        assert loaded == 4 * before.kv_blocks_free and after.kv_blocks_free == 0
        reads = list[Any]()
        rows = PrefixReader.rows
        monkeypatch.setattr(PrefixReader, "rows", lambda *given: (reads.append(given), rows(*given))[1])
        assert await other.engine.load_prefix_cache(path) == 0 and len(reads) == 1
        assert (await other.engine.generate("x" * 40)).usage.cached_tokens >= 36


@pytest.mark.loops("either")
@pytest.mark.parametrize("what", ["reset", "reload", "sleep", "update_weights", "unload", "shutdown"])
@pytest.mark.parametrize("call", ["save", "load"])
async def test_what_happens_between_two_pieces(
    call: str, what: str, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes to an end, with what was there before or with what is there after; no file is half of one."""
    monkeypatch.setattr(catalogue, "PIECE_BYTES", 64)
    path = tmp_path / "prefixes"
    count = await saved(rig, path)
    size = path.stat().st_size
    owner, name = (PrefixWriter, "add") if call == "save" else (PrefixReader, "rows")
    gate = Gate(monkeypatch, owner, name)
    calling = asyncio.create_task(getattr(rig.engine, f"{call}_prefix_cache")(path))
    await gate.reached()
    given = {"reload": (rig.config,), "update_weights": ({"w": 1},)}.get(what, ())
    await getattr(rig.engine, what)(*given)
    gate.open()
    error = {
        "sleep": IllegalStateError, "update_weights": PrefixCacheError, "unload": ModelNotLoadedError,
        "shutdown": EngineClosedError,
    }.get(what)  # fmt: skip
    if error is not None:
        with pytest.raises(error):
            await calling
    elif call == "load":
        assert await calling == count  # of an empty cache, or the new model's
    else:
        assert await calling == (0 if what == "reload" else 8)  # what was read before
    assert os.listdir(tmp_path) == ["prefixes"]
    if error is not None or call == "load":
        assert path.stat().st_size == size
    if what not in ("unload", "shutdown"):
        await rig.comes_to_rest()


@pytest.mark.loops("either")
async def test_several_at_once(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "PIECE_BYTES", 64)
    path = tmp_path / "prefixes"
    count = await saved(rig, path)
    save, load = rig.engine.save_prefix_cache, rig.engine.load_prefix_cache
    assert await asyncio.gather(save(path), save(path), load(path), save(path)) == [count, count, 0, count]
    await rig.engine.reset()
    both = await asyncio.gather(load(path), load(path), load(path))
    assert sum(both) == count and rig.metrics().kv_blocks_cached == count // 4
    assert os.listdir(tmp_path) == ["prefixes"]


@pytest.mark.loops("either")
async def test_what_is_given_up_while_a_reload_holds_it_up_keeps_nothing(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that fails, and the model stays."""
    path = tmp_path / "prefixes"
    await saved(rig, path)
    identity, reloading = prefixes._identity, list[asyncio.Task[Any]]()

    async def with_a_reload(view: Any) -> Any:
        found = await identity(view)
        reloading.append(asyncio.create_task(rig.engine.reload(rig.config)))
        await eventually(lambda: rig.engine.state is EngineState.LOADING)
        return found

    monkeypatch.setattr(prefixes, "_identity", with_a_reload)
    rig.loader.load_errors["scripted"] = RuntimeError("the disk is gone")
    for call in (rig.engine.save_prefix_cache, rig.engine.load_prefix_cache):
        rig.loader.gate = threading.Event()
        calling = asyncio.create_task(call(path))
        await eventually(lambda: len(rig.engine._thread.core._held) > 0)
        calling.cancel()
        await asyncio.wait([calling])
        rig.loader.gate.set()
        with pytest.raises(ReloadError):
            await reloading.pop()
        await rig.comes_to_rest()
    assert os.listdir(tmp_path) == ["prefixes"]


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


async def test_at_every_await(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "PIECE_BYTES", 512)  # two pieces
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
