"""Where nothing can be compiled, that is a `BuildError`, and never anything else: whoever builds can do without."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from asyncengine import builds
from asyncengine.builds import BuildError, Recipe, build, find_compiler


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    source = tmp_path / "source.c"
    source.write_text("int answer(void) { return 42; }")
    return Recipe("the answer", "answer", (source,), ())


def compiler(directory: Path, script: str) -> list[str]:
    """One that writes what it is told to, or fails."""
    command = directory / "cc"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    return [str(command)]


@pytest.mark.parametrize(("given", "says"), [("gcc 'unclosed", "No closing quotation"), (" ", "not a command")])
def test_a_compiler_that_is_no_command(given: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", given)
    with pytest.raises(BuildError, match=says):
        find_compiler("CC", ("cc",))


def test_a_user_without_a_home(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(builds.Path, "home", homeless)
    library = build(recipe, compiler(tmp_path, 'echo built > "$3"'))
    assert library.read_text() == "built\n"


def test_no_place_to_write_to(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(BuildError, match="the answer could not be compiled: No usable temporary directory"):
        build(recipe, compiler(tmp_path, "exit 0"))


def test_a_source_that_is_gone(recipe: Recipe, tmp_path: Path) -> None:
    recipe.sources[0].unlink()
    with pytest.raises(BuildError, match=r"source\.c"):
        build(recipe, compiler(tmp_path, "exit 0"))


def test_a_compiler_that_speaks_another_encoding(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BuildError, match="wrong: "):
        build(recipe, compiler(tmp_path, r"printf 'wrong: \377\376' >&2; exit 1"))
    assert not list((tmp_path / "cache" / "asyncengine").iterdir())


def test_a_compiler_that_fails_without_a_word(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BuildError, match="exit status 3"):
        build(recipe, compiler(tmp_path, "exit 3"))


def test_those_that_want_the_same_at_the_same_time_wait_for_one(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    slow = compiler(tmp_path, f'echo began >> {tmp_path}/times; sleep 0.2; echo built > "$3"')
    said: list[str] = []
    with ThreadPoolExecutor(4) as threads:
        libraries = list(threads.map(lambda _: build(recipe, slow, said.append), range(4)))
    assert (tmp_path / "times").read_text() == "began\n"
    assert sorted(each.split()[0] for each in said) == ["compiling", "waiting", "waiting", "waiting"]
    assert {library.read_text() for library in libraries} == {"built\n"}
    assert [path.name for path in libraries[0].parent.parent.iterdir()] == [libraries[0].parent.name]


def test_one_that_fails_keeps_nobody_waiting(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = compiler(tmp_path, "sleep 0.1; exit 3")

    def attempt(_: int) -> str:
        with pytest.raises(BuildError) as failed:
            build(recipe, broken)
        return str(failed.value)

    with ThreadPoolExecutor(3) as threads:
        assert all("exit status 3" in said for said in threads.map(attempt, range(3)))


def test_one_that_comes_to_no_end_is_not_waited_for(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(builds, "_COMPILE_SECONDS", 5)
    library = build(recipe, quick := compiler(tmp_path, 'echo built > "$3"'))
    (library.parent / "sha256").unlink()
    monkeypatch.setattr(builds, "_COMPILE_SECONDS", 0.05)
    with FileLock(f"{library.parent}.lock"):
        said: list[str] = []
        waited = threading.Thread(target=build, args=(recipe, quick, said.append))
        waited.start()
        waited.join(30)
        assert not waited.is_alive()
    assert said[0] == "waiting for another process that compiles the answer"


def test_where_files_cannot_be_locked_it_is_built_all_the_same(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "files cannot be locked here")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("fcntl.flock", unsupported)
    assert build(recipe, compiler(tmp_path, 'echo built > "$3"')).read_text() == "built\n"
