"""Whoever watches requests cannot harm them: what it raises is reported, and the request goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import pytest
from harness import Rig, eventually

from asyncengine.loop.observer import RequestBegun, RequestOver

pytestmark = pytest.mark.timeout(60)


class Clumsy:
    """Fails at its every second beginning, or at every end."""

    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at
        self.begun: list[RequestBegun] = []
        self.over: list[RequestOver] = []

    def begin(self, begun: RequestBegun) -> Callable[[RequestOver], None]:
        self.begun.append(begun)
        if self.fails_at == "begin" and len(self.begun) % 2 == 0:
            raise ArithmeticError("begin")
        return self.end

    def end(self, over: RequestOver) -> None:
        self.over.append(over)
        if self.fails_at == "end":
            raise ArithmeticError("end")

    def within(self, headers: Mapping[str, str]) -> nullcontext[None]:
        return nullcontext()


@pytest.fixture(params=["begin", "end"])
def clumsy(request: pytest.FixtureRequest) -> Clumsy:
    return Clumsy(request.param)


@pytest.fixture
async def reported() -> list[str]:
    """What the event loop's exception handler gets."""
    messages: list[str] = []

    def note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        assert isinstance(context["exception"], ArithmeticError), context
        messages.append(context["message"])

    asyncio.get_running_loop().set_exception_handler(note)
    return messages


async def test_requests_go_on(rig: Rig, clumsy: Clumsy, reported: list[str]) -> None:
    rig.engine.observer = clumsy
    results = await rig.engine.generate_many(["a", "b", "c"])
    assert [result.text for result in results] == ["a", "b", "c"]
    await rig.comes_to_rest()
    failed, told = ([1], 2) if clumsy.fails_at == "begin" else ([0, 1, 2], 3)
    assert reported == [f"the observer of {clumsy.begun[index].request_id} failed" for index in failed]
    assert len(clumsy.over) == told


async def test_a_cancellation_stays_one(rig: Rig, clumsy: Clumsy, reported: list[str]) -> None:
    rig.engine.observer = clumsy
    await rig.engine.pause()
    adding = [asyncio.create_task(rig.engine.generate("hello")) for _ in range(2)]
    await eventually(lambda: len(clumsy.begun) == 2)
    for task in adding:
        task.cancel()
    await asyncio.wait(adding)
    assert all(task.cancelled() for task in adding)
    await rig.engine.resume()
    await rig.comes_to_rest()
    assert reported


async def test_a_refusal_stays_one(rig: Rig, clumsy: Clumsy, reported: list[str]) -> None:
    rig.engine.observer = clumsy

    async def pieces() -> Any:
        yield "x"
        raise LookupError("no more")

    for _ in range(2):
        with pytest.raises(LookupError):
            await rig.engine.generate(pieces())
    await rig.comes_to_rest()
    assert reported


async def test_it_is_told_of_the_end_in_the_context_of_the_beginning(rig: Rig) -> None:
    caller: ContextVar[str] = ContextVar("caller", default="nobody")
    told: list[tuple[str, str]] = []

    class Observer(Clumsy):
        def begin(self, begun: RequestBegun) -> Callable[[RequestOver], None]:
            told.append(("begin", caller.get()))
            return lambda over: told.append(("over", caller.get()))

    async def generate(name: str) -> None:
        caller.set(name)
        await rig.engine.generate("hello")

    rig.engine.observer = Observer("never")
    for name in ("me", "you"):
        await asyncio.create_task(generate(name))
    assert told == [("begin", "me"), ("over", "me"), ("begin", "you"), ("over", "you")]


async def test_one_that_exits_leaves_none_of_many_behind(rig: Rig) -> None:
    class Exits(Clumsy):
        def begin(self, begun: RequestBegun) -> Callable[[RequestOver], None]:
            if len(self.begun) == 2:
                raise Exit
            return super().begin(begun)

    class Exit(BaseException):
        """As SystemExit, but that the loop does not mind it."""

    rig.engine.observer = exits = Exits("never")
    with pytest.raises(Exit):
        await rig.engine.generate_many(["a", "b", "c"])
    assert [over.usage for over in exits.over] == [None, None]
    assert rig.router.idle
    await rig.comes_to_rest()
