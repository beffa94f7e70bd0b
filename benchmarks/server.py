"""What HTTP costs: the same requests straight to the engine, through the application, and over a socket.

256 chat requests stream at a time from a model whose step takes a given time without the GIL and draws one token for
each. "engine" reads ``engine.chat`` with ``async for``, text included. "app" calls the ASGI application in the same
loop and drops what it sends: the layer alone. "http" is uvicorn on a socket in the same loop, read by another process
that only counts. All three alternate within a round; the server process's CPU time is taken over the requests' time.

* tokens/s: tokens in all answers over the time from the first request to the last end. "kept" is the ratio to "engine".
* CPU per token: of the server process, step thread included. A token costs less where deltas are merged: "chunks" says
  how many events there were per token.
* requests/s: the same with answers of one token, not streamed, 256 at a time.
* first token: the median over the requests, all of which begin at once, from the call, or from sending, to the first
  content; "added" is the difference to "engine". And of one request at a time, on an engine that does nothing else.

Tokens are delivered by the compiled code, as with any real model. The last line is one JSON object. It takes some two
minutes.

    python -m benchmarks.server [--streams 256] [--tokens 200] [--step-ms 8 25] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import uvicorn
import uvloop

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.loop import delivery
from asyncengine.server import create_app
from asyncengine.step.batch import StepBatch, StepTokens
from asyncengine.testing import ByteTokenizer
from benchmarks.zero_cost import ZeroCostLoader, ZeroCostModel

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
LETTER = 97


class TextModel(ZeroCostModel):
    """Draws a letter for everyone."""

    def execute(self, batch: StepBatch) -> StepTokens:
        if self.step_seconds:
            time.sleep(self.step_seconds)
        return StepTokens(np.full(len(batch.sample_index), LETTER, dtype=np.int32))


class TextLoader(ZeroCostLoader):
    """A zero-cost model with text."""

    def __init__(self, step_seconds: float) -> None:
        super().__init__(step_seconds)
        self.model = TextModel(step_seconds)

    def load(self, plan: Any) -> Any:
        loaded = super().load(plan)
        return dataclasses.replace(loaded, tokenizer=ByteTokenizer(), vocab_size=257)


def body(tokens: int, stream: bool) -> bytes:
    return json.dumps({"messages": MESSAGES, "max_tokens": tokens, "stream": stream}).encode()


def request_head(length: int) -> str:
    return f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"


@dataclasses.dataclass(slots=True)
class Seen:
    """What readers saw.

    Attributes:
        chunks: Events with content.
        firsts: Seconds to the first of them, one per request that streams.
    """

    chunks: int = 0
    firsts: list[float] = dataclasses.field(default_factory=list)

    def add(self, begun: float, chunks: int = 1) -> None:
        """Notes events of a request; the first ones say when."""
        if not self.chunks and chunks:
            self.firsts.append(time.perf_counter() - begun)
        self.chunks += chunks


def together(seen: Iterable[Seen]) -> Seen:
    """Of all."""
    every = list(seen)
    return Seen(sum(one.chunks for one in every), [first for one in every for first in one.firsts])


async def through_engine(engine: AsyncEngine, tokens: int, stream: bool) -> Seen:
    config, seen, begun = GenerationConfig(max_tokens=tokens), Seen(), time.perf_counter()
    if not stream:
        return Seen(len((await engine.chat(MESSAGES, config)).text))
    async for output in engine.chat(MESSAGES, config):
        if output.text:
            seen.add(begun)
    return seen


async def through_app(app: Any, tokens: int, stream: bool) -> Seen:
    seen, asked, begun = Seen(), False, time.perf_counter()
    content = body(tokens, stream)
    never = asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await never.wait()
        asked = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200
        if stream:
            seen.add(begun, message.get("body", b"").count(b'"content":"a'))
        else:
            seen.chunks += message["type"] == "http.response.body"

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "method": "POST",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())],
    }
    await app(scope, receive, send)
    return seen


async def over_socket(port: int, requests: int, tokens: int, stream: bool) -> Seen:
    """Sends requests one after the other on one connection; counts events, and checks that each ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content, every = body(tokens, stream), []
    head = request_head(len(content)).encode()
    for _ in range(requests):
        seen, begun = Seen(), time.perf_counter()
        every.append(seen)
        writer.write(head + content)
        if stream:
            tail = b""
            while not tail.endswith(b"0\r\n\r\n"):
                data = await reader.read(1 << 16)
                assert data, "the server closed the connection"
                seen.add(begun, data.count(b'"content":"a'))
                tail = (tail + data)[-5:]
        else:
            headers = await reader.readuntil(b"\r\n\r\n")
            assert headers.startswith(b"HTTP/1.1 200"), headers
            length = int(headers.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            seen.chunks += 1
    writer.close()
    return together(every)


def client(port: int, streams: int, requests: int, tokens: int, stream: bool) -> None:
    """The other process: begins when it is told to, and says what it saw."""

    async def run() -> Seen:
        return together(await asyncio.gather(*[over_socket(port, requests, tokens, stream) for _ in range(streams)]))

    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(dataclasses.asdict(uvloop.run(run()))), flush=True)


@asynccontextmanager
async def served(app: Any) -> Any:
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, ws="none")
        server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        await serving


async def timed(work: Callable[[], Awaitable[Seen]], tokens: int) -> dict[str, float]:
    cpu, begun = time.process_time(), time.perf_counter()
    seen = await work()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    first = {"first_ms": statistics.median(seen.firsts) * 1e3} if seen.firsts else {}
    return {"per_second": tokens / seconds, "cpu_us": cpu / tokens * 1e6, "chunks": seen.chunks / tokens, **first}


async def measured(step: float, streams: int, requests: int, tokens: int, stream: bool) -> dict[str, dict[str, float]]:
    """One round of all three."""
    async with AsyncEngine(EngineConfig("zero-cost"), loader=TextLoader(step)) as engine:
        app = create_app(engine)
        total = streams * requests * (tokens if stream else 1)

        async def repeat(one: Callable[[], Awaitable[Seen]]) -> Seen:
            return together([await one() for _ in range(requests)])

        async def all_of(one: Callable[[], Awaitable[Seen]]) -> Seen:
            return together(await asyncio.gather(*[repeat(one) for _ in range(streams)]))

        await through_engine(engine, 1, stream)  # what the first one alone costs
        await through_app(app, 1, stream)
        found = {
            "engine": await timed(lambda: all_of(lambda: through_engine(engine, tokens, stream)), total),
            "app": await timed(lambda: all_of(lambda: through_app(app, tokens, stream)), total),
        }
        async with served(app) as port:
            arguments = [str(value) for value in (port, streams, requests, tokens, int(stream))]
            command = [sys.executable, "-m", "benchmarks.server", "--client", *arguments]
            pipe = subprocess.PIPE
            with await asyncio.to_thread(subprocess.Popen, command, stdin=pipe, stdout=pipe, text=True) as other:
                assert other.stdout is not None
                assert await asyncio.to_thread(other.stdout.readline) == "ready\n"

                async def ask() -> Seen:
                    return Seen(**json.loads((await asyncio.to_thread(other.communicate, "go\n"))[0]))

                found["http"] = await timed(ask, total)
        return found


async def first_token(count: int) -> dict[str, float]:
    """Median milliseconds to the first token, with and without HTTP, one request at a time."""
    async with AsyncEngine(EngineConfig("zero-cost"), loader=TextLoader(0.0)) as engine:
        bare, http = [], []
        async with served(create_app(engine)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            content = body(1, True)
            head = request_head(len(content))
            for _ in range(count):
                begun = time.perf_counter()
                async for _ in engine.chat(MESSAGES, GenerationConfig(max_tokens=1)):
                    bare.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                writer.write(head.encode() + content)
                await reader.readuntil(b'"content":"a"')
                http.append(time.perf_counter() - begun)
                await reader.readuntil(b"0\r\n\r\n")
            writer.close()
    return {"engine_ms": statistics.median(bare) * 1e3, "http_ms": statistics.median(http) * 1e3}


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for way in ("engine", "app", "http"):
        found[way] = {key: statistics.median(r[way][key] for r in rounds) for key in rounds[0][way]}
        found[way]["kept"] = statistics.median(r[way]["per_second"] / r["engine"]["per_second"] for r in rounds)
        if "first_ms" in found[way]:
            found[way]["added_ms"] = statistics.median(r[way]["first_ms"] - r["engine"]["first_ms"] for r in rounds)
    return {way: {key: round(value, 3) for key, value in row.items()} for way, row in found.items()}


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"{title:>24} {'per second':>12} {'kept':>7} {'CPU us':>9} {'chunks':>8} {'first ms':>9} {'added ms':>9}")
    for way, row in rows.items():
        first = f"{row['first_ms']:>9.1f} {row['added_ms']:>9.1f}" if "first_ms" in row else ""
        told = f"{row['per_second']:>12,.0f} {row['kept']:>7.3f} {row['cpu_us']:>9.1f} {row['chunks']:>8.2f}"
        print(f"{way:>24} {told} {first}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        port, streams, requests, tokens, stream = (int(value) for value in sys.argv[2:])
        client(port, streams, requests, tokens, bool(stream))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[8.0, 25.0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    delivery.use_compiled()
    results: dict[str, Any] = {}
    for step in arguments.step_ms:
        rounds = [
            uvloop.run(measured(step / 1e3, arguments.streams, 1, arguments.tokens, True))
            for _ in range(arguments.rounds)
        ]
        results[f"tokens, step {step:g} ms"] = medians(rounds)
        show(f"tokens, step {step:g} ms", results[f"tokens, step {step:g} ms"])
    rounds = [uvloop.run(measured(0.0, arguments.streams, 8, 1, False)) for _ in range(arguments.rounds)]
    results["requests"] = medians(rounds)
    show("requests", results["requests"])
    results["first_token"] = {k: round(v, 3) for k, v in uvloop.run(first_token(200)).items()}
    print(f"first token: {results['first_token']}")
    print(json.dumps({"benchmark": "server", "streams": arguments.streams, "results": results}))


if __name__ == "__main__":
    main()
