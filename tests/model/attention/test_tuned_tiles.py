"""Tile sizes that were measured on a device: how they are found, kept and used."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from attention_case import CPU, layer
from test_parity import assert_matches_dense
from triton_device import TritonOnDevice, require_triton

from asyncengine.model.attention import tuned_tiles
from asyncengine.model.attention.triton_tiles import EXACT, TABLE, Launch, Tiles
from benchmarks.attention_tune import Times, candidates, tune

START = Tiles(64, 256, Launch(16, 4, 3, 248), Launch(128, 8, 3))
OTHER = Tiles(32, 32, Launch(32, 4, 2), Launch(64, 4, 2))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert tuned_tiles.read("NVIDIA H200", tmp_path) == {}
    path = tuned_tiles.write("NVIDIA H200", {(2, 128, 128): START}, {"torch": "2.13"}, tmp_path)
    assert path == tmp_path / "NVIDIA-H200.json"
    assert tuned_tiles.read("NVIDIA H200", tmp_path) == {(2, 128, 128): START}
    tuned_tiles.write("NVIDIA H200", {(1, 64, 64): OTHER, (2, 128, 128): OTHER}, {}, tmp_path)
    assert tuned_tiles.read("NVIDIA H200", tmp_path) == {(1, 64, 64): OTHER, (2, 128, 128): OTHER}
    assert tuned_tiles.read("NVIDIA H100 80GB HBM3", tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keys": 48}, "keys is 48; expected a power of two"),
        ({"split": 96}, "split is 96; expected a multiple of keys, which is 64"),
        ({"short": {"rows": 8, "warps": 4, "stages": 2, "registers": None}}, r"short\.rows is 8"),
        ({"long": {"rows": 64, "warps": 3, "stages": 2, "registers": None}}, r"warps and stages are 3 and 2"),
        ({"long": {"rows": 64}}, "missing 2 required"),
    ],
)
def test_a_damaged_file_is_named_with_its_entry(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tuned_tiles.write("X", {(2, 128, 128): START}, {}, tmp_path)
    content = json.loads(path.read_text())
    content["tiles"][0] |= changes
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"X\.json: entry 0: .*{said}"):
        tuned_tiles.read("X", tmp_path)


def test_everything_that_is_stored_or_in_the_tables_can_be_cut_like_that() -> None:
    stored = [tuned_tiles.read(path.stem).values() for path in tuned_tiles.DIRECTORY.glob("*.json")]
    for tiles in itertools.chain(TABLE.values(), EXACT.values(), *stored):
        tuned_tiles.check(tiles)


def test_everything_that_is_tried_can_be_cut_like_that() -> None:
    tried = [change(START) for choices in candidates(START) for change in choices]
    assert len(set(tried)) > 40
    for tiles in tried:
        tuned_tiles.check(tiles)


def test_what_was_measured_on_the_device_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_triton()
    backend = TritonOnDevice(programs=12, parts_bytes=1 << 19, tuned={(4, 32, 32): OTHER})
    assert_matches_dense(backend, layer(2, 1), [(40, 1), (0, 20)], 16, torch.float32)
    assert (backend._cuts[0].short_rows, backend._cuts[0].split) == (32, 32)
    # Without any, those of the device that is there.
    tuned_tiles.write("NVIDIA H200", {(2, 32, 32): OTHER}, {}, tmp_path)
    monkeypatch.setattr(tuned_tiles, "read", lambda name, read=tuned_tiles.read: read(name, tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    own = TritonOnDevice()
    own._look_up(torch.device("cuda", 0))
    assert own._tiles(layer(), torch.bfloat16) == OTHER
    assert own._tiles(layer(), torch.float32) == TABLE[4, 32]
    # What is fetched of a bias takes room of its own, in which none of these was tried.
    assert own._tiles(layer(distances=9), torch.bfloat16) == TABLE[2, 32]
    assert own._tiles(layer(key_dim=64), torch.bfloat16) == EXACT[2, 64, 64]
    assert own._tiles(layer(key_dim=64, distances=9), torch.bfloat16) == TABLE[2, 64]
    plain = TritonOnDevice()
    plain._look_up(CPU)
    assert plain._tiles(layer(), torch.bfloat16) == TABLE[2, 32]


class Device:
    """Takes as long as it is told to."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.broken: set[int] = set()

    def measure(self, tiles: Tiles) -> Times | None:
        self.clock += 1.0
        if tiles.keys in self.broken:
            return None
        decode = 1e-5 * (2 + abs(tiles.keys - 128) / 64 + abs(tiles.short.warps - 8) + (tiles.short.registers is None))
        return decode, 1e-3 * (1 + abs(tiles.long.rows - 64) + abs(tiles.long.stages - 4))


def test_the_fastest_of_each_kind_is_kept() -> None:
    device = Device()
    best, times, tried = tune(START, device.measure, 1e9)
    assert best.keys == 128
    assert best.short.warps == 8
    assert (best.long.rows, best.long.stages) == (64, 4)
    assert times is not None and times[1] == 1e-3
    assert tried == device.clock


def test_what_does_not_work_is_passed_over() -> None:
    device = Device()
    device.broken = {128}
    best, times, _ = tune(START, device.measure, 1e9)
    assert best.keys == 64 and times is not None
    device.broken = {64}
    assert tune(START, device.measure, 1e9)[0].keys == 128  # although the first did not work
    device.broken = {32, 64, 128}
    best, times, _ = tune(START, device.measure, 1e9)
    assert (best, times) == (START, None)


def test_time_that_runs_out_leaves_the_best_so_far() -> None:
    device = Device()
    best, times, tried = tune(START, device.measure, until=9.0, clock=lambda: device.clock)
    assert tried == 9
    assert best.keys == 128 and best.long == START.long
    assert times is not None


def test_equal_times_keep_what_there_is() -> None:
    best, _, _ = tune(START, lambda tiles: (1.0, 1.0), 1e9)
    assert best == START
