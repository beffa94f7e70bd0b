"""``asyncengine top``: what it reads off /metrics, and how it shows it."""

from __future__ import annotations

import sys

import httpx
import pytest

from asyncengine.cli.command import Failure
from asyncengine.cli.top import Look
from tests.cli.programs import run, terminal

TEXT = """\
# HELP asyncengine_num_requests_running Requests with a sequence in the batch.
asyncengine_num_requests_running{engine="0",model_name="a{b}"} 3.0
asyncengine_num_requests_waiting{engine="0",model_name="a{b}"} 2.0
asyncengine_num_requests_queued{engine="0",model_name="a{b}"} 1.0
asyncengine_kv_cache_usage_ratio{engine="0",model_name="a{b}"} 0.25
asyncengine_generation_tokens_total{engine="0",model_name="a{b}"} TOKENS
asyncengine_prefix_cache_queries_total{engine="0",model_name="a{b}"} QUERIES
asyncengine_prefix_cache_hits_total{engine="0",model_name="a{b}"} HITS
asyncengine_step_seconds_bucket{engine="0",le="0.1",model_name="a{b}"} 7.0
asyncengine_step_seconds_count{engine="0",model_name="a{b}"} STEPS
asyncengine_step_seconds_sum{engine="0",model_name="a{b}"} SECONDS
asyncengine_event_loop_lag_seconds_count{engine="0",model_name="a{b}"} 20.0
asyncengine_event_loop_lag_seconds_sum{engine="0",model_name="a{b}"} 0.01
asyncengine_requests_total{engine="0",finish_reason="stop",model_name="a{b}"} 4.0
asyncengine_requests_total{engine="0",finish_reason="length",model_name="a{b}"} 5.0
"""


def look(at: float, **values: float) -> Look:
    text = TEXT
    for name, value in ({"tokens": 0, "queries": 0, "hits": 0, "steps": 0, "seconds": 0} | values).items():
        text = text.replace(name.upper(), str(float(value)))
    return Look.read(text, at)


def test_rates_and_means_are_since_the_look_before() -> None:
    before = look(10.0, tokens=100, queries=10, hits=0, steps=10, seconds=1)
    now = look(12.0, tokens=300, queries=20, hits=5, steps=20, seconds=1.1)
    rows = dict(now.rows(before))
    assert now.model == "a{b}"
    assert rows["running"] == "3" and rows["waiting"] == "3" and rows["KV use"] == "25.0 %"
    assert rows["tokens/s"] == "100" and rows["hit rate"] == "50 %" and rows["step"] == "10.00 ms"
    assert rows["loop lag"] == "0.50 ms" and rows["ended"] == "9"


def test_the_first_look_has_no_rates_and_means_over_all() -> None:
    rows = dict(look(0.0, tokens=100, queries=20, hits=5, steps=10, seconds=1).rows(None))
    assert rows["tokens/s"] == "-" and rows["hit rate"] == "25 %" and rows["step"] == "100.00 ms"
    assert dict(look(0.0).rows(None))["hit rate"] == "-"


def test_a_server_that_began_anew_gives_no_negative_rate() -> None:
    assert dict(look(2.0, tokens=50).rows(look(1.0, tokens=1000)))["tokens/s"] == "50.0"


def test_other_metrics_are_refused() -> None:
    with pytest.raises(Failure, match="another kind of server"):
        Look.read("vllm:num_requests_running 3.0\n", 0.0)


def test_watches_a_server_a_line_per_look(address: str) -> None:
    ended = int(run("top", address, "--count", "1").out.split()[-1])
    httpx.post(f"{address}/v1/completions", json={"prompt": "hello"}, trust_env=False)
    done = run("top", address, "--count", "3", "--interval", "0.05")
    assert done.status == 0, done.err
    head, *lines = done.out.splitlines()
    assert head.split()[:2] == ["running", "waiting"] and "loop lag" in head
    assert len(lines) == 3 and int(lines[0].split()[-1]) == ended + 1


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_stays_in_place_in_a_terminal_until_ctrl_c(address: str) -> None:
    with terminal("top", address, "--interval", "0.1", kind="xterm") as top:
        top.until(f"tiny at {address}")
        top.until("loop lag")
        top.until("loop lag")
        top.type("\x03")
        assert top.ended() == 0
        assert "Traceback" not in top.text


def test_a_server_that_is_not_there_is_one_line() -> None:
    wrong = run("top", "http://127.0.0.1:1")
    assert wrong.status == 1 and wrong.err.startswith("asyncengine: http://127.0.0.1:1 cannot be reached")


def test_a_key_that_is_missing_is_said(guarded: str) -> None:
    assert "/metrics answers 401" in run("top", guarded).err
    assert run("top", guarded, "--api-key", "secret", "--count", "1").status == 0
