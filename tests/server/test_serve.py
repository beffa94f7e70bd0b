"""The whole server as a process: it listens at once, serves, and ends as it should."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from asyncengine import ConfigError, EngineConfig
from asyncengine.server.serve import serve
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.server.serving import MODEL, completion, error

PROGRAM = """
import logging, sys
from asyncengine import EngineConfig
from asyncengine.server.serve import serve
from asyncengine.testing import ByteTokenizer, ScriptedLoader
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
loader = ScriptedLoader(tokenizer=ByteTokenizer(), step_seconds=float(sys.argv[1]))
sys.exit(serve(EngineConfig("scripted"), port=0, loader=loader, drain_seconds=float(sys.argv[2]),
               on_listening=lambda address: print(address, flush=True)))
"""


# With real weights; once it is ready it prints how many objects are frozen and what it said before, and ends itself.
REAL = """
import gc, json, os, signal, sys, threading, time, urllib.error, urllib.request
from asyncengine import EngineConfig
from asyncengine.server.serve import serve
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
def wait(address):
    said = []
    while True:
        try:
            opener.open(address + "/ready").close()
        except urllib.error.HTTPError as error:
            said.append(json.load(error)["error"]["message"])
            time.sleep(0.05)  # what it asks without a pause, it takes from the load
            continue
        except OSError:
            continue
        print(json.dumps({"frozen": gc.get_freeze_count(), "said": said}), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        return
sys.exit(serve(EngineConfig("tiny", mode="local"), port=0,
               on_listening=lambda address: threading.Thread(target=wait, args=(address,)).start()))
"""


@contextmanager
def process(step_seconds: float = 0.0, drain: float = 5.0) -> Iterator[tuple[Any, str, list[str]]]:
    arguments = [sys.executable, "-W", "error", "-c", PROGRAM, str(step_seconds), str(drain)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        log: list[str] = []
        reading = threading.Thread(target=lambda: log.extend(running.stderr or ()))
        reading.start()
        try:
            assert running.stdout is not None
            yield running, running.stdout.readline().strip(), log
        finally:
            if running.poll() is None:
                running.kill()
            running.wait()
            reading.join()


def ready(client: httpx.Client) -> None:
    while client.get("/ready").status_code != 200:
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_lets_what_is_under_way_finish_and_refuses_what_is_new(number: signal.Signals) -> None:
    with process(step_seconds=0.01) as (running, address, log):
        with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
            ready(client)
            body = completion("x" * 60, max_tokens=60, stream=True)
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                first = next(lines)
                running.send_signal(number)
                with httpx.Client(base_url=address, trust_env=False) as other:
                    while (
                        late := other.post("/v1/completions", json=completion("x", max_tokens=1))
                    ).status_code == 200:
                        pass
                    assert late.status_code == 503 and error(late)["code"] == "engine_draining"
                rest = [line for line in lines if line]
        assert running.wait(timeout=30) == 0
    assert first.startswith("data: ") and rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    assert any("another signal ends them" in line for line in log)
    assert not any("Traceback" in line for line in log)


def test_a_second_signal_ends_what_is_under_way() -> None:
    with process(step_seconds=0.01, drain=600) as (running, address, _):
        with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
            ready(client)
            body = completion("x" * 3000, max_tokens=3000, stream=True)
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                running.send_signal(signal.SIGINT)
                while client_state(address) == "ready":
                    pass
                running.send_signal(signal.SIGINT)
                rest = [line for line in lines if line]
        assert running.wait(timeout=30) == 0
    assert '"request_aborted"' in rest[-2]


def client_state(address: str) -> str:
    return str(httpx.get(f"{address}/health", trust_env=False).json()["state"])


def test_a_model_that_cannot_be_loaded_ends_the_server_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    loader.load_errors[MODEL] = RuntimeError("the disk is gone")
    frozen = gc.get_freeze_count()
    assert serve(EngineConfig(MODEL), port=0, loader=loader) == 1
    assert f"{MODEL} cannot be loaded" in caplog.text
    assert gc.get_freeze_count() > frozen / 2  # what others have frozen stays


def test_what_it_has_frozen_is_let_go_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else extension modules would complain of what is not collected when the interpreter ends."""
    done = list[bool]()
    monkeypatch.setattr(gc, "unfreeze", lambda: done.append(True))
    assert serve(EngineConfig(str(tmp_path)), port=0) == 1
    assert done == [True]


def test_full_collections_do_not_look_at_what_was_imported_for_good() -> None:
    gc.unfreeze()
    sys.modules[serve.__module__]._import_for_good(EngineConfig("tiny"))  # type: ignore[attr-defined]
    assert gc.get_freeze_count() > 100_000


@pytest.mark.long
def test_it_answers_while_it_imports_and_in_the_end_all_is_collected() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", REAL], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    printed = json.loads(run.stdout)
    assert printed["frozen"] > 100_000
    assert printed["said"] and all(message.startswith("the model is being loaded") for message in printed["said"])
    assert "leaked" not in run.stderr  # extension modules complain there of what is never collected


@pytest.mark.parametrize("known", [True, False])
def test_models_of_transformers_are_imported_for_those_that_need_them(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take seconds, and a checkpoint that was loaded before does without. None is collected meanwhile."""
    from asyncengine.model import load_check

    module = sys.modules[serve.__module__]
    imported: list[tuple[str, bool]] = []
    importing = importlib.import_module

    def note(name: str, package: str | None = None) -> Any:
        imported.append((name, gc.isenabled()))
        return importing(name, package)

    monkeypatch.setattr(load_check, "is_known", lambda config: known)
    monkeypatch.setattr(gc, "freeze", lambda: imported.append(("frozen", False)))
    monkeypatch.setattr(importlib, "import_module", note)
    module._import_for_good(EngineConfig("tiny"))
    assert gc.isenabled() and imported[-1][0] == "frozen"
    assert ("transformers.modeling_utils" in [name for name, _ in imported]) is not known
    assert not any(collects for name, collects in imported if not name.endswith(".location"))


def test_an_address_that_is_taken_is_an_error_and_not_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve(EngineConfig(MODEL), port=port) == 1
    assert [record.message for record in caplog.records] == [
        f"cannot listen on 127.0.0.1 port {port}: Address already in use"
    ]


@pytest.mark.parametrize("fields", [{"admin": True}, {"drain_seconds": -1}, {"max_concurrency": 0}])
def test_a_wrong_setting_is_refused_before_anything_begins(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        serve(EngineConfig(MODEL), port=0, **fields)
