"""A server's prefix cache, from one run to the next. The server runs here, and another thread is its client."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from asyncengine import AsyncEngine, ConfigError, EngineConfig
from asyncengine.prefix_file import PrefixReader, PrefixWriter
from asyncengine.server.serve import serve
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.server.serving import AUTH, KEY, MODEL, completion, error

PROMPT = "what all questions begin with, at some length"
MODEL_CONFIG = EngineConfig(MODEL, kv_cache_page_size=4, max_num_sequence=4)


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asyncengine.server")


def signalled() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def run(
    path: Path | str | None,
    client: Callable[[httpx.Client], None],
    *,
    config: EngineConfig = MODEL_CONFIG,
    kept_states: int | None = None,
    step_seconds: float = 0.0,
    ready: bool = True,
    signals: bool = True,
    **settings: Any,
) -> int:
    """Serves until the client has done, and a signal, unless it has given one itself."""
    failed: list[BaseException] = []

    def talk(address: str) -> None:
        try:
            with httpx.Client(base_url=address, trust_env=False, timeout=10) as asking:
                while ready and asking.get("/ready", headers=AUTH).status_code != 200:
                    pass
                client(asking)
        except BaseException as mistake:
            failed.append(mistake)
        if signals or failed:
            signalled()

    threads: list[threading.Thread] = []

    def listening(address: str) -> None:
        threads.append(threading.Thread(target=talk, args=(address,)))
        threads[0].start()

    loader = ScriptedLoader(tokenizer=ByteTokenizer(), kept_states=kept_states, step_seconds=step_seconds)
    before = signal.signal(signal.SIGINT, lambda *_: None)  # one may come when the server has ended
    try:
        status = serve(config, port=0, loader=loader, prefix_cache_file=path, on_listening=listening, **settings)
        for thread in threads:
            thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    if failed:
        raise failed[0]
    return status


def ask(client: httpx.Client) -> int:
    """Asks the question; returns how many tokens were there."""
    answer = client.post("/v1/completions", json=completion(PROMPT, max_tokens=2), headers=AUTH).json()
    found = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert isinstance(found, int)
    return found


def nothing(client: httpx.Client) -> None:
    pass


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a server leaves that was asked the question."""
    found = tmp_path_factory.mktemp("left") / "prefixes"
    assert run(found, ask) == 0
    return found.read_bytes()


@pytest.fixture
def path(left: bytes, tmp_path: Path) -> Path:
    """Of such a file."""
    found = tmp_path / "prefixes"
    found.write_bytes(left)
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_next_run_begins_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "prefixes"
    found: list[int] = []
    for _ in range(2):
        assert run(path, lambda client: found.append(ask(client))) == 0
        assert os.listdir(tmp_path) == ["prefixes"]
    assert found == [0, 44] and not warnings(caplog)
    told = [record.message for record in caplog.records if "prefix cache" in record.message]
    assert told == [
        f"the prefix cache begins empty: there is no file {path}",
        f"44 tokens of the prefix cache are in {path}",
        f"the prefix cache begins with 44 tokens of {path}",
        f"44 tokens of the prefix cache are in {path}",
    ]


def test_a_file_that_is_refused_is_none(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = MODEL_CONFIG.replace(kv_cache_page_size=8)
    found: list[int] = []
    content = path.read_bytes()
    assert run(path, nothing, config=config) == 0
    assert path.read_bytes() == content  # there was nothing to replace it
    assert run(path, lambda client: found.append(ask(client)), config=config) == 0
    assert run(path, lambda client: found.append(ask(client)), config=config) == 0
    assert found == [0, 40]
    assert len(warnings(caplog)) == 2 and "it differs in page size" in warnings(caplog)[0]


class Gate:
    """Holds a method up, on the thread where it is called."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        original = getattr(owner, name)

        def held(*given: Any) -> Any:
            self.reached.set()
            assert self.open.wait(10)
            return original(*given)

        patch.setattr(owner, name, held)


def test_it_is_ready_once_the_file_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, PrefixReader, "rows")
    found: list[int] = []

    def client(asking: httpx.Client) -> None:
        assert gate.reached.wait(10)
        for answer in (asking.get("/ready"), asking.post("/v1/completions", json=completion(PROMPT))):
            assert answer.status_code == 503 and error(answer)["code"] == "engine_loading"
            assert "its prefix cache" in error(answer)["message"]
        gate.open.set()
        while asking.get("/ready").status_code != 200:
            pass
        found.append(ask(asking))

    assert run(path, client, ready=False) == 0
    assert found == [44]


def test_a_signal_while_it_is_read_leaves_it_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate, content = Gate(monkeypatch, PrefixReader, "rows"), path.read_bytes()

    def client(asking: httpx.Client) -> None:
        assert gate.reached.wait(10)
        signalled()
        while asking.get("/health").json()["state"] != "closed":
            pass
        gate.open.set()

    assert run(path, client, ready=False, signals=False) == 0
    assert path.read_bytes() == content and not warnings(caplog)


@pytest.mark.parametrize(("drain", "longest"), [(0.05, 3000), (30.0, 40)])
def test_what_is_under_way_is_in_it(
    drain: float, longest: int, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it ends in time or not; the time is over only once."""
    path.unlink()
    left: list[float] = []
    shutdown = AsyncEngine.shutdown

    async def noted(engine: AsyncEngine, drain: float = 0.0) -> tuple[str, ...]:
        left.append(drain)
        return await shutdown(engine, drain)

    monkeypatch.setattr(AsyncEngine, "shutdown", noted)

    def client(asking: httpx.Client) -> None:
        body = completion("y" * 3000, max_tokens=longest, stream=True)
        with asking.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            signalled()
            rest = [line for line in lines if line]
        assert ('"finish_reason":"length"' in rest[-2]) is (longest == 40)

    assert run(path, client, step_seconds=0.002, signals=False, drain_seconds=drain) == 0
    saved = [int(record.message.split()[0]) for record in caplog.records if "tokens of" in record.message]
    assert not warnings(caplog) and len(saved) == 1
    assert (saved[0] == 3036) if longest == 40 else (saved[0] >= 3000 and left == [0.0])


def test_while_it_is_written_nothing_new_begins(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, PrefixWriter, "add")

    def client(asking: httpx.Client) -> None:
        signalled()
        assert gate.reached.wait(10)
        for answer in (asking.get("/ready"), asking.post("/v1/completions", json=completion(PROMPT))):
            assert answer.status_code == 503 and error(answer)["code"] == "engine_draining"
        gate.open.set()

    before = path.stat().st_ino
    assert run(path, client, signals=False) == 0
    assert path.stat().st_ino != before


def test_a_second_signal_while_it_is_written_leaves_the_file_that_was_there(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate, content = Gate(monkeypatch, PrefixWriter, "commit"), path.read_bytes()

    def client(asking: httpx.Client) -> None:
        ask(asking)
        signalled()
        assert gate.reached.wait(10)

    assert run(path, client) == 0  # and the second one
    assert warnings(caplog) == ["the prefix cache is not saved: there was a second signal"]
    before = {thread for thread in threading.enumerate() if "AnyIO" in thread.name}
    gate.open.set()
    for thread in before:  # the interpreter waits for them, too
        thread.join(10)
    assert path.read_bytes() == content and os.listdir(path.parent) == ["prefixes"]


def test_a_second_signal_while_requests_end_saves_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = path.read_bytes()

    def client(asking: httpx.Client) -> None:
        body = completion("y" * 3000, max_tokens=3000, stream=True)
        with asking.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            signalled()
            while asking.get("/health").json()["state"] == "ready":
                pass
            signalled()
            assert '"request_aborted"' in [line for line in lines if line][-2]

    assert run(path, client, step_seconds=0.002, signals=False, drain_seconds=float("inf")) == 0
    assert path.read_bytes() == content and len(warnings(caplog)) == 1


def test_what_cannot_be_written_is_logged(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    found: list[int] = []
    content = path.read_bytes()
    monkeypatch.setattr("tempfile.mkstemp", read_only)
    assert run(path, lambda client: found.append(ask(client))) == 0
    assert found == [44] and path.read_bytes() == content
    assert warnings(caplog) == [f"the prefix cache is not saved: cannot write {path}: Read-only file system"]


def test_of_another_model_that_was_loaded_meanwhile_it_is_not(path: Path) -> None:
    content = path.read_bytes()

    def reload(asking: httpx.Client, **changes: Any) -> None:
        config = {"model": MODEL, "kv_cache_page_size": 4, "max_num_sequence": 4} | changes
        body = {"config": config, "stream": False}
        assert asking.post("/admin/reload", json=body, headers=AUTH).status_code == 200
        asking.post("/v1/completions", json=completion("another prompt"), headers=AUTH)

    assert run(path, lambda asking: reload(asking, max_num_sequence=2), admin=True, api_key=KEY) == 0
    assert path.read_bytes() == content
    assert run(path, lambda asking: reload(asking), admin=True, api_key=KEY) == 0  # the same one again
    assert path.read_bytes() != content


def test_a_model_that_can_have_none_is_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "prefixes"
    assert run(path, nothing, kept_states=3, ready=False) == 1
    assert f"prefix_cache_file is {str(path)!r}" in caplog.text and "states are not kept" in caplog.text
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("", "expected the path of a file"), (b"x", "expected the path"), ("a\0b", "expected the path"),
        (3, "expected the path"), ("{}", "which is no regular file"), ("{}/a/b", "there is no directory '{}/a'"),
    ],
)  # fmt: skip
def test_where_none_can_be_is_refused_before_anything_begins(wrong: Any, words: str, tmp_path: Path) -> None:
    if isinstance(wrong, str):
        wrong = wrong.format(tmp_path)
    with pytest.raises(ConfigError, match=f"prefix_cache_file is .*{words.format(tmp_path)}"):
        serve(MODEL_CONFIG, port=0, prefix_cache_file=wrong)
