"""The demonstration runs to its end, right, and ends cleanly when it is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

from tests.docs.pages import ROOT

TWICE = """
import runpy, sys
for _ in range(2):
    try:
        runpy.run_path("scripts/demo.py", run_name="__main__")
    except SystemExit as end:
        print("status", end.code)
"""


def test_demo_answers_everything_rightly_across_a_reload_and_ends_cleanly_when_interrupted() -> None:
    """Twice in one process, which imports torch but once."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", TWICE],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as demo:  # fmt: skip
        assert demo.stdout is not None and demo.stderr is not None
        first, second = "", ""
        for line in demo.stdout:
            first += line
            if line.startswith("status "):
                break
        for line in demo.stdout:
            second += line
            if line.startswith("chat "):
                break
        demo.send_signal(signal.SIGINT)
        second += demo.stdout.read()
        errors = demo.stderr.read()
        assert demo.wait(timeout=60) == 0, first + second + errors
    assert first.endswith("status 0\n"), first + errors
    answers = re.search(r"answers +(\d+) of (\d+) right, 8 at a time", first)
    assert answers is not None and answers[1] == answers[2]
    assert first.count(", right]") == int(answers[1]) > 100
    in_flight = re.search(r"hot reload +\d+ ms, (\d+) answers in flight, 0 lost", first)
    assert in_flight is not None and int(in_flight[1]) > 0
    assert second.endswith("interrupted\nstatus 130\n")
    assert errors == ""
