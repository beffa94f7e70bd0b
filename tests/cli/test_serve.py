"""``asyncengine serve`` as a process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from asyncengine.reranking import QWEN3_RERANKER, RerankPrompt
from tests.cli.programs import run, scripted_loader, server


def test_serves_until_a_signal() -> None:
    with server("--served-model-name", "mine", "--max-model-len", "128") as (process, address, log):
        with httpx.Client(base_url=address, trust_env=False) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
            question = {"messages": [{"role": "user", "content": "hello"}]}
            answer = client.post("/v1/chat/completions", json=question).json()
            assert answer["choices"][0]["message"]["content"] == "hello"
            long = {"messages": [{"role": "user", "content": "x" * 128}]}
            assert "1..127" in client.post("/v1/chat/completions", json=long).json()["error"]["message"]
            assert client.get("/admin/trace").status_code == 404
        assert address.startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert not any("Traceback" in line for line in log)


def test_a_key_guards_everything_and_opens_the_admin_routes(guarded: str) -> None:
    with httpx.Client(base_url=guarded, trust_env=False) as client:
        assert client.get("/v1/models").status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert client.get("/admin/trace", headers=headers).json()["traceEvents"]


def test_admin_without_a_key_is_refused() -> None:
    wrong = run("serve", "--admin")
    assert wrong.status == 2 and "--admin needs --api-key" in wrong.err


def test_a_model_that_cannot_be_loaded_is_one_line_and_an_exit_status(caplog: pytest.LogCaptureFixture) -> None:
    loader = scripted_loader()
    loader.load_errors["./nowhere"] = RuntimeError("there is no such directory")
    wrong = run("serve", "./nowhere", "--port", "0", loader=loader)
    assert wrong.status == 1
    assert "./nowhere cannot be loaded" in caplog.text and "there is no such directory" in caplog.text


def test_how_a_model_is_asked_for_ranks_comes_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncengine.server import serve

    asked: list[object] = []
    monkeypatch.setattr(serve, "serve", lambda config, **settings: asked.append(settings["rerank_prompt"]) or 0)
    file = tmp_path / "how.json"
    file.write_text('{"template": "{query}{document}", "yes": "y", "no": "n"}')
    for given in ("qwen3", str(file)):
        assert run("serve", "--rerank-prompt", given).status == 0
    assert asked == [QWEN3_RERANKER, RerankPrompt(template="{query}{document}", yes="y", no="n")]
    for wrong, status, words in (
        ('{"templat": "x"}', 1, "unknown key 'templat' of a rerank prompt; did you mean 'template'?"),
        ("[]", 2, "whose JSON is no object"), ("{", 2, "which is no file of JSON"),
    ):  # fmt: skip
        file.write_text(wrong)
        found = run("serve", "--rerank-prompt", str(file))
        assert found.status == status and words in found.err
    assert len(asked) == 2


def test_a_prefix_cache_is_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncengine.server import serve

    asked: list[object] = []
    serving = serve.serve
    monkeypatch.setattr(serve, "serve", lambda config, **settings: asked.append(settings["prefix_cache_file"]) or 0)
    file = str(tmp_path / "prefixes")
    assert run("serve").status == run("serve", "--prefix-cache-file", file).status == 0
    wrong = run("serve", "--prefix-cache-file", file, "--no-enable-prefix-caching")
    assert wrong.status == 2 and "--no-enable-prefix-caching: there is no prefix cache to be kept" in wrong.err
    assert asked == [None, file]
    monkeypatch.setattr(serve, "serve", serving)
    wrong = run("serve", "--port", "0", "--prefix-cache-file", str(tmp_path), loader=scripted_loader())
    assert wrong.status == 1 and "--prefix-cache-file (prefix_cache_file) is" in wrong.err


def test_hosts_that_may_be_asked_for_images_are_named_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncengine.server import serve

    asked: list[object] = []
    serving = serve.serve
    monkeypatch.setattr(serve, "serve", lambda config, **settings: asked.append(settings["allowed_media_domains"]) or 0)
    assert run("serve").status == 0
    flags = ["--allowed-media-domains", "a.example", "--allowed-media-domains", "b.example:9000"]
    assert run("serve", *flags).status == 0
    assert asked == [(), ["a.example", "b.example:9000"]]
    monkeypatch.setattr(serve, "serve", serving)
    wrong = run("serve", "--port", "0", "--allowed-media-domains", "*", loader=scripted_loader())
    assert wrong.status == 1 and "--allowed-media-domains (allowed_media_domains) has '*'; expected HOST" in wrong.err


def test_without_the_extra_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['uvicorn'] = None; from asyncengine.cli import main; main()"
    wrong = subprocess.run(
        [sys.executable, "-c", program, "serve"], capture_output=True, text=True, timeout=60, check=False
    )
    assert wrong.returncode == 1
    assert wrong.stderr == "asyncengine: uvicorn is not installed: pip install 'asyncengine[server]'\n"
