"""Every block of Python in the documentation runs, and prints what the page says it prints.

The blocks of a page run in order in one namespace, on one event loop, as in a shell with top-level await. A block that
begins with ``# name.py`` is a file: a page's files are written into one directory, and pytest runs its tests.
"""

from __future__ import annotations

import ast
import asyncio
import codeop
import contextlib
import gc
import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from tests.docs.pages import PAGES, ROOT, Block, blocks, name
from tests.model.gguf.tiny_file import write_tiny

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
"""For other processes: while the suite runs, threads that wait for each other wait long."""


def snippets(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python" and block.file is None]


def files(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("python", "toml") and block.file is not None]


def run(block: Block, namespace: dict[str, Any], runner: asyncio.Runner) -> str:
    """Runs a block and returns what it printed. Its lines have the page's numbers in a traceback."""
    tree = compile(
        "\n" * (block.line - 1) + block.code,
        str(block.page),
        "exec",
        flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
        dont_inherit=True,
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if tree.co_flags & inspect.CO_COROUTINE:
            runner.run(eval(tree, namespace))
        else:
            exec(tree, namespace)
    return printed.getvalue()


def run_all(these: list[Block]) -> None:
    """In one namespace, and on one event loop."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with asyncio.Runner() as runner:
        try:
            for block in these:
                printed = run(block, namespace, runner)
                if block.output is not None:
                    assert printed.strip() == block.output.strip(), f"{block.page}:{block.line}"
        finally:
            namespace.clear()
            gc.collect()


@pytest.fixture
def _one_thread() -> Any:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=name)
def test_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "gguf.md":  # which begins with a file that the reader has
        write_tiny(tmp_path / "tiny-Q4_0.gguf", GGMLQuantizationType.Q4_0)
    run_all(snippets(page))


@pytest.mark.parametrize("page", [page for page in PAGES if files(page)], ids=name)
def test_files_of_a_page_pass_their_own_tests(page: Path, tmp_path: Path) -> None:
    for block in files(page):
        assert block.file is not None
        (tmp_path / block.file).write_text(block.code, encoding="utf-8")
    if not (tmp_path / "pyproject.toml").exists():
        (tmp_path / "pytest.ini").write_text(
            "[pytest]\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n"
        )
    assert list(tmp_path.glob("test_*.py")), f"{page} shows files but no test"
    pytest_run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert pytest_run.returncode == 0, pytest_run.stdout + pytest_run.stderr


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/tutorial.md"], ids=name)
def test_blocks_can_be_typed_line_by_line(page: Path) -> None:
    """As those pages say: a shell takes each block, and has taken the whole of it after an empty line."""
    assert "python -m asyncio" in page.read_text("utf-8")
    for block in snippets(page):
        complete = codeop.CommandCompiler()
        complete.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        typed: list[str] = []
        for line in [*block.code.splitlines(), ""]:
            typed.append(line)
            if complete("\n".join(typed), f"{page}:{block.line}", "single") is not None:
                typed = []
        assert not typed, f"{page}:{block.line}"


def test_the_readme_begins_with_few_lines_that_say_what_they_print() -> None:
    """That they run as they are, in a process of their own, is seen with the wheel."""
    first = blocks(ROOT / "README.md")[0]
    assert first.output is not None
    assert len([line for line in first.code.splitlines() if line]) <= 10


NOTEBOOKS = pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.ipynb")), ids=name)


@pytest.mark.usefixtures("_one_thread")
@NOTEBOOKS
def test_cells_of_a_notebook_run_in_order(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    run_all([Block(path, 1, "python", "".join(cell["source"]), None) for cell in cells])


@pytest.mark.long
@NOTEBOOKS
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    """In a kernel of its own."""
    program = (
        "import sys, nbformat, nbclient\n"
        "notebook = nbformat.read(sys.argv[1], as_version=4)\n"
        "nbclient.NotebookClient(notebook, timeout=90, kernel_name='python3').execute()\n"
    )
    notebook = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert notebook.returncode == 0, notebook.stderr[-4000:]


def test_every_block_says_what_it_is() -> None:
    known = {"python", "text", "sh", "toml"}
    strange = [
        f"{name(b.page)}:{b.line}: {b.language!r}" for page in PAGES for b in blocks(page) if b.language not in known
    ]
    assert not strange
