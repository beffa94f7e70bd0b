"""The programs in benchmarks/ that need a GPU run here with tiny shapes, so that they do not rot."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import Report

ROOT = Path(__file__).parents[1]


def run(module: str, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """A benchmark's exit status, the JSON object that it prints last, and all that it said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    assert ended.stdout, said
    return ended.returncode, json.loads(ended.stdout.splitlines()[-1]), said


def test_gpu_runs_end_to_end_on_the_cpu() -> None:
    status, result, said = run("gpu", "--tiny")
    assert result["errors"] == {}, said
    assert result["skipped"] == []
    assert status == 0
    found = result["results"]
    assert all(case["ok"] for case in found["parity"].values())
    assert {case.split()[0] for case in found["parity"]} == {"llama", "qwen3", "gemma3", "gpt_oss", "mixtral"}
    assert set(found) == {
        "ceilings", "parity", "8b transformers static cache, batch 1", "8b load", "8b decode, batch 1",
        "8b decode, batch 4", "8b first token, 0 others", "8b first token, 2 others", "0.6b workload",
        "0.6b workload, share for the peer", "0.6b step gap, 0 readers", "0.6b step gap, 8 readers",
        "0.6b transformers continuous batching",
    }  # fmt: skip
    assert set(result["ratios"]) == {"workload_over_continuous_batching", "batch_1_over_static_cache"}


def test_a_part_of_gpu_that_fails_or_has_no_time_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(seconds=100)
    assert report.part("late", 1000, lambda: 1) is None
    assert report.part("broken", 0, lambda: {}["what"]) is None
    assert report.part("good", 10, lambda: 2) == 2
    assert report.skipped == ["late"]
    assert report.errors == {"broken": "KeyError: 'what'"}
    assert report.results == {"good": 2}
    assert "late: skipped, it takes about 1000 s" in capsys.readouterr().out


def test_attention_kernels_compile_for_hopper_without_spills() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    status, result, said = run("attention_compile", "--quick")
    assert result["spilling"] == [], said
    assert status == 0
    assert result["kernels"] == 14
