"""The demonstration runs to its end, right, and ends cleanly when it is interrupted."""

from __future__ import annotations

import re
import runpy
import signal
import sys
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(autouse=True)
def settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The demonstration reads the command line, has one thread and shows no bars."""
    import torch
    from transformers.utils import logging

    monkeypatch.setattr(sys, "argv", ["demo.py"])
    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    yield
    torch.set_num_threads(threads)
    if bars:
        logging.enable_progress_bar()


def status() -> object:
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "demo.py"), run_name="__main__")
    return ended.value.code


def test_demo_answers_everything_rightly_across_a_reload(capsys: pytest.CaptureFixture[str]) -> None:
    ended, (said, errors) = status(), capsys.readouterr()
    assert (ended, errors) == (0, ""), said
    answers = re.search(r"answers +(\d+) of (\d+) right, 8 at a time", said)
    assert answers is not None and answers[1] == answers[2]
    assert said.count(", right]") == int(answers[1]) > 100
    in_flight = re.search(r"hot reload +\d+ ms, (\d+) answers in flight, 0 lost", said)
    assert in_flight is not None and int(in_flight[1]) > 0


def test_demo_ends_cleanly_when_it_is_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, answers = sys.stdout.write, list[str]()

    def interrupting(text: str) -> int:
        if text.startswith("chat "):
            answers.append(text)
            if len(answers) == 1:  # a second signal is an exception in the middle of whatever runs
                signal.raise_signal(signal.SIGINT)
        return write(text)

    monkeypatch.setattr(sys.stdout, "write", interrupting)
    assert status() == 130
    said, errors = capsys.readouterr()
    assert said.endswith("interrupted\n") and errors == ""
