"""Clients and testers that nobody here wrote, against a server with known answers. Prints a table in Markdown."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

PORT = int(os.environ.get("PORT", "8765"))
ROOT = f"http://127.0.0.1:{PORT}"
TINY = f"http://127.0.0.1:{PORT + 1}"
CHECKPOINT = Path(__file__).resolve().parent.parent / "asyncengine/tiny/checkpoint"
ANSWER = "The answer is 42."
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
    sys.exit(serve(EngineConfig("scripted"), port=PORT, loader=loader))


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


def openai_in_javascript() -> str:
    """OpenAI's client for Node, which `scripts/judges` has put beside the other judges."""
    program = Path(__file__).resolve().with_suffix(".mjs")
    command = ["node", str(program), str(NODE), f"{ROOT}/v1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    return run.stdout.strip().splitlines()[-1]


def version_of(judge: str) -> str:
    """Which version of it was asked."""
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
