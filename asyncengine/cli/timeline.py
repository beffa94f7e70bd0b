"""A trace as files: JSON that Perfetto opens, and one HTML page that needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PAGE = Path(__file__).with_name("timeline.html")
_PLACE = '<script type="application/json" id="data">{}</script>'


def page(trace: dict[str, Any], title: str) -> str:
    """The page, with its data in it.

    Args:
        trace: In the Chrome trace format.
        title: What was recorded.
    """
    # Nothing in the data may end the script that holds it.
    data = json.dumps({"title": title, "trace": trace}).replace("<", "\\u003c")
    before, place, after = _PAGE.read_text(encoding="utf-8").partition(_PLACE)
    assert place
    return f"{before}{place.replace('{}', data)}{after}"


def files(stem: Path) -> tuple[Path, Path]:
    """``stem.json`` and ``stem.html``."""
    return stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.html")


def write(trace: dict[str, Any], title: str, stem: Path) -> tuple[Path, Path]:
    """Writes the `files` of `stem`; returns their paths."""
    data, view = files(stem)
    data.write_text(json.dumps(trace), encoding="utf-8")
    view.write_text(page(trace, title), encoding="utf-8")
    return data, view
