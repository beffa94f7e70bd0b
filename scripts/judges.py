"""Clients and testers that nobody here wrote, against a server with known answers. Prints a table in Markdown."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PORT = int(os.environ.get("PORT", "8765"))
ROOT = f"http://127.0.0.1:{PORT}"
TINY = f"http://127.0.0.1:{PORT + 1}"
NAMED = f"http://127.0.0.1:{PORT + 2}"
CHECKPOINT = Path(__file__).resolve().parent.parent / "asyncengine/tiny/checkpoint"
ANSWER = "The answer is 42."
OPENAI_TESTS = {
    "chat/test_completions.py": ("gpt-6-astra", "create and not all_params"),
    "test_completions.py": ("gpt-3.5-turbo-instruct", "create and not all_params"),
    "test_embeddings.py": ("text-embedding-3-small", "create and (loose or all_params)"),
    "test_models.py": ("gpt-6-astra", "retrieve or list"),
}
"""Of each file: the model that it asks for, and which of its tests are run. Those with all parameters send ``audio`` or
``suffix``, which are refused; the client's own type has no place for the base64 that it asks for by itself."""
CAPITALS = {
    "France": ["Paris", "Rome", "Tokyo"],
    "Italy": ["Rome", "Berlin", "Paris"],
    "Japan": ["Tokyo", "Paris", "Rome"],
    "Germany": ["Berlin", "Tokyo", "Rome"],
}


def served(which: str) -> None:
    """A server, in the environment that has the engine."""
    from asyncengine import EngineConfig
    from asyncengine.server.serve import serve
    from asyncengine.testing import ByteTokenizer, ScriptedLoader

    if which == "tiny":
        sys.exit(serve(EngineConfig("tiny", mode="local"), port=PORT + 1))
    loader = ScriptedLoader(lambda prompt, branch: ANSWER.encode(), tokenizer=ByteTokenizer())
    if which == "named":
        asyncio.run(_served_by_names(loader))
        sys.exit()
    sys.exit(serve(EngineConfig("scripted"), port=PORT, loader=loader))


async def _served_by_names(loader: Any) -> None:
    """One engine below ``/NAME`` for every name that OpenAI's own tests ask for."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from asyncengine import AsyncEngine, EngineConfig
    from asyncengine.server import create_app

    async with AsyncEngine(EngineConfig("scripted"), loader=loader) as engine:
        names = sorted({name for name, _ in OPENAI_TESTS.values()})
        mounts = [Mount(f"/{name}", create_app(engine, served_model_name=name)) for name in names]
        config = uvicorn.Config(Starlette(routes=mounts), port=PORT + 2, log_level="error", lifespan="off")
        await uvicorn.Server(config).serve()


def litellm() -> str:
    """One client library over many servers."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network for prices
    import litellm

    options = {"model": "openai/scripted", "api_base": f"{ROOT}/v1", "api_key": "-", "num_retries": 0}
    messages = [{"role": "user", "content": "hi"}]
    whole = litellm.completion(messages=messages, **options)
    assert whole.choices[0].message.content == ANSWER, whole
    chunks = litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **options)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    options["model"], options["api_base"] = "anthropic/scripted", ROOT
    assert litellm.completion(messages=messages, max_tokens=50, **options).choices[0].message.content == ANSWER
    return "completion, streamed and whole, as OpenAI and as Anthropic"


def langchain() -> str:
    """What agents and chains call."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="scripted", base_url=f"{ROOT}/v1", api_key="-", max_retries=0)
    assert chat.invoke("hi").content == ANSWER
    assert "".join(str(chunk.content) for chunk in chat.stream("hi")) == ANSWER
    newer = ChatOpenAI(model="scripted", base_url=f"{ROOT}/v1", api_key="-", max_retries=0, use_responses_api=True)
    assert newer.invoke("hi").content[0]["text"] == ANSWER
    return "invoke and stream, chat completions and responses"


def pydantic_ai() -> str:
    """Another library of agents."""
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    agent = Agent(OpenAIChatModel("scripted", provider=OpenAIProvider(base_url=f"{ROOT}/v1", api_key="-")))
    assert agent.run_sync("hi").output == ANSWER
    return "an agent without tools"


def lm_eval() -> str:
    """The evaluation harness, on tasks made here: one of generation, one of log-likelihood."""
    questions = [{"question": "What is the answer?", "answer": "42"}, {"question": "And again?", "answer": "42"}]
    generated = _evaluated(
        "answer",
        questions,
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: 'The answer is {{answer}}.'\n"
        "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 32\nmetric_list:\n  - metric: exact_match\n",
        f"model=scripted,base_url={ROOT}/v1/completions,num_concurrent=2,tokenized_requests=False,tokenizer_backend=None",
    )["exact_match,none"]
    assert generated == 1.0, generated
    countries = [{"country": country, "cities": cities} for country, cities in CAPITALS.items()]
    chosen = _evaluated(
        "capitals",
        countries,
        "output_type: multiple_choice\ndoc_to_choice: '{{cities}}'\ndoc_to_target: 0\n"
        "doc_to_text: 'What is the capital of {{country}}? The capital of {{country}} is'\n"
        "metric_list:\n  - metric: acc\n",
        f"model=tiny,base_url={TINY}/v1/completions,num_concurrent=2,tokenizer={CHECKPOINT},"
        "tokenizer_backend=huggingface",
    )["acc,none"]
    assert chosen == 1.0, chosen
    return "local tasks: generation, exact match 1.0; multiple choice by log-likelihood (embedded model), accuracy 1.0"


def _evaluated(task: str, documents: list[dict[str, object]], rest: str, arguments: str) -> dict[str, float]:
    """What the harness makes of a task."""
    folder = Path(sys.argv[0]).resolve().parent.parent / ".judges" / task
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "documents.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    (folder / f"{task}.yaml").write_text(
        f"task: {task}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/documents.jsonl\n"
        f"test_split: test\n{rest}"
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", task, "--include_path", str(folder), "--output_path", str(folder / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert run.returncode == 0, (run.stdout + run.stderr)[-1500:]
    results = json.loads(sorted((folder / "out").rglob("results*.json"))[-1].read_text())
    found: dict[str, float] = results["results"][task]
    return found


def schemathesis() -> str:
    """Property-based requests from the OpenAPI document."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    program = str(Path(sys.executable).parent / "schemathesis")
    command = [program, "run", f"{ROOT}/openapi.json", "--max-examples", "40", "--checks", checks]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    return "no server error, and every answer as the document says"


def openai_sdist() -> str:
    """The API tests in the source distribution of OpenAI's client, strictly and not, by each of its HTTP clients."""
    [root] = [path for path in SDIST.iterdir() if path.is_dir()]
    passed = []
    for file, (name, chosen) in OPENAI_TESTS.items():
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-k", chosen]
        environment = os.environ | {"TEST_API_BASE_URL": f"{NAMED}/{name}/v1"}
        run = subprocess.run(
            [*command, f"tests/api_resources/{file}"],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            cwd=root,
            env=environment,
        )
        assert run.returncode == 0, run.stdout[-3000:]
        passed.append(f"{file} {run.stdout.strip().splitlines()[-1].split(' in ')[0].split(',')[0]}")
    return "its own API tests that create, retrieve and list: " + ", ".join(passed)


def openai_in_javascript() -> str:
    """OpenAI's client for Node, which `scripts/judges` has put beside the other judges."""
    program = Path(__file__).resolve().with_suffix(".mjs")
    command = ["node", str(program), str(NODE), f"{ROOT}/v1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    return run.stdout.strip().splitlines()[-1]


def version_of(judge: str) -> str:
    """Which version of it was asked."""
    if judge == "openai (sdist)":
        return importlib.metadata.version("openai")
    if judge != "openai (JavaScript)":
        return importlib.metadata.version(judge)
    package = json.loads((NODE / "node_modules/openai/package.json").read_text())
    return f"{package['version']}, Node {subprocess.check_output(['node', '--version'], text=True).strip()[1:]}"


JUDGES: dict[str, Callable[[], str]] = {
    "litellm": litellm,
    "langchain-openai": langchain,
    "pydantic-ai-slim": pydantic_ai,
    "lm-eval": lm_eval,
    "schemathesis": schemathesis,
}
SDIST = Path(sys.prefix) / "openai-sdist"
if SDIST.exists():
    JUDGES["openai (sdist)"] = openai_sdist
NODE = Path(sys.prefix) / "node"
if (NODE / "node_modules/openai").exists():
    JUDGES["openai (JavaScript)"] = openai_in_javascript


def main() -> int:
    """Runs the judges that are named, or all; returns how many were not content."""
    names = sys.argv[1:] or list(JUDGES)
    failed = 0
    print("| judge | version | result | what |\n|---|---|---|---|")
    for name in names:
        try:
            what, result = JUDGES[name](), "passed"
        except Exception as error:
            failed += 1
            result, what = "**failed**", f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
            traceback.print_exc()
        print(f"| {name} | {version_of(name)} | {result} | {what} |", flush=True)
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        threading.current_thread().name = "server"
        served(*sys.argv[2:])
    sys.exit(main())
