"""What importing the package costs, in modules."""

from __future__ import annotations

import functools
import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "pytest", "hypothesis", "llguidance")


@functools.cache
def modules_after(statement: str) -> set[str]:
    """What is imported in a process of its own, where a warning is an error."""
    program = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


ECHO = "import asyncengine.testing.engines as e; e.echo_engine()"


@pytest.mark.parametrize("statement", ["import asyncengine", ECHO])
def test_imports_neither_torch_nor_transformers(statement: str) -> None:
    assert not modules_after(statement) & set(HEAVY)


def test_a_name_is_imported_when_it_is_used() -> None:
    assert not modules_after("import asyncengine") & {"numpy", "asyncio", "anyio", "uvloop"}
    assert modules_after("from asyncengine import *; EngineConfig, Trace, AsyncEngine")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import asyncengine

    with pytest.raises(AttributeError, match="'asyncengine' has no attribute 'Engine'"):
        asyncengine.Engine  # noqa: B018
    assert set(asyncengine.__all__) <= set(dir(asyncengine))


def test_the_server_is_imported_by_nobody_else_and_brings_no_torch() -> None:
    assert not modules_after(ECHO) & {"starlette", "uvicorn", "msgspec"}
    pytest.importorskip("starlette")
    assert not modules_after("import asyncengine.server.serve") & set(HEAVY)


def test_starts_no_thread_and_changes_no_signal() -> None:
    program = (
        "import signal, threading; before = [signal.getsignal(s) for s in signal.valid_signals()]; "
        "import asyncengine, asyncengine.testing; "
        "assert threading.active_count() == 1; "
        "assert before == [signal.getsignal(s) for s in signal.valid_signals()]"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], timeout=100, check=True)


def test_making_an_engine_imports_neither_torch_nor_transformers() -> None:
    made = modules_after("from asyncengine import AsyncEngine, EngineConfig; AsyncEngine(EngineConfig('tiny'))")
    assert "asyncio" in made and not made & set(HEAVY)


def test_the_package_is_imported_with_few_modules() -> None:
    counted = "import sys; before = len(sys.modules); {}; print(len(sys.modules) - before)"

    def brought(statement: str) -> int:
        run = subprocess.run(
            [sys.executable, "-c", counted.format(statement)], capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    assert brought("import asyncengine") < 60
    assert brought("from asyncengine import AsyncEngine") < 600


@pytest.mark.alone
def test_the_package_is_imported_in_a_few_times_the_interpreters_own_start() -> None:
    def seconds(statement: str) -> float:
        best = float("inf")
        for _ in range(7):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            best = min(best, time.perf_counter() - begun)
        return best

    assert seconds("import asyncengine") < 6 * seconds("pass")
