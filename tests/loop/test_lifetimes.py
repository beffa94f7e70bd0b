"""Several event loops, several engines, engines that nobody shuts down, and the end of the process."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Rig, endless, eventually, read

from asyncengine import (
    AsyncEngine,
    EngineClosedError,
    EngineConfig,
    EngineState,
    FinishReason,
    GenerationConfig,
    RequestStream,
)
from asyncengine.instructions import NewRequest
from asyncengine.step.sequence import Request, Sequence
from asyncengine.testing import ByteTokenizer, ScriptedLoader, scripted_engine

pytestmark = pytest.mark.timeout(60)

LONG = GenerationConfig(max_tokens=10_000)

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
Run = Callable[[str], str]

AT_IMPORT = [Rig(), Rig()]  # outside any loop, as in a program's module


def test_an_engine_may_be_made_at_import_time(loop_factory: LoopFactory) -> None:
    async def main() -> None:
        async with AT_IMPORT.pop() as rig:
            await rig.serves()

    run(loop_factory, main())


async def test_several_engines_at_once() -> None:
    rigs = [Rig(lambda prompt, branch, i=i: b"engine %d" % i) for i in range(4)]  # type: ignore[misc]
    for rig in rigs:
        await rig.__aenter__()
    try:
        results = await asyncio.gather(*(rig.engine.generate("x") for rig in rigs for _ in range(5)))
        assert [result.text for result in results] == [f"engine {i}" for i in range(4) for _ in range(5)]
        await rigs[0].engine.unload()
        assert [rig.engine.state.value for rig in rigs] == ["unloaded", "ready", "ready", "ready"]
    finally:
        for rig in rigs:
            await rig.__aexit__(None, None, None)


def run(factory: LoopFactory, main: object) -> object:
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)  # type: ignore[arg-type]


def test_a_second_run_with_the_same_engine(loop_factory: LoopFactory) -> None:
    rig = Rig()
    rig.engine.reload_nowait()

    async def main(text: str) -> str:
        result = await rig.engine.generate(text)
        await rig.comes_to_rest()
        return result.text

    for i in range(4):
        assert run(loop_factory, main(f"run {i}")) == f"run {i}"
    assert len(rig.engine._routers) == 1  # those of closed loops are forgotten
    run(loop_factory, rig.engine.shutdown())


def test_one_engine_on_two_loops_at_once(loop_factory: LoopFactory) -> None:
    rig = Rig()
    rig.engine.reload_nowait()
    wrong: list[object] = []

    async def main(name: str) -> None:
        for i in range(10):
            texts = [f"{name} {i} {k}" for k in range(4)]
            results = await asyncio.gather(*(rig.engine.generate(text) for text in texts))
            if [result.text for result in results] != texts:
                wrong.append(results)
            stream = await rig.engine.add_request(f"{name} leaves")
            if i % 2:
                stream.abort()
                await stream
        await eventually(lambda: rig.router.idle)

    threads = [threading.Thread(target=run, args=(loop_factory, main(name))) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    run(loop_factory, rig.comes_to_rest())
    rig.engine.shutdown_nowait()


def test_a_loop_that_is_closed_ends_its_requests_only(loop_factory: LoopFactory) -> None:
    rig = Rig(endless, step_seconds=0.0005)
    rig.engine.reload_nowait()
    kept: list[RequestStream] = []

    async def leave() -> None:
        kept.extend([await rig.engine.add_request("left behind", GenerationConfig(n=2)) for _ in range(3)])
        await anext(kept[0])

    async def stay() -> None:
        stream = await rig.engine.add_request("stays", GenerationConfig(max_tokens=300))
        await asyncio.to_thread(run, loop_factory, leave())
        assert len((await stream).token_ids) == 300
        await eventually(lambda: rig.metrics().kv_blocks_used == 0)
        await rig.comes_to_rest()

    run(loop_factory, stay())
    assert rig.metrics().counters.requests["abort"] == 3
    kept[0].abort()  # harmless
    kept.clear()
    rig.engine.shutdown_nowait()


def test_a_loop_that_is_closed_with_nothing_else_running(loop_factory: LoopFactory) -> None:
    rig = Rig(endless, step_seconds=0.0005)
    rig.engine.reload_nowait()
    kept: list[RequestStream] = []

    async def leave() -> None:
        kept.append(await rig.engine.add_request("left behind"))
        await anext(kept[0])

    run(loop_factory, leave())
    until = time.monotonic() + 5.0
    while rig.metrics().num_requests_running or rig.metrics().kv_blocks_used:
        assert time.monotonic() < until
        time.sleep(0.001)
    run(loop_factory, rig.serves())
    rig.engine.shutdown_nowait()


@pytest.mark.parametrize("how", ["drain", "reload", "shutdown"])
def test_a_loop_that_is_closed_while_a_prompt_is_coming_keeps_nobody_waiting(
    loop_factory: LoopFactory, how: str
) -> None:
    """Nothing is ever told of such a request, and the task that awaits its next piece may be held by anyone."""
    rig = Rig()
    rig.engine.reload_nowait()
    closed = loop_factory()

    class Silent:
        def __aiter__(self) -> Silent:
            return self

        async def __anext__(self) -> str:
            await asyncio.sleep(3600)
            return "too late"

    async def begin() -> asyncio.Task[RequestStream]:
        task = asyncio.create_task(rig.engine.add_request(Silent()))
        await eventually(lambda: rig.metrics().num_requests_waiting == 1)
        return task

    async def go_on() -> None:
        async with asyncio.timeout(5.0):
            match how:
                case "drain":
                    await rig.engine.drain()
                case "reload":
                    await rig.engine.reload(rig.config, "wait")
                case _:
                    assert await rig.engine.shutdown(drain=60.0) == ()
        assert rig.metrics().num_requests_waiting == 0
        await rig.engine.shutdown()

    task = closed.run_until_complete(begin())
    closed.close()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(go_on())
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    task.get_coro().close()  # type: ignore[union-attr]


def test_loops_that_nobody_closes_are_let_go(loop_factory: LoopFactory) -> None:
    rig = Rig()
    rig.engine.reload_nowait()
    loops = [loop_factory() for _ in range(5)]

    async def generate() -> str:
        return (await rig.engine.generate("hello")).text

    for _ in range(2):
        for loop in loops:
            assert loop.run_until_complete(generate()) == "hello"
            assert list(rig.engine._routers) == [loop]
    rig.engine.shutdown_nowait()
    for loop in loops:
        loop.close()


def test_a_loop_that_stands_still_keeps_what_it_waits_for(loop_factory: LoopFactory) -> None:
    rig = Rig()
    rig.engine.reload_nowait()
    first, second = loop_factory(), loop_factory()

    async def begin() -> RequestStream:
        await rig.engine.pause()
        return await rig.engine.add_request("hello")

    async def finish(stream: RequestStream) -> str:
        return (await stream).text

    stream = first.run_until_complete(begin())
    second.run_until_complete(rig.engine.resume())
    assert first.run_until_complete(finish(stream)) == "hello"
    rig.engine.shutdown_nowait()
    first.close()
    second.close()


async def test_an_engine_that_is_dropped_ends_its_thread() -> None:
    rig = Rig(endless)
    await rig.engine.reload(rig.config)
    stream = await rig.engine.add_request("x")
    thread, watch, model = rig.engine._thread._thread, weakref.ref(rig.engine), rig.model
    assert thread is not None
    del rig
    assert thread.is_alive()  # the stream needs it
    await anext(stream)
    del stream
    assert watch() is None
    await asyncio.to_thread(thread.join, 5.0)
    assert not thread.is_alive()
    assert model.closed


def test_an_engine_that_is_dropped_in_a_cycle_ends_its_thread(loop_factory: LoopFactory) -> None:
    async def main() -> threading.Thread:
        rig = Rig()
        await rig.engine.reload(rig.config)
        await rig.serves()
        rig.engine.me = rig.engine  # type: ignore[attr-defined]
        thread = rig.engine._thread._thread
        assert thread is not None
        return thread

    thread = run(loop_factory, main())
    assert isinstance(thread, threading.Thread)
    gc.collect()
    thread.join(5.0)
    assert not thread.is_alive()


async def test_an_engine_that_is_dropped_while_it_loads() -> None:
    loader = ScriptedLoader()
    loader.gate = threading.Event()
    engine = AsyncEngine(EngineConfig("m"), loader=loader)
    engine.reload_nowait()
    loading = [engine.health]
    await eventually(lambda: (loading[0]().loading or "").startswith("loading"))
    loading.clear()
    thread = engine._thread._thread
    assert thread is not None
    del engine
    await asyncio.to_thread(thread.join, 5.0)
    assert not thread.is_alive()
    loader.gate.set()
    await eventually(lambda: bool(loader.models) and loader.model.closed)


async def test_a_shut_down_engine_refuses_from_every_loop(loop_factory: LoopFactory) -> None:
    rig = Rig()
    async with rig:
        pass

    async def elsewhere() -> None:
        with pytest.raises(EngineClosedError):
            await rig.engine.generate("x")
        assert rig.router.idle

    await asyncio.to_thread(run, loop_factory, elsewhere())


def test_a_forked_process_is_told_that_its_engine_is_in_the_other(in_a_process: Run) -> None:
    out = in_a_process(
        """
        import os, warnings
        from asyncengine import AsyncEngineError
        warnings.simplefilter("ignore")  # of a fork beside threads
        async def generate():
            return (await asyncio.wait_for(engine.generate("hello"), 5)).text
        async def main():
            await engine.shutdown()
            async with scripted_engine("own") as own:
                return (await own.generate("hello")).text
        engine = scripted_engine("hello")
        engine.reload_nowait()
        print(run(generate()), flush=True)
        if (child := os.fork()) == 0:
            try:
                run(generate())
            except AsyncEngineError as error:
                print(error)
            print(engine.state.value, engine.health().ok, run(main()))
            engine.shutdown_nowait()
        else:
            os.waitpid(child, 0)
            print(run(generate()))
            engine.shutdown_nowait()
        """
    )
    assert out.split("\n") == [
        "hello",
        "the engine runs in the process from which this one was forked; make one here",
        "closed False own",
        "left: []",
        "hello",
        "left: []",
        "",
    ]


def test_a_shutdown_beside_requests_on_another_loop(loop_factory: LoopFactory) -> None:
    """Whatever the two threads do, everybody gets an answer."""
    for _ in range(20):
        rig = Rig(endless)
        rig.engine.reload_nowait()
        outcomes: list[object] = []

        async def use(rig: Rig = rig, outcomes: list[object] = outcomes) -> None:
            async def one() -> object:
                try:
                    return (await rig.engine.generate("x", GenerationConfig(max_tokens=50))).finish_reason
                except EngineClosedError as error:
                    return error

            while rig.engine.state is not EngineState.CLOSED:
                outcomes.extend(await asyncio.gather(*(one() for _ in range(5))))
            assert rig.router.idle

        thread = threading.Thread(target=run, args=(loop_factory, use()))
        thread.start()
        run(loop_factory, rig.engine.shutdown())
        thread.join(10.0)
        assert not thread.is_alive(), "somebody waits for ever"
        assert all(
            isinstance(outcome, EngineClosedError) or outcome in (FinishReason.ABORT, FinishReason.LENGTH)
            for outcome in outcomes
        )


async def test_nothing_global_is_changed() -> None:
    def look() -> dict[str, object]:
        return {
            "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
            "hooks": (threading.excepthook, sys.excepthook, sys.unraisablehook),
            "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
            "switch": sys.getswitchinterval(),
            "environment": dict(os.environ),
            "recursion": sys.getrecursionlimit(),
            "tracing": (sys.gettrace(), threading.gettrace() if hasattr(threading, "gettrace") else None),
        }

    before = look()
    async with Rig() as rig:
        await rig.serves()
        assert look() == before
    assert look() == before


# The end of the process. `PROGRAM` is what is common to those below.

PROGRAM = """
import asyncio, sys, threading, time
from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.testing import ByteTokenizer, ScriptedLoader, scripted_engine
assert "torch" not in sys.modules

def run(main):
    if sys.argv[1] == "uvloop":
        import uvloop
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    return asyncio.run(main)

def endless(prompt, branch):
    return [97] * 4000

engine = scripted_engine(endless, step_seconds=0.01)
"""


# A process that has imported what all those need, and forks for each: they end as any process does.

STARTER = """
import atexit, json, os, signal, sys, threading, time, warnings
def look():
    if ours == 0:
        print("left:", [thread.name for thread in threading.enumerate() if "asyncengine" in thread.name])
atexit.register(look)  # before anything of the engine is: it is the last to be called
import asyncio, asyncengine.loop.engine, asyncengine.testing
try:
    import uvloop
except ImportError:
    pass
for line in iter(sys.stdin.readline, ""):
    path, loop = json.loads(line)
    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside numpy's threads
        ours = os.fork()
    if ours == 0:
        signal.alarm(30)
        for descriptor, end in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(path + end, os.O_WRONLY | os.O_CREAT), descriptor)
        with open(path) as file:
            code = compile(file.read(), path, "exec")
        sys.argv = [path, loop]
        exec(code)
        break
    status = os.waitstatus_to_exitcode(os.waitpid(ours, 0)[1])
    print(json.dumps([status, time.monotonic() - begun]), flush=True)
"""


@pytest.fixture(scope="module")
def starter() -> Iterator[subprocess.Popen[str]]:
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", STARTER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == 0


@pytest.fixture
def in_a_process(starter: subprocess.Popen[str], loop_factory: LoopFactory, tmp_path: Path) -> Run:
    """Runs a program behind `PROGRAM`, which has to end by itself, in silence and soon; returns what it printed."""

    def run(body: str) -> str:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM + textwrap.dedent(body))
        assert starter.stdin is not None and starter.stdout is not None
        name = "uvloop" if "uvloop" in loop_factory.__module__ else "asyncio"
        print(json.dumps([str(program), name]), file=starter.stdin, flush=True)
        code, seconds = json.loads(starter.stdout.readline())
        errors = Path(f"{program}.err").read_text()
        # On a busy machine asyncio's debug mode remarks that a callback took long.
        said = [line for line in errors.splitlines() if not re.fullmatch(r"Executing <.*> took [\d.]+ seconds", line)]
        assert (code, said) == (0, []), errors
        assert seconds < 8.0
        return Path(f"{program}.out").read_text()

    return run


@pytest.mark.parametrize(
    "body",
    [
        # Never shut down, a step under way.
        """
        async def main():
            global stream
            engine.reload_nowait()
            stream = await engine.add_request("x")
            await anext(stream)
        run(main())
        """,
        # The same, and several engines.
        """
        engines = [scripted_engine(endless, step_seconds=0.2) for _ in range(5)]
        async def main():
            global streams
            for engine in engines:
                engine.reload_nowait()
            streams = [await engine.add_request("x") for engine in engines]
        run(main())
        """,
        # A load under way, and one that outlives its engine.
        """
        loader = ScriptedLoader(tokenizer=ByteTokenizer())
        load = loader.load
        def slow(plan):
            time.sleep(0.5)
            return load(plan)
        loader.load = slow
        engine = AsyncEngine(EngineConfig("m"), loader=loader)
        engine.reload_nowait()
        other = AsyncEngine(EngineConfig("m"), loader=loader)
        other.reload_nowait()
        time.sleep(0.1)
        other.shutdown_nowait()
        """,
        # An exception leaves `async with`.
        """
        async def main():
            async with engine:
                async for output in engine.stream("x"):
                    raise ZeroDivisionError
        try:
            run(main())
        except ZeroDivisionError:
            pass
        """,
        # The main task is cancelled in the middle.
        """
        async def main():
            async with engine:
                asyncio.get_running_loop().call_later(0.1, asyncio.current_task().cancel)
                await engine.generate("x")
        try:
            run(main())
        except asyncio.CancelledError:
            pass
        """,
        # The loop is closed under a reader that was never awaited to its end.
        """
        async def read():
            async for _ in engine.stream("x"):
                pass
        async def main():
            engine.reload_nowait()
            global task
            task = asyncio.create_task(read())
            await asyncio.sleep(0.1)
        run(main())
        """,
        # Only made.
        """
        """,
    ],
    ids=["mid-step", "several", "loading", "exception", "cancelled", "reader", "made"],
)
def test_the_interpreter_exits(in_a_process: Run, body: str) -> None:
    assert in_a_process(body) == "left: []\n"  # before the interpreter is gone


def test_ctrl_c_leaves_nothing(in_a_process: Run) -> None:
    out = in_a_process(
        """
        import os, signal
        async def main():
            async with engine:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
                async for output in engine.stream("x"):
                    pass
        try:
            run(main())
        except KeyboardInterrupt:
            print("interrupted", engine.state.value, engine._thread.alive)
        """
    )
    assert out == "interrupted closed False\nleft: []\n"


def test_ctrl_c_during_a_load_leaves_nothing(in_a_process: Run) -> None:
    out = in_a_process(
        """
        import os, signal
        loader = ScriptedLoader(tokenizer=ByteTokenizer())
        loader.gate = threading.Event()
        engine = AsyncEngine(EngineConfig("m"), loader=loader)
        async def main():
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            async with engine:
                print("entered")
        try:
            run(main())
        except KeyboardInterrupt:
            loader.gate.set()
            engine._thread.join(5)
            print("interrupted", engine.state.value, engine._thread.alive)
        """
    )
    assert out == "interrupted closed False\nleft: []\n"


def test_ctrl_c_that_is_handled_by_hand(in_a_process: Run) -> None:
    """A program that runs its loop without a runner gets the exception out of the loop, here where it waits.

    It may come in the middle of asyncio's own work, too, but then asyncio forgets what it was about to run.
    """
    out = in_a_process(
        """
        import os, signal
        async def main():
            engine.reload_nowait()
            await engine.pause()
            stream = await engine.add_request("x")
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            async for output in stream:
                pass
        loop = asyncio.new_event_loop()
        task = loop.create_task(main())
        try:
            loop.run_until_complete(task)
        except KeyboardInterrupt:
            task.cancel()
            try:
                loop.run_until_complete(task)
            except asyncio.CancelledError:
                pass
            loop.run_until_complete(engine.shutdown())
            loop.close()
            print("interrupted", engine.state.value, engine._thread.alive)
        """
    )
    assert out == "interrupted closed False\nleft: []\n"


@pytest.mark.loops("either")
async def test_a_request_that_has_ended_is_no_garbage(without_collector: None) -> None:
    def held() -> list[object]:
        return [each for each in gc.get_objects() if isinstance(each, (NewRequest, Request, Sequence, RequestStream))]

    async def left() -> None:
        async with rig.engine.stream("x", LONG) as stream:
            await anext(aiter(stream))

    async def aborted() -> None:
        stream = await rig.engine.add_request("x", LONG)
        stream.abort()
        await stream

    async def dropped() -> None:
        await anext(aiter(await rig.engine.add_request("x", LONG)))

    async def cancelled() -> None:
        reading = asyncio.ensure_future(rig.engine.generate("x", LONG))
        await eventually(lambda: rig.engine.metrics().num_requests_running == 1)
        reading.cancel()
        await asyncio.wait([reading])

    async with Rig(endless) as rig:
        before = len(held())
        for way in (
            lambda: rig.engine.generate("x", GenerationConfig(max_tokens=3)),
            lambda: rig.engine.generate("x", GenerationConfig(max_tokens=3, n=3)),
            left,
            aborted,
            dropped,
            cancelled,
        ):
            await way()
            await rig.comes_to_rest()
            await eventually(lambda: len(held()) == before)


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def test_the_helper_makes_engines_that_load_on_entering() -> None:
    async with scripted_engine({"France": "Paris", "Italy": "Rome"}) as engine:
        assert (await engine.generate("The capital of France?")).text == "Paris"
        assert (await engine.generate("The capital of Italy?")).text == "Rome"


async def test_reading_after_the_engine_is_gone() -> None:
    async with AsyncEngine(EngineConfig("m"), loader=ScriptedLoader(tokenizer=ByteTokenizer())) as engine:
        stream = await engine.add_request("hello")
        await eventually(lambda: stream.ended)
    del engine
    assert "".join(output.text for output in await read(stream)) == "hello"
