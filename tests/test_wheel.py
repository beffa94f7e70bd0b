"""What is installed is what is tested: the built wheel, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.docs.pages import blocks

ROOT = Path(__file__).parents[1]
SUBSET = (
    "tests/test_public_names.py",
    "tests/testing/test_scripted.py",
    "tests/testing/test_fixtures.py::test_under_pytest_asyncio_in_automatic_mode",
    "tests/testing/test_fixtures.py::test_in_this_very_test",
    "tests/loop/test_embedding.py",
)
WHERE = "import asyncengine\nprint()\nprint(asyncengine.__file__)\n"
COMMAND = """
import io, sys, warnings
from asyncengine.cli import main
warnings.simplefilter("error")
sys.argv[1:] = ["chat", "--temperature", "0", "--max-num-seqs", "2"]
sys.stdin = io.StringIO("What is 7 + 8?\\n")
main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(directory),
    ]
    subprocess.run([*command, "-q", "--disable-pip-version-check"], check=True, timeout=110)
    (found,) = directory.glob("asyncengine-*.whl")
    return found


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's contents in `site`, and the tests beside it."""
    directory = tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "site")
    shutil.copytree(ROOT / "tests", directory / "tests")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, directory)
    return directory


def run(elsewhere: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(elsewhere / "site")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_wheel_has_what_the_package_needs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    packed = {name for name in sizes if name.startswith("asyncengine/")}
    for needed in (
        "py.typed", "tiny/checkpoint/model.safetensors", "tiny/checkpoint/tokenizer.json",
        "model/attention/paged_attention.cpp", "model/attention/tiles.h", "model/decoder/decoder.cpp",
        "model/decoder/bundles.h", "model/decoder/bundle_tiles.h", "model/recurrent/scans.cpp",
    ):  # fmt: skip
        assert f"asyncengine/{needed}" in packed
    assert packed >= {path.relative_to(ROOT).as_posix() for path in (ROOT / "asyncengine").rglob("*.py")}
    assert not [name for name in sizes if not name.startswith(("asyncengine/", "asyncengine-"))]
    assert sum(size for name, size in sizes.items() if "/tiny/" in name) < 5.1e6
    assert wheel.stat().st_size < 6e6


@pytest.mark.long
def test_the_wheel_serves_the_embedded_model_with_the_lines_that_the_readme_begins_with(elsewhere: Path) -> None:
    """And so does its command, which then ends the process."""
    first = blocks(ROOT / "README.md")[0]
    done = run(elsewhere, "-c", first.code + WHERE + COMMAND)
    *answer, path, said = done.stdout.splitlines()
    assert said == "7 + 8 = 15."
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tiny loaded in ") and "2 sequences" in last
    assert first.output is not None
    assert "\n".join(answer).strip() == first.output.strip()
    assert Path(path).is_relative_to(elsewhere / "site")


@pytest.mark.long
def test_the_suite_runs_against_the_wheel(elsewhere: Path) -> None:
    out = run(elsewhere, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUBSET).stdout
    assert " passed" in out and "failed" not in out
