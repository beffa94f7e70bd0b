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
from tests.cli.programs import APP, run, run_in_turn, run_process, scripted_loader
from tests.test_import import HEAVY

COMMANDS = [command.name for command in APP.registered_commands]


def test_help_imports_no_model_code() -> None:
    slow = {*HEAVY, "pydantic", "numpy", "asyncio", "anyio", "uvloop", "rich", "starlette", "uvicorn", "httpx"}
    commands = [["--help"], ["--version"], *([str(name), "--help"] for name in COMMANDS)]
    for arguments, (done, modules) in zip(commands, run_in_turn(*commands), strict=True):
        assert not modules & slow, arguments
        assert done.status == 0 and "asyncengine" in done.out, arguments


def test_a_model_that_is_not_there_is_refused_before_anything_is_imported() -> None:
    names = ["chat", "complete", "serve", "bench", "trace", "estimate"]
    for name, (wrong, modules) in zip(names, run_in_turn(*([name, "./nowhere"] for name in names)), strict=True):
        assert wrong.status == 1, name
        assert wrong.err == "asyncengine: model './nowhere': there is no such directory\n"
        assert wrong.out == "" and not {"torch", "transformers", "uvicorn"} & modules, name


def test_a_url_that_is_none_is_refused_before_anything_is_imported() -> None:
    commands = [[*words, "http://here:80a"] for words in (["check"], ["top"], ["bench", "--url"], ["trace", "--url"])]
    for arguments, (wrong, _) in zip(commands, run_in_turn(*commands, without=["httpx", "asyncio"]), strict=True):
        assert wrong.status == 2, arguments
        assert wrong.err.startswith("asyncengine: the URL is 'http://here:80a'; expected http://HOST:PORT")


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
    assert len(flags) <= 61, sorted(flags)


def test_a_wrong_command_and_a_wrong_flag_are_answered_with_the_nearest() -> None:
    wrong = run("serv")
    assert wrong.status == 2 and "Did you mean 'serve'?" in wrong.err
    wrong = run("serve", "--max-model-length", "3")
    assert wrong.status == 2 and "--max-model-len" in wrong.err


@pytest.mark.parametrize(
    ("given", "mode", "models"),
    [
        (None, "disable", ()),
        ("ngram", "ngram", ()),
        ("small", "small_draft", ("small",)),
        ("mtp", "mtp", ()),
        ("tiny-draft", "small_draft", ("tiny-draft",)),
        ("tiny-eagle3", "eagle3", ("tiny-eagle3",)),
    ],
)
def test_a_flag_names_who_guesses(given: str | None, mode: str, models: tuple[str, ...]) -> None:
    length = 0 if given is None else 3
    config = EngineFlags(speculative_model=given, num_speculative_tokens=length).config("large", scripted_loader())
    assert (config.speculative_mode, config.additional_models, config.spec_draft_length) == (mode, models, length)


@pytest.mark.parametrize("given", [None, True, False])
def test_flags_say_whether_images_and_audio_are_taken(given: bool | None) -> None:
    config = EngineFlags(images=given, audio_input=given).config("large", scripted_loader())
    assert config.images is given and config.audio is given


def test_an_error_of_the_engine_names_the_flag() -> None:
    wrong = run("serve", "--max-num-seqs", "0")
    assert wrong.status == 1
    assert wrong.err == "asyncengine: --max-num-seqs (max_num_sequence) is 0; expected an integer >= 1\n"
