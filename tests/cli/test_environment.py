"""``asyncengine env``."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest

import asyncengine
from tests.cli.programs import run


def test_shows_what_there_is() -> None:
    done = run("env")
    assert done.status == 0
    rows = dict(line.split("  ", 1) for line in done.out.splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["asyncengine"] == asyncengine.__version__
    assert rows["torch"] == metadata.version("torch")
    assert f" usable of {os.cpu_count()}, " in rows["cores"]
    assert " GiB free of " in rows["memory"]
    assert {"compiler", "kernel cache"} <= rows.keys()


@pytest.mark.parametrize("cache", [None, "/a/place"], ids=["no place", "a place"])
def test_a_user_without_a_home_is_no_error(monkeypatch: pytest.MonkeyPatch, cache: str | None) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if cache is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    done = run("env")
    assert done.status == 0
    said = "none: Could not determine home directory. XDG_CACHE_HOME" if cache is None else "/a/place/asyncengine"
    assert f"kernel cache       {said}" in done.out, done.out


def test_a_compiler_that_is_missing_is_said_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run("env")
    assert done.status == 0
    assert "$CXX is 'no-such-compiler', which cannot be run" in done.out
