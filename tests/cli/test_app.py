"""The commands together: what --help imports, and how wrong input is answered."""

from __future__ import annotations

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import asyncengine
from asyncengine.cli.flags import EngineFlags
from tests.cli.programs import APP, run, run_process, scripted_loader
from tests.test_import import HEAVY

COMMANDS = [command.name for command in APP.registered_commands]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_no_model_code(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from asyncengine.cli import main\n"
        "try:\n    main()\nfinally:\n    "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    slow = {*HEAVY, "pydantic", "numpy", "asyncio", "anyio", "uvloop", "rich", "starlette", "uvicorn", "httpx"}
    assert not set(done.stderr.split()) & slow
    assert "asyncengine" in done.stdout


@pytest.mark.parametrize("name", ["chat", "complete", "serve", "bench", "trace", "estimate"])
def test_a_model_that_is_not_there_is_refused_before_anything_is_imported(name: str) -> None:
    program = (
        "import sys\n"
        "from asyncengine.cli import main\n"
        "try:\n    main()\nfinally:\n    print(*sorted({'torch', 'transformers', 'uvicorn'} & set(sys.modules)))"
    )
    wrong = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, name, "./nowhere"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert wrong.returncode == 1
    assert wrong.stderr == "asyncengine: model './nowhere': there is no such directory\n"
    assert wrong.stdout == "\n"


@pytest.mark.parametrize("arguments", [["check"], ["top"], ["bench", "--url"], ["trace", "--url"]])
def test_a_url_that_is_none_is_refused_before_anything_is_imported(arguments: list[str]) -> None:
    program = (
        "import sys; sys.modules['httpx'] = sys.modules['asyncio'] = None; from asyncengine.cli import main; main()"
    )
    wrong = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments, "http://here:80a"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("asyncengine: the URL is 'http://here:80a'; expected http://HOST:PORT")


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help_is_readable_in_eighty_columns(arguments: list[str]) -> None:
    assert max(map(len, run(*arguments, "--help").out.splitlines())) <= 80


@pytest.mark.alone
@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"]], ids=["all", "one"])
def test_help_is_there_at_once(arguments: list[str]) -> None:
    def seconds(*command: str) -> float:
        best = float("inf")
        for _ in range(5):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
            best = min(best, time.perf_counter() - begun)
        return best

    assert seconds("-m", "asyncengine", *arguments) < max(0.3, 3 * seconds("-c", "import typer"))


def test_the_console_script_and_the_module_are_the_same_command() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"asyncengine": "asyncengine.cli:main"}
    assert run_process("--version").out == f"asyncengine {asyncengine.__version__}\n"


def test_every_command_says_what_it_does() -> None:
    told = run("--help").out
    for name in COMMANDS:
        assert name is not None
        assert f"  {name} " in told
        assert run(name, "--help").status == 0


def test_there_are_few_flags() -> None:
    import typer.main

    group = typer.main.get_command(APP)
    flags = {
        name
        for command in group.commands.values()  # type: ignore[attr-defined]
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("--")
    }
    assert len(flags) < 50, sorted(flags)


def test_a_wrong_command_and_a_wrong_flag_are_answered_with_the_nearest() -> None:
    wrong = run("serv")
    assert wrong.status == 2 and "Did you mean 'serve'?" in wrong.err
    wrong = run("serve", "--max-model-length", "3")
    assert wrong.status == 2 and "--max-model-len" in wrong.err


@pytest.mark.parametrize(
    ("given", "mode", "models"), [(None, "disable", ()), ("ngram", "ngram", ()), ("small", "small_draft", ("small",))]
)
def test_a_flag_names_who_guesses(given: str | None, mode: str, models: tuple[str, ...]) -> None:
    length = 0 if given is None else 3
    config = EngineFlags(speculative_model=given, num_speculative_tokens=length).config("large", scripted_loader())
    assert (config.speculative_mode, config.additional_models, config.spec_draft_length) == (mode, models, length)


def test_an_error_of_the_engine_names_the_flag() -> None:
    wrong = run("serve", "--max-num-seqs", "0")
    assert wrong.status == 1
    assert wrong.err == "asyncengine: --max-num-seqs (max_num_sequence) is 0; expected an integer >= 1\n"
