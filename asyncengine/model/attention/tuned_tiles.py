"""Tile sizes that were measured on a device, one JSON file for each, beside this module in ``tuned``.

`python -m benchmarks.attention_tune --write` writes them. Where there is none for a device, or none for a size of head,
the tables of `triton_tiles` hold.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncengine.model.attention.triton_tiles import Launch, Tiles

DIRECTORY = Path(__file__).parent / "tuned"
Key = tuple[int, int, int]
"""Bytes of a stored number, size of a key head, of a value head."""


def path_of(device_name: str, directory: Path = DIRECTORY) -> Path:
    """Where the tiles of a device are kept."""
    return directory / f"{re.sub('[^A-Za-z0-9]+', '-', device_name).strip('-')}.json"


def read(device_name: str, directory: Path = DIRECTORY) -> dict[Key, Tiles]:
    """The tiles of a device; none where it was not tuned.

    Raises:
        ValueError: The file is not what `write` writes; the message names it and the entry.
    """
    path = path_of(device_name, directory)
    if not path.exists():
        return {}
    found: dict[Key, Tiles] = {}
    entries = json.loads(path.read_text(encoding="utf-8"))["tiles"]
    for number, entry in enumerate(entries):
        try:
            tiles = Tiles(
                keys=entry["keys"],
                split=entry["split"],
                short=Launch(**entry["short"]),
                long=Launch(**entry["long"]),
            )
            check(tiles)
            found[entry["bytes"], entry["key_dim"], entry["value_dim"]] = tiles
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: entry {number}: {error}") from error
    return found


def write(device_name: str, tiles: Mapping[Key, Tiles], about: Mapping[str, Any], directory: Path = DIRECTORY) -> Path:
    """Keeps the tiles of a device; those of other sizes that are there already stay.

    Args:
        device_name: As torch names it.
        tiles: What was found.
        about: With what it was found: versions, date, command.
        directory: Where.
    """
    path = path_of(device_name, directory)
    merged = read(device_name, directory) | dict(tiles)
    entries = [
        {"bytes": key[0], "key_dim": key[1], "value_dim": key[2], **dataclasses.asdict(found)}
        for key, found in sorted(merged.items())
    ]
    directory.mkdir(exist_ok=True)
    text = json.dumps({"device": device_name, "about": dict(about), "tiles": entries}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def check(tiles: Tiles) -> None:
    """Looks whether the kernel can be cut like that.

    Raises:
        ValueError: It cannot; the message says why.
    """
    for name, number in (("keys", tiles.keys), ("short.rows", tiles.short.rows), ("long.rows", tiles.long.rows)):
        if not isinstance(number, int) or number < 16 or number & (number - 1):
            raise ValueError(f"{name} is {number!r}; expected a power of two of at least 16")
    if not isinstance(tiles.split, int) or tiles.split < tiles.keys or tiles.split % tiles.keys:
        raise ValueError(f"split is {tiles.split!r}; expected a multiple of keys, which is {tiles.keys}")
    for launch in (tiles.short, tiles.long):
        if launch.warps not in (1, 2, 4, 8, 16) or launch.stages not in range(1, 9):
            raise ValueError(f"warps and stages are {launch.warps!r} and {launch.stages!r}; expected 1..16 and 1..8")
