"""The whole engine under any interleaving: hypothesis chooses what happens between which steps.

Steps are held, so that each operation finds the engine at rest or in the middle of a step. After every operation the
accounts of the KV cache add up; at the end every request has ended exactly once, its deltas are its result, its tokens
are what the script says, and nothing is left.

``pytest --hypothesis-profile long`` tries thousands of them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from harness import Rig, is_whole
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from asyncengine import (
    AsyncEngineError,
    Deadlines,
    EngineState,
    FinishReason,
    GenerationConfig,
    IllegalStateError,
    ReloadError,
    RequestOptions,
    RequestOutput,
    RequestStream,
)
from asyncengine.events import BranchEnded, RequestEnded
from asyncengine.step import thread as step_thread
from asyncengine.testing.scripted import ScriptedModel
from tests.speculation.drafters import Guesser


def script(prompt: Sequence[int], branch: int) -> list[int]:
    """Depends on prompt and branch; ends by itself after a few tokens."""
    start = sum(prompt) % 23 + 7 * branch
    return [97 + (start + i) % 26 for i in range(3 + (len(prompt) + 2 * branch) % 9)]


@dataclass
class Track:
    """One stream, and what was read of it."""

    stream: RequestStream
    prompt: list[int]
    config: GenerationConfig
    outputs: list[RequestOutput] = field(default_factory=list)
    reader: asyncio.Task[None] | None = None
    closed: bool = False
    in_pieces: bool = False

    async def read(self) -> None:
        try:
            async for output in self.stream:
                self.outputs.append(output)
        except AsyncEngineError as error:
            if isinstance(error, IllegalStateError):
                raise

    def take(self, count: int) -> None:
        if self.reader is None and not self.closed:
            for _ in range(count):
                if (output := self.stream.take()) is not None:
                    self.outputs.append(output)

    def check_what_was_read(self) -> None:
        """The deltas so far, put together, are where the script is; nothing is missing, twice, or out of order."""
        for branch in range(self.config.n):
            outputs = [output for output in self.outputs if output.index == branch]
            tokens = [token for output in outputs for token in output.token_ids]
            assert tokens == [*script(self.prompt, branch), 256][: len(tokens)]
            text = "".join(output.text for output in outputs)
            assert text == bytes(token for token in tokens if token < 256).decode()

    def check(self) -> None:
        usage = self.stream.usage
        assert self.stream.ended and usage is not None
        assert usage.prompt_tokens <= len(self.prompt)
        if not self.in_pieces or usage.completion_tokens:  # or else it may have ended before the last piece
            assert usage.prompt_tokens == len(self.prompt)
        if self.closed:
            return
        result = self.stream.result()
        assert is_whole(self.outputs, result), (self.outputs, result)
        assert usage.completion_tokens == sum(len(branch.token_ids) for branch in result.outputs)
        for branch in result.outputs:
            answer = [*script(self.prompt, branch.index), 256]
            limit = self.config.max_tokens if self.config.max_tokens is not None else 10**9
            assert branch.token_ids == answer[: len(branch.token_ids)]
            assert branch.text == bytes(token for token in branch.token_ids if token < 256).decode()
            if branch.logprobs is not None:
                assert [entry.logprob for entry in branch.logprobs] == [-float(i) for i in range(len(branch.token_ids))]
            if branch.finish_reason is FinishReason.STOP:
                assert branch.token_ids == answer
                assert branch.stop_reason == 256
            elif branch.finish_reason is FinishReason.LENGTH:
                assert len(branch.token_ids) == limit < len(answer)
            else:
                assert len(branch.token_ids) < min(limit, len(answer)) or limit == 0


class Machine:
    """An engine whose steps are held, and the operations on it."""

    def __init__(
        self, config: dict[str, Any], fits_beside: bool, run_ahead: bool, kept_states: int | None, guesses: bool
    ) -> None:
        self.rig = Rig(
            script, fits_beside=fits_beside, run_ahead=run_ahead, kept_states=kept_states,
            make_drafter=partial(Guesser, seed=1) if guesses else None, **config,
        )  # fmt: skip
        self.engine = self.rig.engine
        self.holding = True
        self.held: ScriptedModel | None = None
        self.tracks: list[Track] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.ends: Counter[object] = Counter()
        self.names = 0
        self.before = set(threading.enumerate())
        self.speech = asyncio.Event()  # the next pieces of all prompts that come in pieces
        load = self.rig.loader.load

        def load_held(plan: Any) -> Any:
            loaded = load(plan)
            if self.holding:
                self.rig.model.hold()
            return loaded

        self.rig.loader.load = load_held  # type: ignore[method-assign]
        self.rig.loader.check_errors["refused"] = ReloadError("refused")
        self.rig.loader.load_errors["broken"] = OSError("broken")

    @property
    def model(self) -> ScriptedModel | None:
        loaded = self.engine._thread.core.loaded
        return None if loaded is None else loaded.model  # type: ignore[return-value]

    # Operations; each returns at once

    def add(self, draw: dict[str, Any]) -> None:
        prompt, config = draw["prompt"], draw["config"]
        options, size = draw["options"], draw["pieces"]

        async def spoken() -> AsyncIterator[list[int]]:
            for start in range(0, len(prompt), size):
                yield prompt[start : start + size]
                await self.speech.wait()

        async def adding() -> None:
            stream = await self.engine.add_request(spoken() if size else prompt, config, options)
            self.track(Track(stream, prompt, config, in_pieces=size > 0), draw["read"])

        self.call(adding())

    def add_many(self, draw: dict[str, Any]) -> None:
        prompt, config = draw["prompt"], draw["config"]
        prompts = [prompt, [*prompt, 5], prompt]

        async def adding() -> None:
            many = self.engine.generate_many(prompts, config, draw["options"])
            tracks: list[Track] = []
            try:
                async for index, output in many:
                    if not tracks:
                        tracks = [Track(s, p, config) for s, p in zip(many.streams, prompts, strict=True)]
                        self.tracks += tracks
                    tracks[index].outputs.append(output)
            finally:
                if not tracks:
                    self.tracks += [Track(s, p, config) for s, p in zip(many.streams, prompts, strict=False)]

        self.call(adding())

    def track(self, track: Track, read: bool) -> None:
        self.tracks.append(track)
        if read:
            track.reader = asyncio.create_task(track.read())

    def call(self, coroutine: Any) -> None:
        self.tasks.append(asyncio.create_task(coroutine))

    def pick(self, at: int) -> Track | None:
        return self.tracks[at % len(self.tracks)] if self.tracks else None

    def do(self, name: str, value: Any) -> None:
        engine, model = self.engine, self.model
        if name == "add":
            self.add(value)
        elif name == "speak":
            self.speech.set()
            self.speech.clear()
        elif name == "add many":
            self.add_many(value)
        elif name == "abort" and (track := self.pick(value)):
            track.stream.abort()
        elif name == "abort by id" and (track := self.pick(value)):
            self.call(engine.abort_request(track.stream.request_id))
        elif name == "close" and (track := self.pick(value)):
            track.closed = True
            self.call(track.stream.aclose())
        elif name == "cancel the reader" and (track := self.pick(value)):
            if track.reader is not None:
                track.reader.cancel()
        elif name == "cancel a call" and self.tasks:
            self.tasks[value % len(self.tasks)].cancel()
        elif name == "drop" and (track := self.pick(value)):
            if track.reader is None:
                self.tracks.remove(track)
        elif name == "take" and (track := self.pick(value)):
            track.take(1 + value % 4)
        elif name == "reload":
            kind, in_flight, new_requests = value
            self.call(engine.reload(self.rig.config.replace(model=kind), in_flight, new_requests))
        elif name == "update_weights":
            self.call(engine.update_weights({"w": value or None}))
        elif name == "pin":
            self.call(engine.pin_prompt([value % 7] * (value % 40 + 1), f"pin {value % 3}"))
        elif name == "unpin":
            self.call(engine.unpin_prompt(f"pin {value % 3}"))
        elif name == "call":
            self.call(getattr(engine, value)())
        elif name == "fail" and model is not None:
            model.fail_next(ValueError("fail"))
        elif name == "fail a launch" and model is not None:
            model.fail_next_launch(ValueError("fail"))
        elif name == "lose" and model is not None:
            model.lose_device()
        elif name == "refuse" and model is not None:
            model.refuse_next(ValueError("refuse"))

    # Time

    async def settle(self) -> None:
        """Until the step thread sleeps or is held in a step, and the loop has heard of everything."""
        queue, back = self.engine._thread.queue, self.rig.router.stream_back
        until = time.monotonic() + 20.0
        quiet = 0
        while quiet < 3:
            assert time.monotonic() < until, "it does not come to rest"
            await asyncio.sleep(0)
            if self.held is None:
                for model in self.rig.loader.models:
                    if model._entered.acquire(blocking=False):
                        self.held = model
            at_rest = self.held is not None or (queue._sleeping and not len(queue)) or not self.engine._thread.alive
            if at_rest and not back._pending and not step_thread._loads:
                quiet += 1
            else:
                quiet = 0
                time.sleep(0.00005)  # noqa: ASYNC251  # noqa: ASYNC251  (the other thread is to run)

    async def step(self, count: int) -> None:
        for _ in range(count):
            await self.settle()
            if self.held is None:
                return
            held, self.held = self.held, None
            held.let()
        await self.settle()

    # Truths

    def check(self) -> None:
        """At rest, everything that the step thread owns may be looked at."""
        core = self.engine._thread.core
        if core.scheduler is not None:
            core.scheduler.check()
            pool = core.scheduler.blocks.pool
            assert pool.num_free + pool.num_cached + pool.num_used == pool.num_blocks
            assert min(pool.num_free, pool.num_cached, pool.num_used) >= 0
        assert self.engine._thread.died is None
        for key, times in self.ends.items():
            assert times == 1, f"{key} ended {times} times"
        for track in self.tracks:
            track.check_what_was_read()
        self.check_what_is_held()

    def check_what_is_held(self) -> None:
        """Tasks are the caller's own, a stream that has ended is forgotten, and one thread steps."""
        router = self.rig.router
        own = {asyncio.current_task(), *self.tasks, *(track.reader for track in self.tracks)}
        assert not asyncio.all_tasks() - own
        for track in self.tracks:
            assert track.stream.ended == (track.stream._inbox.number not in router._inboxes)
        waiting = [task for task in self.tasks if not task.done() or task.cancelled()]
        assert len([future for future in router._futures.values() if not future.cancelled()]) <= len(waiting)
        threads = [thread for thread in threading.enumerate() if thread not in self.before]
        for thread in threads:
            if thread is not self.engine._thread._thread:  # a load's, which has told of its end
                thread.join(10)
                assert not thread.is_alive(), thread

    def watch(self) -> None:
        back = self.rig.router.stream_back
        deliver = back._deliver

        def counted(event: Any) -> None:
            if isinstance(event, BranchEnded):
                self.ends[event.key] += 1
            elif isinstance(event, RequestEnded):
                self.ends[event.number] += 1
            deliver(event)

        back._deliver = counted

    async def finish(self) -> None:
        """Lets everything go on until nothing is left to do."""
        engine = self.engine
        self.holding = False
        self.speech.set()
        for model in self.rig.loader.models:
            model.release()
            model._faults.clear()
        until = time.monotonic() + 20.0
        while True:
            self.held = None
            for model in self.rig.loader.models:
                model.release()
                model._faults.clear()
                model._launch_faults.clear()
                model._refuse = None
                while model._entered.acquire(blocking=False):
                    pass
            await self.settle()
            if engine.state is EngineState.PAUSED:
                await engine.resume()
            elif engine.state is EngineState.SLEEPING:
                await engine.wake()
            elif engine.state is EngineState.FAILED:
                await engine.restart()
            for track in self.tracks:
                if track.reader is None or track.reader.done():
                    if track.reader is not None and not track.reader.cancelled():
                        track.reader.result()
                    track.reader = None if track.stream.ended and not track.closed else track.reader
                    if track.reader is None and track.stream.ended and not track.closed:
                        await track.read()
            left = [task for task in self.tasks if not task.done()]
            unread = [track for track in self.tracks if not track.stream.ended]
            if not left and not unread and engine.state in (EngineState.READY, EngineState.UNLOADED):
                break
            assert time.monotonic() < until, f"never ends: {engine.state} {left} {unread}"
            await asyncio.sleep(0)
        for task in self.tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                assert isinstance(error, (AsyncEngineError, OSError)), error
        for track in self.tracks:
            if track.reader is not None:
                await asyncio.wait([track.reader])
            track.check()
            assert self.ends[track.stream._inbox.number] == 1
            for branch in range(track.config.n):
                assert self.ends[track.stream._inbox.number, branch] == 1
        self.tracks.clear()
        self.tasks.clear()
        for pin in range(3):
            await engine.unpin_prompt(f"pin {pin}")
        if engine.state is EngineState.UNLOADED:
            await engine.reload(self.rig.config)
        await self.rig.comes_to_rest()
        await self.rig.serves()
        assert not self.rig.router._inboxes and not self.rig.router._futures


def requests() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "prompt": st.lists(st.integers(0, 3), min_size=1, max_size=20),
            "config": st.builds(
                GenerationConfig,
                n=st.sampled_from([1, 1, 1, 2, 3]),
                max_tokens=st.sampled_from([None, 0, 1, 4, 9]),
                logprobs=st.booleans(),
                seed=st.just(0),
            ),
            "options": st.builds(
                RequestOptions,
                priority=st.sampled_from([0, 0, 1, -1]),
                when_full=st.sampled_from(["wait", "raise"]),
                deadlines=st.sampled_from(
                    [None, None, None, Deadlines(total=1e-6), Deadlines(queue=1e-6), Deadlines(first_token=60.0)]
                ),
            ),
            "read": st.booleans(),
            "pieces": st.sampled_from([0, 0, 0, 3, 6]),
        }
    )


SOME = st.integers(0, 50)
OPERATIONS = st.one_of(
    st.tuples(st.just("add"), requests()),
    st.tuples(st.just("add"), requests()),
    st.tuples(st.just("add"), requests()),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("add many"), requests()),
    st.tuples(st.just("speak"), st.none()),
    st.tuples(st.sampled_from(["abort", "abort by id", "close", "cancel the reader", "cancel a call", "drop"]), SOME),
    st.tuples(st.just("take"), SOME),
    st.tuples(
        st.just("reload"),
        st.tuples(
            st.sampled_from(["scripted", "scripted", "refused", "broken"]),
            st.sampled_from(["abort", "wait", "carry"]),
            st.sampled_from(["wait", "serve"]),
        ),
    ),
    st.tuples(
        st.just("call"),
        st.sampled_from(["reset", "unload", "pause", "resume", "resume", "sleep", "wake", "wake", "drain", "restart"]),
    ),
    st.tuples(st.sampled_from(["pin", "unpin", "update_weights"]), SOME),
    st.tuples(st.sampled_from(["fail", "fail a launch", "lose", "refuse"]), st.none()),
)
CONFIGS = st.fixed_dictionaries(
    {
        "max_num_sequence": st.sampled_from([1, 2, 4]),
        "max_total_sequence_length": st.sampled_from([32, 48, 128]),
        "prefill_chunk_size": st.sampled_from([3, 16]),
        "max_queue_size": st.sampled_from([None, 1, 3]),
        "prefix_cache_mode": st.sampled_from(["radix", "disable"]),
        "prefill_mode": st.sampled_from(["hybrid", "chunked"]),
    }
)


async def play(
    config: dict[str, Any],
    fits_beside: bool,
    run_ahead: bool,
    kept_states: int | None,
    guesses: bool,
    operations: list[tuple[str, Any]],
) -> None:
    machine = Machine(config, fits_beside, run_ahead, kept_states, guesses)
    async with machine.rig:
        machine.watch()
        for name, value in operations:
            if name == "step":
                await machine.step(value)
            else:
                machine.do(name, value)
                for _ in range(3):
                    await asyncio.sleep(0)
                await machine.settle()
            machine.check()
        await machine.finish()
        machine.check()


@pytest.mark.timeout(3600)
@settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(
    config=CONFIGS,
    fits_beside=st.booleans(),
    run_ahead=st.booleans(),
    kept_states=st.sampled_from([None, None, 0, 2, 50]),
    guesses=st.booleans(),
    operations=st.lists(OPERATIONS, min_size=5, max_size=40),
)
def test_any_interleaving(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
    config: dict[str, Any],
    fits_beside: bool,
    run_ahead: bool,
    kept_states: int | None,
    guesses: bool,
    operations: list[tuple[str, Any]],
) -> None:
    reported: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
        await play(config, fits_beside, run_ahead, kept_states, guesses, operations)
        this = asyncio.current_task()
        assert [task for task in asyncio.all_tasks() if task is not this] == []

    note(f"{config} {fits_beside} {run_ahead} {kept_states} {guesses}")
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
    assert reported == []
