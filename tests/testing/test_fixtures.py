"""The pytest fixtures, as an application's tests use them: in a pytest of their own, under either async plugin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(60)

BODY = """
import asyncio
import sys

import pytest

from asyncengine import EngineState, GenerationConfig, RequestDroppedError


{mark}
async def test_answers(scripted_engine):
    engine = scripted_engine({{"capital of France": "Paris", "Italy": "Rome"}})
    assert (await engine.generate("What is the capital of France?")).text == "Paris"
    assert (await engine.generate("And of Italy?")).text == "Rome"
    with pytest.raises(RequestDroppedError, match="no answer"):
        await engine.generate("And of Spain?")


{mark}
async def test_echo(echo_engine):
    text = ""
    async for output in echo_engine.stream("Hello!", GenerationConfig(max_tokens=5)):
        text += output.text
    assert text == "Hello"


{mark}
async def test_several(scripted_engine):
    engines = [scripted_engine(f"engine {{i}}", max_num_sequence=2) for i in range(3)]
    results = [await engine.generate("x") for engine in engines]
    assert [result.text for result in results] == ["engine 0", "engine 1", "engine 2"]


{mark}
async def test_one_is_left_running(scripted_engine):
    engine = scripted_engine("a long answer " * 50, step_seconds=0.01)
    stream = await engine.add_request("x")
    await stream.__anext__()


def test_torch_is_not_imported(echo_engine):
    assert echo_engine.state in (EngineState.UNLOADED, EngineState.LOADING, EngineState.READY)
    assert "torch" not in sys.modules and "transformers" not in sys.modules


def test_without_any_plugin(echo_engine):
    assert asyncio.run(echo_engine.generate("hello").__class__ and _generate(echo_engine)) == "hello"


async def _generate(engine):
    return (await engine.generate("hello")).text
""".replace('echo_engine.generate("hello").__class__ and ', "")

ANYIO = """
@pytest.fixture(params=["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"])
def anyio_backend(request):
    return request.param
"""


SCOPE = ("-o", "asyncio_default_fixture_loop_scope=function")


def run(tmp_path: Path, body: str, *arguments: str) -> str:
    (tmp_path / "test_inner.py").write_text(body)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_under_pytest_asyncio(tmp_path: Path) -> None:
    out = run(tmp_path, BODY.format(mark="@pytest.mark.asyncio"), "-p", "no:anyio", *SCOPE)
    assert "6 passed" in out


def test_under_pytest_asyncio_in_automatic_mode(tmp_path: Path) -> None:
    out = run(tmp_path, BODY.format(mark=""), "-o", "asyncio_mode=auto", *SCOPE)
    assert "6 passed" in out


def test_under_anyio(tmp_path: Path) -> None:
    out = run(tmp_path, BODY.format(mark="@pytest.mark.anyio") + ANYIO, "-p", "no:asyncio")
    assert "10 passed" in out


async def test_in_this_very_test(echo_engine: object) -> None:
    from asyncengine import AsyncEngine

    assert isinstance(echo_engine, AsyncEngine)
    assert (await echo_engine.generate("hello")).text == "hello"
