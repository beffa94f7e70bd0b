"""The folder is the thread: who may import what, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import asyncengine

ROOT = Path(asyncengine.__file__).parent


@cache
def imports(path: Path) -> frozenset[str]:
    """Names of all modules that a file imports, in whatever place, except for type checkers alone."""
    found: set[str] = set()
    statements: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            statements += node.orelse
        else:
            blocks = (getattr(node, name, ()) for name in ("body", "orelse", "handlers", "finalbody", "cases"))
            statements += (each for block in blocks if isinstance(block, list) for each in block)
    return frozenset(found)


def forbidden(paths: Iterable[Path], *names: str) -> dict[str, set[str]]:
    """Which of these are imported, by who does. Whole folders at a time: a test for each file costs more than it."""
    modules = tuple(f"{name}." for name in names)
    found = {named(path): {used for used in imports(path) if f"{used}.".startswith(modules)} for path in paths}
    return {path: used for path, used in found.items() if used}


def used_of_the_step_side(paths: Iterable[Path], *but: str) -> dict[str, set[str]]:
    """What is imported from `asyncengine.step` except for these."""
    found = {named(path): {name for name in imports(path) if name.startswith("asyncengine.step.")} for path in paths}
    left = {path: {name for name in used if not name.startswith(but)} for path, used in found.items()}
    return {path: used for path, used in left.items() if used}


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


EVERY = files(".")


VALUES = [path for path in sorted(ROOT.glob("*.py")) if path.name not in ("__init__.py", "__main__.py")]


def test_the_loop_side_imports_no_torch() -> None:
    assert not forbidden(files("loop"), "torch", "transformers", "tokenizers", "safetensors")


def test_the_loop_side_loads_models_only_where_one_is_wanted() -> None:
    for path in files("loop"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                assert node.module is None or not node.module.startswith("asyncengine.model"), path


def test_the_step_side_imports_no_asyncio_and_no_torch() -> None:
    assert not forbidden(files("step"), "asyncio", "anyio", "uvloop", "concurrent", "torch", "transformers")
    assert not forbidden(files("step"), "asyncengine.loop", "asyncengine.model", "asyncengine.testing")


def test_speculation_imports_no_asyncio_and_no_torch() -> None:
    assert not forbidden(
        files("speculation"), "asyncio", "anyio", "uvloop", "torch", "asyncengine.model", "asyncengine.loop"
    )


def test_what_both_sides_see_imports_neither() -> None:
    assert not forbidden(VALUES, "asyncio", "anyio", "uvloop", "concurrent", "torch", "transformers")
    assert not forbidden(VALUES, "asyncengine.loop", "asyncengine.model", "asyncengine.testing")


def test_what_both_sides_see_takes_nothing_but_values_from_the_step_side() -> None:
    assert not used_of_the_step_side(VALUES, "asyncengine.step.batch")


def test_models_know_nothing_of_loops() -> None:
    assert not forbidden(files("model"), "asyncio", "anyio", "uvloop", "asyncengine.loop", "asyncengine.testing")


def test_grammars_know_neither_loops_nor_steps_nor_models() -> None:
    assert not forbidden(files("grammar"), "asyncio", "anyio", "uvloop", "torch", "transformers")
    assert not forbidden(files("grammar"), "asyncengine.loop", "asyncengine.model", "asyncengine.testing")
    assert not used_of_the_step_side(files("grammar"), "asyncengine.step.batch")


def test_grammar_libraries_are_imported_by_their_own_module_alone() -> None:
    for library in ("llguidance", "xgrammar"):
        assert not forbidden([path for path in EVERY if path.name != f"{library}_backend.py"], library)


def test_scripted_models_need_no_torch() -> None:
    assert not forbidden(files("testing"), "torch", "transformers", "asyncengine.model")


def test_the_server_is_a_thin_layer_over_what_is_public() -> None:
    assert not forbidden(files("server"), "torch", "transformers", "tokenizers", "safetensors", "asyncengine.model")
    assert not forbidden(
        files("server"), "asyncengine.testing", "asyncengine.instruction_queue", "asyncengine.stream_back"
    )
    assert not used_of_the_step_side(files("server"), "asyncengine.step.batch", "asyncengine.step.model")


def test_nothing_knows_the_server() -> None:
    others = [path for path in EVERY if path.parts[len(ROOT.parts)] not in ("server", "cli")]
    assert not forbidden(others, "asyncengine.server", "starlette", "uvicorn", "prometheus_client", "msgspec")


def test_nothing_knows_the_command_line() -> None:
    others = [path for path in EVERY if path.parts[len(ROOT.parts)] not in ("cli", "__main__.py")]
    assert not forbidden(others, "asyncengine.cli", "typer", "rich")


def test_nobody_but_the_command_line_and_what_fetches_images_asks_servers() -> None:
    others = [path for path in EVERY if path.parts[len(ROOT.parts)] != "cli" and path != ROOT / "server/fetch.py"]
    assert not forbidden(others, "httpx")


def test_the_command_line_uses_the_engine_as_anybody_would() -> None:
    assert not forbidden(
        files("cli"), "asyncengine.testing", "asyncengine.instruction_queue", "asyncengine.stream_back"
    )
    assert not forbidden(files("cli"), "asyncengine.step", "asyncengine.model.runner")


def test_the_core_has_no_threads() -> None:
    others = [path for path in files("step") if path.name != "thread.py"]
    assert not forbidden(others, "threading", "queue", "multiprocessing", "asyncengine.instruction_queue")


def test_only_the_core_reads_the_clock() -> None:
    others = [path for path in files("step") if path.name not in ("core.py", "thread.py")]
    assert not forbidden(others, "time", "datetime")


def test_the_package_configures_nobody() -> None:
    """No logging set-up, no signals, no environment variables of our own."""
    served = [path for path in files("server") if path.name != "serve.py"]  # which is a program
    paths = [*VALUES, *files("loop"), *files("step"), *files("testing"), *served]
    assert not forbidden(paths, "signal")
    for path in paths:
        if path.name == "builds.py":  # asks which compiler and which cache the user has chosen for all programs
            continue
        assert "os.environ" not in path.read_text(encoding="utf-8"), path
