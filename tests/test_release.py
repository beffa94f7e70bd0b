"""`scripts/release` refuses what must not be released."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts/release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean one, of version 1.2.0, which has its entry."""
    (tmp_path / "asyncengine").mkdir()
    (tmp_path / "asyncengine/_version.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 1.2.0\n\n## 1.1.0\n")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "x")


def wheel(folder: Path, names: tuple[str, ...], size: int = 0) -> Path:
    path = folder / "asyncengine-1.2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, bytes(size))
    return path


def test_a_clean_tree_with_an_entry_may_be_built(release: ModuleType, checkout: Path) -> None:
    release.check_before(checkout)
    assert release.version_of(checkout) == "1.2.0"


def test_a_dirty_tree_is_refused(release: ModuleType, checkout: Path) -> None:
    (checkout / "stray.txt").write_text("")
    with pytest.raises(SystemExit, match=r"the tree is not clean, 1 files .*: stray\.txt"):
        release.check_before(checkout)


def test_a_version_without_an_entry_is_refused(release: ModuleType, checkout: Path) -> None:
    (checkout / "asyncengine/_version.py").write_text('__version__ = "1.3.0.dev0"\n')
    commit(checkout)
    with pytest.raises(
        SystemExit, match=r"no entry for version 1\.3\.0\.dev0; it has Unreleased, 1\.2\.0, 1\.1\.0\. A release sets"
    ):
        release.check_before(checkout)


def test_a_wheel_has_what_it_needs_and_nothing_else(release: ModuleType, tmp_path: Path) -> None:
    needed = tuple(f"asyncengine/{name}" for name in release.NEEDED)
    release.check_wheel(wheel(tmp_path, needed))
    for names, size, message in (
        (needed[1:], 0, r"lacks asyncengine/py\.typed"),
        ((*needed, "tests/test_a.py"), 0, "has tests/test_a.py"),
        ((*needed, "asyncengine/__pycache__/a.pyc"), 0, "has asyncengine/__pycache__"),
        (needed, 1_000_000, "bytes; allowed: 5,000,000"),
    ):
        with pytest.raises(SystemExit, match=message):
            release.check_wheel(wheel(tmp_path, names, size))


def test_an_sdist_has_nothing_else(release: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "asyncengine-1.2.0.tar.gz"
    for name, strange in (("docs/a.md", False), (".venv/a", True)):
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo(f"asyncengine-1.2.0/{name}"), io.BytesIO())
        if strange:
            with pytest.raises(SystemExit, match=r"has \.venv/a"):
                release.check_sdist(path)
        else:
            release.check_sdist(path)


def test_what_the_project_puts_into_an_sdist_is_allowed_there(release: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert set(project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]) <= set(release.IN_SDIST)
