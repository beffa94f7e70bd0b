"""Fan-out: tokens per second delivered from the step thread to N concurrent readers.

The engine runs a model that costs nothing; N tasks read one stream each with ``async for``. A token counts when its
reader has it. Beside it, in the same run and alternating with it, a bare reference with nothing but what any asyncio
design needs: a producing thread, one wake-up of the loop per step, and per reader one slot, one future and the
smallest class that ``async for`` accepts. It hands out the same `RequestOutput`, and in the column "lists" bare lists
of tokens.

Both are measured in lock-step: a step begins once every reader has had its token of the step before. So every token
is a delta of its own, on both sides; left to itself, either would merge more tokens into a delta the slower its
readers are, and the figures would compare merging. The ratio engine / bare is what the engine keeps of what asyncio
can deliver; everything that the engine does for a step besides is in it, since a step begins after the last has been
read. "free" is the engine without lock-step, where deltas are merged as in production.

The last line is one JSON object.

    python -m benchmarks.fanout [--readers 1 16 128 1024] [--tokens 300000] [--rounds 5] [--python] [--ahead]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import threading
import time

import uvloop

from asyncengine import GenerationConfig, RequestOutput
from asyncengine.loop import delivery
from benchmarks.zero_cost import zero_cost_engine

PROMPT = [1, 2, 3]


class Pace:
    """Lets a step begin once all readers have had their token of the step before."""

    def __init__(self, readers: int) -> None:
        self._readers = self._left = readers
        self._semaphore = threading.Semaphore(1)
        self.wait = self._semaphore.acquire
        self.all_had_one: float | None = None

    def had_one(self) -> None:
        self._left -= 1
        if not self._left:
            self._left = self._readers
            if self.all_had_one is None:
                self.all_had_one = time.perf_counter()
            self._semaphore.release()


async def engine_rate(readers: int, tokens: int, lock_step: bool, run_ahead: bool = False) -> tuple[float, float]:
    """Tokens per second after the first of each reader, and how many seconds it takes until all have that."""
    engine, model = zero_cost_engine(run_ahead=run_ahead)
    pace = Pace(readers)
    async with engine:
        config = GenerationConfig(max_tokens=tokens, detokenize=False, ignore_eos=True)
        await engine.pause()
        streams = [await engine.add_request(PROMPT, config) for _ in range(readers)]
        if lock_step:
            model.wait = pace.wait

        async def read(stream) -> int:  # type: ignore[no-untyped-def]
            count = 0
            async for output in stream:
                count += len(output.token_ids)
                pace.had_one()
            return count

        tasks = [asyncio.create_task(read(stream)) for stream in streams]
        await asyncio.sleep(0)
        begun = time.perf_counter()
        await engine.resume()
        total = sum(await asyncio.gather(*tasks))
        ended = time.perf_counter()
    assert total == readers * tokens, (total, readers * tokens)
    if not lock_step:
        return total / (ended - begun), 0.0
    assert pace.all_had_one is not None
    return (total - readers) / (ended - pace.all_had_one), pace.all_had_one - begun


class Slot:
    """The least that an asynchronous iterator of deltas can be."""

    __slots__ = ("create_future", "ended", "ids", "waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.create_future = loop.create_future
        self.ids: list[int] = []
        self.waiter: asyncio.Future[None] | None = None
        self.ended = False

    def __aiter__(self) -> Slot:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self.ids:
            if self.ended:
                raise StopAsyncIteration
            self.waiter = self.create_future()
            await self.waiter
        ids, self.ids = self.ids, []
        return tuple.__new__(RequestOutput, ("", ids, None, 0, None, None))


class ListSlot(Slot):
    """The same without an output around the list."""

    __slots__ = ()

    async def __anext__(self) -> list[int]:  # type: ignore[override]
        while not self.ids:
            if self.ended:
                raise StopAsyncIteration
            self.waiter = self.create_future()
            await self.waiter
        ids, self.ids = self.ids, []
        return ids


async def bare_rate(readers: int, tokens: int, slot_type: type[Slot]) -> float:
    """Tokens per second of the bare reference."""
    loop = asyncio.get_running_loop()
    slots = [slot_type(loop) for _ in range(readers)]
    pace = Pace(readers)

    def deliver(step: list[int], last: bool) -> None:
        for slot, token in zip(slots, step, strict=True):
            slot.ids.append(token)
            slot.ended = last
            waiter = slot.waiter
            if waiter is not None:
                slot.waiter = None
                if not waiter.done():
                    waiter.set_result(None)

    def produce() -> None:
        for index in range(tokens):
            pace.wait()
            loop.call_soon_threadsafe(deliver, [7] * readers, index == tokens - 1)

    async def read(slot: Slot) -> int:
        count = 0
        async for output in slot:
            count += len(output) if type(output) is list else len(output.token_ids)
            pace.had_one()
        return count

    tasks = [asyncio.create_task(read(slot)) for slot in slots]
    await asyncio.sleep(0)
    thread = threading.Thread(target=produce)
    thread.start()
    total = sum(await asyncio.gather(*tasks))
    ended = time.perf_counter()
    thread.join()
    assert total == readers * tokens
    assert pace.all_had_one is not None
    return (total - readers) / (ended - pace.all_had_one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 16, 128, 1024])
    parser.add_argument("--tokens", type=int, default=300_000, help="per round, over all readers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ahead", action="store_true", help="launch steps ahead")
    parser.add_argument("--python", action="store_true", help="deliver by Python code alone")
    arguments = parser.parse_args()
    if not arguments.python:
        delivery.use_compiled()
    results = {}
    print("readers    engine       bare      lists  ratio  to lists       free  tokens/s  begin, us")
    for readers in arguments.readers:
        tokens = max(min(arguments.tokens // readers, 8000), 2)
        rounds = []
        for _ in range(arguments.rounds):
            engine, begin = uvloop.run(engine_rate(readers, tokens, lock_step=True, run_ahead=arguments.ahead))
            bare = uvloop.run(bare_rate(readers, tokens, Slot))
            lists = uvloop.run(bare_rate(readers, tokens, ListSlot))
            free, _ = uvloop.run(engine_rate(readers, tokens, lock_step=False, run_ahead=arguments.ahead))
            rounds.append((engine, bare, lists, engine / bare, engine / lists, free, begin / readers * 1e6))
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        engine, bare, lists, ratio, to_lists, free, begin = medians
        results[readers] = {
            "engine": round(engine), "bare": round(bare), "lists": round(lists), "ratio": round(ratio, 3),
            "ratio_to_lists": round(to_lists, 3), "free": round(free), "begin_us": round(begin, 1),
        }  # fmt: skip
        rates = "".join(f"{rate:>11,.0f}" for rate in (engine, bare, lists))
        print(f"{readers:>7}{rates[1:]}{ratio:>7.2f}{to_lists:>10.2f}{free:>11,.0f}{begin:>20.1f}")
    how = "python" if arguments.python else "compiled"
    print(json.dumps({"benchmark": "fanout", "unit": "tokens/s", "delivery": how, "results": results}))


if __name__ == "__main__":
    main()
