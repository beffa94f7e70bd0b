"""Sampling the event loop's lag: while there are requests, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from asyncengine.server import create_app, loop_lag
from asyncengine.server.loop_lag import LoopLag
from tests.server.serving import client_of, echo_engine, until


async def test_the_lag_is_sampled_while_there_are_requests_and_for_a_minute_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert loop_lag.PATIENCE == 60
    monkeypatch.setattr(loop_lag, "PERIOD", 0.01)
    async with echo_engine() as engine:
        app = create_app(engine)
        lag: LoopLag = app.state.service.traffic.lag
        await engine.generate("hello")
        assert not lag.sampling and not lag.seconds.count
        async with client_of(app) as client:
            for _ in range(2):
                taken = lag.seconds.count
                monkeypatch.setattr(loop_lag, "PATIENCE", 60)
                await client.get("/health")
                assert lag.sampling
                await until(lambda taken=taken: lag.seconds.count > taken + 1)
                monkeypatch.setattr(loop_lag, "PATIENCE", 0)
                await client.get("/health")
                await until(lambda: not lag.sampling)
                taken = lag.seconds.count
                await asyncio.sleep(0.03)
                assert lag.seconds.count == taken


def test_a_second_event_loop_samples_its_own(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    lag = LoopLag()

    async def sample() -> None:
        taken = lag.seconds.count
        lag.keep_on()
        await until(lambda: lag.seconds.count > taken)

    for _ in range(2):
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(sample())
    assert lag.sampling and lag.seconds.count == 2
