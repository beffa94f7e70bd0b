"""``--lora-modules`` and ``--adapter``: adapters beside a model, and which of them answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from asyncengine.cli.flags import AnsweringFlags
from asyncengine.testing import echo
from tests.cli.programs import APP, run, run_in_turn, scripted_loader, server
from tests.model import tiny_adapters

QUESTION = "What is 7 + 8?"
SUM = "7 + 8 = 15.\n"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("adapters")
    return {name: str(tiny_adapters.write(path / name, seed)) for seed, name in enumerate(("sea", "land"), 1)}


@pytest.fixture
def modules(adapters: dict[str, str]) -> list[str]:
    """The flags that load them."""
    return [word for name, path in adapters.items() for word in ("--lora-modules", f"{name}={path}")]


@pytest.fixture
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ask(*arguments: str, stdin: str = "") -> str:
    """What a command prints, with the embedded model in this process."""
    done = CliRunner().invoke(APP, arguments, input=stdin, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("_one_thread")
def test_an_adapter_answers_where_it_is_asked_for(modules: list[str]) -> None:
    chat = ["chat", "--temperature", "0", "--max-tokens", "12", *modules]
    alone, sea, land = (ask(*chat, *more, stdin=QUESTION) for more in ([], ["--adapter", "sea"], ["--adapter", "land"]))
    assert alone == SUM and len({alone, sea, land}) == 3
    lines = [{"messages": [{"role": "user", "content": QUESTION}]}, {"prompt": "Once upon a time"}]
    complete = ["complete", "--jsonl", "--temperature", "0", "--max-tokens", "12", *modules]
    stdin = "\n".join(map(json.dumps, lines))
    texts = {
        name: [json.loads(line)["text"] for line in ask(*complete, *more, stdin=stdin).splitlines()]
        for name, more in (("alone", []), ("sea", ["--adapter", "sea"]))
    }
    assert texts["alone"][0] == SUM.strip() and sea.startswith(texts["sea"][0])
    assert texts["alone"][1] != texts["sea"][1]


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_an_adapter_is_measured_and_named(endpoint: str, modules: list[str]) -> None:
    bench = ["bench", "--num-prompts", "2", "--concurrency", "2", "--max-tokens", "4", "--endpoint", endpoint, *modules]
    out = ask(*bench, "--adapter", "land")
    found = json.loads(out.splitlines()[-1])
    assert (found["model"], found["adapter"], found["failed"]) == ("tiny", "land", 0)
    assert out.startswith("tiny with land, in process, 2 at a time")
    out = ask(*bench)
    assert "adapter" not in json.loads(out.splitlines()[-1]) and out.startswith("tiny, in process")


def test_every_request_of_a_measurement_has_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncengine import AsyncEngine

    asked: list[str | None] = []
    for name in ("chat", "stream"):
        method = getattr(AsyncEngine, name)

        def noted(engine: Any, what: Any, config: Any, options: Any, method: Any = method) -> Any:
            asked.append(options.adapter)
            return method(engine, what, config, options)

        monkeypatch.setattr(AsyncEngine, name, noted)
    loader = scripted_loader()
    loader.adapters = {"x": echo}
    for endpoint in ("chat", "completions"):
        flags = ["--num-prompts", "3", "--max-tokens", "2", "--endpoint", endpoint]
        assert run("bench", *flags, "--lora-modules", "sea=x", "--adapter", "sea", loader=loader).status == 0
        assert asked == ["sea"] * 4  # one is not counted
        asked.clear()


@pytest.mark.parametrize("name", ["chat", "complete", "serve", "bench", "trace"])
def test_what_is_given_is_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncengine.server import serve

    monkeypatch.chdir(tmp_path)  # where the trace is written
    configs: list[Any] = []
    monkeypatch.setattr(serve, "serve", lambda config, **settings: configs.append(config))
    loader = scripted_loader()
    loader.adapters = {"x=y": echo, "z": echo}
    check = loader.check
    monkeypatch.setattr(loader, "check", lambda config, current: configs.append(config) or check(config, current))
    done = run(name, "--lora-modules", "a=x=y", "--lora-modules", "b=z", stdin="hello\n", loader=loader)
    assert done.status == 0, done.err
    assert [config.adapters for config in configs] == [{"a": "x=y", "b": "z"}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sea"], "--lora-modules is 'sea'; expected NAME=DIR"),
        (["=x"], "--lora-modules is '=x'; expected NAME=DIR"),
        (["sea="], "--lora-modules is 'sea='; expected NAME=DIR"),
        ([""], "--lora-modules is ''; expected NAME=DIR"),
        (["a=x", "b=x", "a=y"], "--lora-modules is 'a=y'; 'a' is 'x' already"),
    ],
)
@pytest.mark.parametrize("name", ["chat", "complete", "serve", "bench", "trace", "estimate"])
def test_what_names_no_adapter_is_refused_before_anything_is_loaded(name: str, given: list[str], said: str) -> None:
    loader = scripted_loader()
    wrong = run(
        name, *(["tiny"] if name == "estimate" else []), *(f"--lora-modules={each}" for each in given), loader=loader
    )
    assert wrong.status == 2 and wrong.err == f"asyncengine: {said}\n"
    assert not loader.models


def test_a_directory_that_is_not_there_is_refused_before_anything_is_imported() -> None:
    names = ["chat", "complete", "serve", "bench", "trace", "estimate"]
    wanted = [*((name, "./nowhere") for name in names), ("chat", "~nobody-at-all/x"), ("serve", __file__)]
    commands = [[name, "tiny", "--lora-modules", f"sea={path}"] for name, path in wanted]
    for (_, path), (wrong, modules) in zip(wanted, run_in_turn(*commands), strict=True):
        assert wrong.status == 1 and wrong.out == ""
        assert wrong.err.startswith(f"asyncengine: adapter {path!r}") and len(wrong.err.splitlines()) == 1
        assert not {"torch", "transformers", "uvicorn"} & modules


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sea").mkdir()
    (tmp_path / "sea" / "adapter_config.json").write_text("{}")
    assert AnsweringFlags(lora_modules=["sea=~/sea"]).config("tiny").adapters == {"sea": "~/sea"}


@pytest.mark.parametrize("name", ["chat", "complete", "bench"])
@pytest.mark.parametrize(("given", "known"), [(["sea=x", "land=y"], "'sea', 'land'"), ([], "none")])
def test_an_adapter_that_is_not_loaded_is_refused(name: str, given: list[str], known: str) -> None:
    loader = scripted_loader()
    modules = [f"--lora-modules={each}" for each in given]
    wrong = run(name, *modules, "--adapter", "lake", stdin="hello\n", loader=loader)
    assert wrong.status == 2 and not loader.models
    assert wrong.err == f"asyncengine: --adapter is 'lake'; named by --lora-modules: {known}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--url", "http://127.0.0.1:1", "--adapter", "a"], "--adapter is given, and --url"),
        (["bench", "--url", "http://127.0.0.1:1", "--lora-modules", "a=x"], "--lora-modules is given, and --url"),
        (["trace", "--url", "http://127.0.0.1:1", "--lora-modules", "a=x"], "--lora-modules is given, and --url"),
        (["trace", "--adapter", "a"], "No such option: --adapter"),
        (["serve", "--adapter", "a"], "No such option: --adapter"),
    ],
)
def test_a_flag_that_would_be_passed_over_is_refused(arguments: list[str], said: str) -> None:
    wrong = run(*arguments)
    assert wrong.status == 2 and said in wrong.err


def test_the_estimate_says_that_it_knows_none(adapters: dict[str, str]) -> None:
    wrong = CliRunner().invoke(APP, ["estimate", "tiny", "--lora-modules", f"sea={adapters['sea']}"])
    assert wrong.exit_code == 2 and "the estimate knows no adapters" in wrong.stderr


def test_an_adapter_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    wrong = CliRunner().invoke(APP, ["chat", "--lora-modules", f"sea={tmp_path}"], input="hello\n")
    assert wrong.exit_code == 1 and wrong.stderr.count("\n") == 1
    assert "has no adapter_config.json" in wrong.stderr


def test_an_adapter_of_the_model_s_own_name_is_not_served() -> None:
    wrong = run("serve", "--served-model-name", "mine", "--lora-modules", "mine=x")
    assert wrong.status == 1 and "'mine', which is what the model itself is called" in wrong.err


def test_a_server_has_them_and_a_measurement_asks_for_one() -> None:
    with server("--lora-modules", "sea=x") as (_, address, _):
        with httpx.Client(base_url=address, trust_env=False) as client:
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "sea"]
        done = run("bench", "sea", "--url", address, "--num-prompts", "2", "--max-tokens", "4")
        assert done.status == 0, done.err
        assert json.loads(done.out.splitlines()[-1])["model"] == "sea"
