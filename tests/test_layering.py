"""The folder is the thread: who may import what, read from the source."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import asyncengine

ROOT = Path(asyncengine.__file__).parent


@cache
def imports(path: Path) -> frozenset[str]:
    """Names of all modules that a file imports, in whatever place, except for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def forbidden(path: Path, *names: str) -> set[str]:
    return {used for used in imports(path) for name in names if used == name or used.startswith(f"{name}.")}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


VALUES = [path for path in sorted(ROOT.glob("*.py")) if path.name not in ("__init__.py", "__main__.py")]


@pytest.mark.parametrize("path", files("loop"), ids=named)
def test_the_loop_side_imports_no_torch(path: Path) -> None:
    assert not forbidden(path, "torch", "transformers", "tokenizers", "safetensors")


@pytest.mark.parametrize("path", files("loop"), ids=named)
def test_the_loop_side_loads_models_only_where_one_is_wanted(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            assert node.module is None or not node.module.startswith("asyncengine.model")


@pytest.mark.parametrize("path", files("step"), ids=named)
def test_the_step_side_imports_no_asyncio_and_no_torch(path: Path) -> None:
    assert not forbidden(path, "asyncio", "anyio", "uvloop", "concurrent", "torch", "transformers")
    assert not forbidden(path, "asyncengine.loop", "asyncengine.model", "asyncengine.testing")


@pytest.mark.parametrize("path", files("speculation"), ids=named)
def test_speculation_imports_no_asyncio_and_no_torch(path: Path) -> None:
    assert not forbidden(path, "asyncio", "anyio", "uvloop", "torch", "asyncengine.model", "asyncengine.loop")


@pytest.mark.parametrize("path", VALUES, ids=named)
def test_what_both_sides_see_imports_neither(path: Path) -> None:
    assert not forbidden(path, "asyncio", "anyio", "uvloop", "concurrent", "torch", "transformers")
    assert not forbidden(path, "asyncengine.loop", "asyncengine.model", "asyncengine.testing")


@pytest.mark.parametrize("path", VALUES, ids=named)
def test_what_both_sides_see_takes_nothing_but_values_from_the_step_side(path: Path) -> None:
    used = {name for name in imports(path) if name.startswith("asyncengine.step.")}
    assert all(name.startswith("asyncengine.step.batch") for name in used)


@pytest.mark.parametrize("path", files("model"), ids=named)
def test_models_know_nothing_of_loops(path: Path) -> None:
    assert not forbidden(path, "asyncio", "anyio", "uvloop", "asyncengine.loop", "asyncengine.testing")


@pytest.mark.parametrize("path", files("grammar"), ids=named)
def test_grammars_know_neither_loops_nor_steps_nor_models(path: Path) -> None:
    assert not forbidden(path, "asyncio", "anyio", "uvloop", "torch", "transformers")
    assert not forbidden(path, "asyncengine.loop", "asyncengine.model", "asyncengine.testing")
    used = {name for name in imports(path) if name.startswith("asyncengine.step.")}
    assert all(name.startswith("asyncengine.step.batch") for name in used)


def test_grammar_libraries_are_imported_by_their_own_module_alone() -> None:
    for path in ROOT.rglob("*.py"):
        for library in ("llguidance", "xgrammar"):
            assert path.name == f"{library}_backend.py" or not forbidden(path, library), path


@pytest.mark.parametrize("path", files("testing"), ids=named)
def test_scripted_models_need_no_torch(path: Path) -> None:
    assert not forbidden(path, "torch", "transformers", "asyncengine.model")


@pytest.mark.parametrize("path", files("server"), ids=named)
def test_the_server_is_a_thin_layer_over_what_is_public(path: Path) -> None:
    assert not forbidden(path, "torch", "transformers", "tokenizers", "safetensors", "asyncengine.model")
    assert not forbidden(path, "asyncengine.testing", "asyncengine.instruction_queue", "asyncengine.stream_back")
    used = {name for name in imports(path) if name.startswith("asyncengine.step.")}
    assert all(name.startswith(("asyncengine.step.batch", "asyncengine.step.model")) for name in used)


def test_nothing_knows_the_server() -> None:
    for path in ROOT.rglob("*.py"):
        if path.parts[len(ROOT.parts)] not in ("server", "cli"):
            assert not forbidden(path, "asyncengine.server", "starlette", "uvicorn", "prometheus_client", "msgspec"), (
                path
            )


def test_nothing_knows_the_command_line() -> None:
    for path in ROOT.rglob("*.py"):
        if path.parts[len(ROOT.parts)] not in ("cli", "__main__.py"):
            assert not forbidden(path, "asyncengine.cli", "typer", "rich", "httpx"), path


@pytest.mark.parametrize("path", files("cli"), ids=named)
def test_the_command_line_uses_the_engine_as_anybody_would(path: Path) -> None:
    assert not forbidden(path, "asyncengine.testing", "asyncengine.instruction_queue", "asyncengine.stream_back")
    assert not forbidden(path, "asyncengine.step", "asyncengine.model.runner")


def test_the_core_has_no_threads() -> None:
    for path in files("step"):
        if path.name != "thread.py":
            assert not forbidden(path, "threading", "queue", "multiprocessing", "asyncengine.instruction_queue")


def test_only_the_core_reads_the_clock() -> None:
    for path in files("step"):
        if path.name not in ("core.py", "thread.py"):
            assert not forbidden(path, "time", "datetime")


def test_the_package_configures_nobody() -> None:
    """No logging set-up, no signals, no environment variables of our own."""
    served = [path for path in files("server") if path.name != "serve.py"]  # which is a program
    for path in [*VALUES, *files("loop"), *files("step"), *files("testing"), *served]:
        assert not forbidden(path, "signal")
        if path.name == "builds.py":  # asks which compiler and which cache the user has chosen for all programs
            continue
        assert "os.environ" not in path.read_text(encoding="utf-8")
