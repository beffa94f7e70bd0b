"""Requests of mixed length that arrive over time: total time, TTFT and inter-token latency, beside peers.

64 requests (`--requests`) with prompts of 16 to 384 and outputs of 16 to 128 tokens (`--prompt-tokens`,
`--output-tokens`), uniformly drawn, arrive in a Poisson process of `--rate` per second; all of it from one seed for
each round, the same for every side. A rate of a million is all of them at once. Greedy, end-of-sequence ignored, the
same checkpoint and dtype, as many threads. A token's time is that at which the client has it. Given are the seconds
from the first arrival to the last token, and p50 and p99 of TTFT (from the arrival) and of the inter-token latency;
tokens that come together share what they took. Each side is loaded, warmed up with two requests and measured alone;
of several rounds, in which the sides alternate, the one with the median total time is given. With ``--keep`` all
sides are loaded once and stay, idle while another one is measured, so that rounds follow each other closely.

* asyncengine: ``engine.stream`` in this process;
* transformers: its continuous batching (``init_continuous_batching``), also in this process;
* ``--server NAME URL COMMAND``, any number of times: a server with OpenAI's completions, started by that command for
  every round, or once, and asked by token ids over HTTP, as its users would. In the command ``{model}`` is the
  checkpoint's directory and ``{gguf}`` the same as a file for llama.cpp (needs the package ``gguf``). A chunk without
  a count of its own counts as one token.

The last line is one JSON object.

    python -m benchmarks.arrivals [--shape S] [--dtype bfloat16] [--requests 64] [--rate 4] [--rounds 1]
        [--prompt-tokens 16 384] [--output-tokens 16 128] [--sides asyncengine transformers]
        [--server NAME URL COMMAND] [--keep] [--tiny]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import math
import os
import random
import shlex
import signal
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
from benchmarks import shapes
from benchmarks.llama_cpp import write_gguf

Ask = Callable[[list[int], int], AsyncIterator[int]]
"""Prompt and number of tokens; yields how many came, whenever some did."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, and when it is due in seconds after the beginning."""

    at: float
    prompt: list[int]
    tokens: int


def arrivals(
    requests: int, rate: float, vocabulary: int, prompts: Sequence[int], outputs: Sequence[int], seed: int = 0
) -> list[Arrival]:
    """A Poisson process; `prompts` and `outputs` are the fewest and the most tokens of a request's."""
    draw, at, found = random.Random(seed), 0.0, []
    for _ in range(requests):
        at += draw.expovariate(rate)
        prompt = draw.choices(range(1, vocabulary), k=draw.randint(*prompts))
        found.append(Arrival(at, prompt, draw.randint(*outputs)))
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


def _length(arguments: argparse.Namespace) -> int:
    """Tokens to have room for in each sequence."""
    longest: int = arguments.prompt_tokens[1] + arguments.output_tokens[1]
    return max(1024, longest)


@contextlib.asynccontextmanager
async def asyncengine(path: Path, arguments: argparse.Namespace) -> AsyncIterator[Ask]:
    length = _length(arguments)
    config = EngineConfig(
        str(path), device="cpu", dtype=arguments.dtype, max_num_sequence=arguments.requests,
        max_total_sequence_length=arguments.requests * length, max_single_sequence_length=length,
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
    length = _length(arguments)
    config = HFGenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Left to itself it takes most of the memory; this is room for all requests at once.
    blocks = ContinuousBatchingConfig(num_blocks=arguments.requests * length // 256, max_batch_tokens=512)
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


@contextlib.asynccontextmanager
async def server(url: str, command: str, path: Path, arguments: argparse.Namespace) -> AsyncIterator[Ask]:
    import httpx

    process = await asyncio.create_subprocess_exec(
        *(part.format(model=path, gguf=path / "model.gguf") for part in shlex.split(command)),
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
            models: list[Any] = []
            while not models:  # it does not serve yet
                if process.returncode is not None:
                    raise RuntimeError(f"{command!r} ended with {process.returncode}")
                await asyncio.sleep(0.5)
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/health")).status_code == 200:
                        models = (await client.get("/v1/models")).json()["data"]
            model = models[0]["id"]
            yield functools.partial(_completions, client, model)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            await process.wait()


async def _completions(client: Any, model: str, prompt: list[int], tokens: int) -> AsyncIterator[int]:
    body = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    had = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if usage := chunk.get("usage"):
                now = usage["completion_tokens"]
            else:
                now = had + bool(chunk.get("choices"))
            if now > had:
                yield now - had
                had = now


async def measure(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """All sides, alternating."""
    vocabulary = shapes.SHAPES[arguments.shape]["vocab_size"]
    known = {"asyncengine": asyncengine, "transformers": transformers}
    sides: dict[str, Any] = {name: known[name] for name in arguments.sides}
    for name, url, command in arguments.server:
        sides[name] = functools.partial(server, url, command)
    rounds: dict[str, list[Figures]] = {}
    async with contextlib.AsyncExitStack() as kept:
        asks: dict[str, Ask] = {}
        for side in sides if arguments.keep else ():
            asks[side] = await kept.enter_async_context(sides[side](path, arguments))
        for number in range(arguments.rounds):
            work = arrivals(
                arguments.requests, arguments.rate, vocabulary, arguments.prompt_tokens, arguments.output_tokens, number
            )
            for side in sides if number % 2 == 0 else reversed(sides):
                async with contextlib.AsyncExitStack() as once:
                    ask = asks[side] if asks else await once.enter_async_context(sides[side](path, arguments))
                    figures = await run(ask, work)
                print(f"round {number + 1}, {side}: {figures.seconds:.2f} s", flush=True)
                rounds.setdefault(side, []).append(figures)
    results: dict[str, Any] = {}
    for side, found in rounds.items():
        results[side] = sorted(found, key=lambda figures: figures.seconds)[len(found) // 2].json()
    return results


def line_of(side: str, found: dict[str, Any]) -> str:
    """A line of the table. Where each answer came at once, there are no times between tokens."""
    times = [found.get(of, {}).get(p, math.nan) for of in ("ttft_ms", "inter_token_ms") for p in ("p50", "p99")]
    columns = "".join(f"{value:>{width}.1f}" for value, width in zip(times, (10, 9, 9, 9), strict=True))
    return f"{side:>14}{found['seconds']:>9.2f}{found['tokens_per_second']:>10.1f}{columns}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="S")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, default=4.0, help="arrivals per second")
    for name, default in (("prompt", [16, 384]), ("output", [16, 128])):
        parser.add_argument(
            f"--{name}-tokens", type=int, nargs=2, default=default, metavar=("MIN", "MAX"), help="of each request"
        )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--sides", nargs="+", choices=["asyncengine", "transformers"], default=["asyncengine", "transformers"]
    )
    parser.add_argument("--server", nargs=3, action="append", default=[], metavar=("NAME", "URL", "COMMAND"))
    parser.add_argument("--keep", action="store_true", help="load all sides once, not for every round")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, for the tests")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shape, arguments.requests, arguments.rate = "tiny", 4, 50.0
        arguments.prompt_tokens, arguments.output_tokens = (12, 12), (4, 4)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        path = shapes.write(Path(directory), arguments.shape, arguments.dtype)
        if arguments.server:  # servers want one even if they are asked by token ids
            shapes.write_tokenizer(path, shapes.SHAPES[arguments.shape]["vocab_size"])
        if any("{gguf}" in command for _, _, command in arguments.server):
            write_gguf(path, path / "model.gguf", arguments.shape, q8_0=False)
        results = uvloop.run(measure(arguments, path))
    print(f"{'':>14}{'total s':>9}{'tokens/s':>10}{'TTFT p50':>10}{'p99':>9}{'ITL p50':>9}{'p99':>9}  ms")
    for side, found in results.items():
        print(line_of(side, found))
    names = {"benchmark": "arrivals", "shape": arguments.shape, "dtype": arguments.dtype, "rate": arguments.rate}
    print(json.dumps({**names, "results": results}))


if __name__ == "__main__":
    main()
