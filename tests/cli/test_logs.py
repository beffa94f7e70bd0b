from __future__ import annotations

import json
import logging
import subprocess
import sys

import httpx
import pytest

from asyncengine.cli.logs import JsonLines
from tests.cli.programs import server


def test_every_line_of_a_server_is_a_json_object_also_of_one_with_spans() -> None:
    with server("--log-format", "json", "--otel") as (process, address, log):
        with httpx.Client(base_url=address, trust_env=False) as client:
            found = client.post("/v1/completions", json={"prompt": "hi"}, headers={"x-request-id": "mine"})
            assert found.json()["choices"][0]["text"] == "hi"
        process.terminate()
        process.wait(timeout=30)
    lines = [json.loads(line) for line in log]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    [line] = [line for line in lines if line.get("request_id") == "mine"]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert line["level"] == "info" and line["logger"] == "asyncengine.server" and line["milliseconds"] > 0


def test_a_record_keeps_what_was_added_and_its_exception_on_one_line() -> None:
    record = logging.makeLogRecord({"name": "a.b", "levelname": "ERROR", "msg": "no %s\nat all", "args": ("x",)})
    record.thing = {1}
    try:
        raise ValueError("boom")
    except ValueError:
        record.exc_info = sys.exc_info()
    text = JsonLines().format(record)
    assert "\n" not in text
    found = json.loads(text)
    assert found["message"] == "no x\nat all" and found["thing"] == "{1}" and "ValueError: boom" in found["exception"]


def test_embedded_there_is_one_logger_per_package_and_no_handler() -> None:
    program = """
import asyncio, logging, httpx
from asyncengine.server import create_app
from asyncengine.testing import echo_engine

async def main():
    async with echo_engine() as engine:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(engine)), base_url="http://a") as client:
            assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200

asyncio.run(main())
known = logging.root.manager.loggerDict
ours = {name: found for name, found in known.items() if name.partition(".")[0] == "asyncengine"}
print(sorted(name for name, found in ours.items() if isinstance(found, logging.Logger)), logging.root.handlers)
assert not [found for found in ours.values() if getattr(found, "handlers", None) or not getattr(found, "propagate", 1)]
assert all(found.level == 0 for found in ours.values() if isinstance(found, logging.Logger))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['asyncengine', 'asyncengine.server'] []" and done.stderr == ""


@pytest.mark.long
def test_without_the_extra_spans_are_refused_with_what_to_install() -> None:
    program = "import sys; sys.modules['opentelemetry'] = None; from asyncengine.cli import main; main()"
    wrong = subprocess.run(
        [sys.executable, "-c", program, "serve", "--otel"], capture_output=True, text=True, timeout=60, check=False
    )
    assert wrong.returncode == 1
    assert wrong.stderr == "asyncengine: opentelemetry is not installed: pip install 'asyncengine[otel]'\n"
