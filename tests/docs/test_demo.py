"""The demonstration runs to its end, right, or ends cleanly when it is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

from tests.docs.pages import ROOT

DEMO = [sys.executable, "scripts/demo.py"]


def test_demo_answers_everything_rightly_across_a_reload() -> None:
    demo = subprocess.run(DEMO, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    answers = re.search(r"answers +(\d+) of (\d+) right, 8 at a time", demo.stdout)
    assert answers is not None and answers[1] == answers[2]
    assert demo.stdout.count(", right]") == int(answers[1]) > 100
    in_flight = re.search(r"hot reload +\d+ ms, (\d+) answers in flight, 0 lost", demo.stdout)
    assert in_flight is not None and int(in_flight[1]) > 0
    assert demo.stderr == ""


def test_demo_ends_cleanly_when_interrupted() -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        DEMO, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None and demo.stderr is not None
        for line in demo.stdout:
            if line.startswith("chat "):
                break
        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()
        errors = demo.stderr.read()
        assert demo.wait(timeout=60) == 130, rest + errors
    assert rest.endswith("interrupted\n")
    assert errors == ""
