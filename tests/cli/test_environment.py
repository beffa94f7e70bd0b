"""``asyncengine env``."""

from __future__ import annotations

import os
from importlib import metadata

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


def test_a_compiler_that_is_missing_is_said_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run("env")
    assert done.status == 0
    assert "$CXX is 'no-such-compiler', which cannot be run" in done.out
