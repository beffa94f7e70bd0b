"""Two servers beside each other on the embedded model: ``asyncengine serve`` and ``transformers serve``.

Both are processes of their own, float32 on the CPU, one thread of torch each, greedy. A client in this process streams
the same chat requests from each in turn, `--streams` at a time, and reads the number of tokens from each answer's
usage. "default" of transformers handles requests one by one, "batching" is its ``--continuous-batching``.

* tokens/s: tokens of all answers over the time from the first request to the last end, median over rounds.
* first token: median over requests from sending to the first content, ms.

The model has one million parameters, so this says what the layers around a model cost, not how fast it is computed.
The last line is one JSON object. ``--peer`` is a Python that has ``transformers[serving]``.

    python -m benchmarks.server_peer --peer PYTHON [--streams 1 8] [--requests 24] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from asyncengine import tiny

MESSAGES = [{"role": "user", "content": "Tell me a story."}]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SERVE = "import sys; sys.argv[0] = 'transformers'; from transformers.cli.transformers import main; main()"
BATCHING = ["--continuous-batching", "--cb-num-blocks", "256", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"]
"""As many blocks as the embedded model can make use of; left to itself it takes nearly all of the host's memory."""
Server = tuple[str, int, str]
"""Name, port, what it calls the model."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(name: str, command: list[str], port: int, model: str) -> Iterator[Server]:
    """A server that answers."""
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    asyncio.run(asyncio.wait_for(answer(port, model, 2), 60))
                    break
                except (OSError, AssertionError, TimeoutError):
                    if process.poll() is not None or time.monotonic() > until:
                        raise
                    time.sleep(0.2)
            yield name, port, model
        finally:
            process.kill()


async def answer(port: int, model: str, tokens: int) -> tuple[int, float]:
    """One streamed answer: its tokens, and the seconds to the first of them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = {"model": model, "messages": MESSAGES, "max_tokens": tokens, "temperature": 0, "stream": True}
    if "/" not in model:  # the other one refuses the field, and sends usage anyway
        body["stream_options"] = {"include_usage": True}
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {len(content)}\r\n"
    begun, first, found = time.perf_counter(), 0.0, 0
    writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + content)
    status = await reader.readline()
    assert b" 200 " in status, status + await reader.read()
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        choices = event.get("choices") or [{}]
        if not first and choices[0].get("delta", {}).get("content"):
            first = time.perf_counter() - begun
        found = (event.get("usage") or {}).get("completion_tokens", found)
    writer.close()
    assert found, "no usage came"
    return found, first


async def load(server: Server, streams: int, requests: int, tokens: int) -> dict[str, float]:
    """Requests, so many at a time."""
    _, port, model = server
    left = asyncio.Semaphore(streams)

    async def one() -> tuple[int, float]:
        async with left:
            return await answer(port, model, tokens)

    begun = time.perf_counter()
    answers = await asyncio.gather(*[one() for _ in range(requests)])
    seconds = time.perf_counter() - begun
    return {
        "tokens_per_second": sum(count for count, _ in answers) / seconds,
        "first_token_ms": statistics.median(first for _, first in answers) * 1e3,
        "tokens": answers[0][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    path = str(tiny.PATH)
    peer = [arguments.peer, "-c", SERVE, "serve", path, "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    ports = [free_port() for _ in range(3)]
    ours = [sys.executable, "-m", "asyncengine", "serve", "tiny", "--dtype", "float32", "--port", str(ports[0])]
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(running(*entry))
            for entry in (
                ("asyncengine", ours, ports[0], "tiny"),
                ("transformers, default", [*peer, "--port", str(ports[1])], ports[1], path),
                ("transformers, batching", [*peer, *BATCHING, "--port", str(ports[2])], ports[2], path),
            )
        ]
        for streams in arguments.streams:
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in servers}
            for _ in range(arguments.rounds):
                for server in servers:  # by turns
                    rounds[server[0]].append(asyncio.run(load(server, streams, arguments.requests, arguments.tokens)))
            for name, found in rounds.items():
                row = {key: round(statistics.median(each[key] for each in found), 1) for key in found[0]}
                results[f"{name}, {streams} at a time"] = row
                print(
                    f"{name:>24} {streams:>3} at a time {row['tokens_per_second']:>10,.0f} tokens/s "
                    f"{row['first_token_ms']:>9.1f} ms to the first of {row['tokens']:.0f}",
                    flush=True,
                )
    print(json.dumps({"benchmark": "server_peer", "results": results}))


if __name__ == "__main__":
    main()
