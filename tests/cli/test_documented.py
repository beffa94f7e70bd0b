"""Every command line in docs/cli.md runs, and prints what the page says it prints."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from typer.testing import CliRunner

from tests.cli.programs import APP
from tests.docs.pages import ROOT, Block, blocks
from tests.model import tiny_adapters
from tests.model.speech import checkpoints as speech

PAGE = ROOT / "docs/cli.md"
BLOCKS = [block for block in blocks(PAGE) if block.language == "sh"]
HERE = "http://127.0.0.1:8000"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ``serve`` was asked for, instead of doing it."""
    from asyncengine.server import serve

    found: list[Any] = []
    monkeypatch.setattr(serve, "serve", lambda config, **settings: found.append((config, settings)) or 0)
    return found


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("served", "one_thread")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}")
def test_a_block_runs(block: Block, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "=./pirate" in block.code:
        tiny_adapters.write(tmp_path / "pirate", 1)
    if "./whisper" in block.code:
        speech.write(tmp_path / "whisper", times=True)
        soundfile.write(tmp_path / "talk.wav", speech.sound(1, 1.5), speech.RATE)
    for line in block.code.splitlines():
        words = shlex.split(line.replace(HERE, address))
        stdin = ""
        if "|" in words:
            cut = words.index("|")
            assert words[0] == "echo"
            stdin, words = " ".join(words[1:cut]) + "\n", words[cut + 1 :]
        assert words[0] == "asyncengine"
        done = CliRunner().invoke(APP, words[1:], input=stdin, catch_exceptions=False)
        fails = block.output is not None and '"error"' in block.output
        assert done.exit_code == int(fails), done.output
        if block.output is not None:
            assert done.stdout.strip() == block.output.strip()


def test_every_command_has_its_row_and_its_block() -> None:
    text = PAGE.read_text(encoding="utf-8")
    used = {word for block in BLOCKS for word in re.findall(r"\basyncengine (\w+)", block.code)}
    names = {str(command.name) for command in APP.registered_commands}
    assert used == names == set(re.findall(r"^\| `(\w+)", text, re.MULTILINE))


def test_every_flag_on_the_page_exists() -> None:
    import typer.main

    group: Any = typer.main.get_command(APP)
    parameters = [parameter for command in group.commands.values() for parameter in command.params]
    known = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", PAGE.read_text(encoding="utf-8"))) - {"--help"}
    assert named <= known
