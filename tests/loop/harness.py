"""What the tests of the loop side share: a rig around an engine with a scripted model."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from asyncengine import (
    AsyncEngine,
    EngineConfig,
    EngineMetrics,
    EngineState,
    FinishReason,
    GenerationConfig,
    RequestOptions,
    RequestOutput,
    RequestResult,
    RequestStream,
)
from asyncengine.loop.router import Router
from asyncengine.speculation.protocol import Drafter
from asyncengine.testing import ByteTokenizer, Script, ScriptedLoader, ScriptedModel, echo

LIMITS: dict[str, Any] = {
    "max_num_sequence": 8,
    "max_total_sequence_length": 4096,
    "max_single_sequence_length": 1024,
    "prefill_chunk_size": 64,
    "kv_cache_page_size": 4,
}


def endless(prompt: Sequence[int], branch: int) -> Iterable[int]:
    """A script that does not end by itself within any limit: letters, which never are the end token."""
    return [ord("a") + (i + branch) % 26 for i in range(2000)]


class Rig:
    """An engine, its loader, and ways to look inside. Enter it to load the model."""

    def __init__(
        self,
        script: Script = echo,
        *,
        step_seconds: float = 0.0,
        fits_beside: bool = True,
        run_ahead: bool = False,
        kept_states: int | None = None,
        make_drafter: Callable[[ScriptedModel], Drafter] | None = None,
        tokenizer: ByteTokenizer | None = None,
        **config: Any,
    ) -> None:
        self.loader = ScriptedLoader(
            script,
            step_seconds=step_seconds,
            fits_beside=fits_beside,
            run_ahead=run_ahead,
            kept_states=kept_states,
            make_drafter=make_drafter,
            tokenizer=tokenizer or ByteTokenizer(),
        )
        self.config = EngineConfig("scripted", **(LIMITS | config))
        self.engine = AsyncEngine(self.config, loader=self.loader)

    async def __aenter__(self) -> Self:
        await self.engine.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for model in self.loader.models:
            model.release()
        for warm_up in self.loader.warm_ups:
            warm_up.release()
        if self.loader.gate is not None:
            self.loader.gate.set()
        await self.engine.__aexit__(exc_type, exc, traceback)

    @property
    def model(self) -> ScriptedModel:
        return self.loader.model

    @property
    def router(self) -> Router:
        return self.engine._router()

    # Steps under control

    async def held(self) -> None:
        """Returns once a step is being held."""
        assert await asyncio.to_thread(self.model.wait_until_held, 10.0), "no step has begun"

    async def add_held(
        self, prompt: str = "hello", config: GenerationConfig | None = None, options: RequestOptions | None = None
    ) -> RequestStream:
        """Adds a request, lets its first step pass, and returns while its second is held."""
        self.model.hold()
        adding = asyncio.create_task(
            self.engine.add_request(prompt, config, RequestOptions() if options is None else options)
        )
        await self.held()
        self.model.let()
        stream = await adding
        await self.held()
        return stream

    async def let(self, steps: int = 1) -> None:
        """Lets held steps pass, and returns while the next one is held."""
        for _ in range(steps):
            self.model.let()
            await self.held()

    # What must always be true

    async def check_accounts(self) -> None:
        """Compares the scheduler's accounts with each other, on the step thread."""
        if self.engine.state not in (EngineState.READY, EngineState.PAUSED, EngineState.SLEEPING):
            return
        core, done = self.engine._thread.core, []

        def check() -> None:
            assert core.scheduler is not None
            core.scheduler.check()
            done.append(True)

        self.model.check_accounts = check  # type: ignore[attr-defined]
        await self.engine.debug_call_func_on_all_workers("check_accounts")
        assert done

    async def comes_to_rest(self) -> None:
        """Everything that was begun is over: no request, no block in use, no inbox, no future."""
        await eventually(lambda: len(self.engine._thread.core.requests) == 0, "requests are left")
        if self.engine.state is not EngineState.CLOSED:
            await self.engine.abort_request("nobody")  # whatever was given before it has been executed
        metrics = self.engine.metrics()
        assert metrics.num_requests_running == metrics.num_requests_waiting == metrics.num_requests_queued == 0
        assert metrics.kv_blocks_used == 0
        await eventually(lambda: self.router.idle, "futures or inboxes are left")
        await self.check_accounts()

    async def serves(self) -> None:
        """The engine still answers."""
        result = await asyncio.wait_for(self.engine.generate("still there", GenerationConfig(max_tokens=3)), 10.0)
        expected = list(self.loader.script([*b"still there"], 0))[:3]
        assert result.token_ids[: len(expected)] == expected
        assert result.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)

    def metrics(self) -> EngineMetrics:
        return self.engine.metrics()


async def eventually(
    condition: Callable[[], object], otherwise: str = "it never happened", within: float = 10.0
) -> None:
    """Waits for something that another thread does and that nobody announces."""
    until = time.monotonic() + within
    while not condition():
        assert time.monotonic() < until, otherwise
        await asyncio.sleep(0.001)


async def read(stream: RequestStream) -> list[RequestOutput]:
    """All deltas."""
    return [output async for output in stream]


def joined(outputs: Iterable[RequestOutput], index: int = 0) -> tuple[str, list[int], list[Any]]:
    """Text, ids and logprobs of one branch's deltas, one after the other."""
    own = [output for output in outputs if output.index == index]
    return (
        "".join(output.text for output in own),
        [token_id for output in own for token_id in output.token_ids],
        [logprob for output in own for logprob in output.logprobs or ()],
    )


def is_whole(outputs: list[RequestOutput], result: RequestResult) -> bool:
    """Whether deltas, one after the other, are the result, and each branch has ended once, in its last delta."""
    for branch in result.outputs:
        text, ids, logprobs = joined(outputs, branch.index)
        if (text, ids, logprobs) != (branch.text, branch.token_ids, branch.logprobs or []):
            return False
        own = [output for output in outputs if output.index == branch.index]
        if [output.finish_reason for output in own] != [None] * (len(own) - 1) + [branch.finish_reason]:
            return False
    return True


class _Cut:
    """Awaits a coroutine and cancels the task at the k-th suspension."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], at: int) -> None:
        self._coroutine = coroutine
        self._at = at
        self.was_cut = False

    def __await__(self) -> Generator[Any, Any, Any]:
        value: Any = None
        error: BaseException | None = None
        for suspension in itertools.count():
            try:
                yielded = self._coroutine.send(value) if error is None else self._coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            if suspension == self._at:
                self.was_cut = True
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            value = error = None
            try:
                value = yield yielded
            except BaseException as thrown:
                error = thrown
        return None


async def cancelled_at_every_await(
    make: Callable[[], Coroutine[Any, Any, Any]], after: Callable[[], Awaitable[None]], atmost: int = 100
) -> int:
    """Runs `make()` again and again, cancelled at its 0th, 1st, 2nd ... suspension, until it is through.

    `after` runs each time. Returns how many suspensions there were.
    """
    for at in range(atmost):
        cut = _Cut(make(), at)

        async def run(cut: _Cut = cut) -> None:
            await cut

        task = asyncio.create_task(run())
        await asyncio.wait([task])
        assert task.cancelled() == cut.was_cut, f"cancelled at suspension {at}, and then {task}"
        if not cut.was_cut:
            task.result()
        del task, run
        await after()
        if not cut.was_cut:
            return at
    raise AssertionError(f"more than {atmost} suspensions")
