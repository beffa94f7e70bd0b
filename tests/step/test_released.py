"""Errors that are kept must not keep what failed."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, InsufficientMemoryError, ReloadError, StepError
from asyncengine.step.released import released
from asyncengine.testing import ScriptedLoader, ScriptedModel


class Tensor:
    """Stands for memory of a device."""


def fails(kept: list[weakref.ref[Tensor]]) -> None:
    activations = Tensor()
    kept.append(weakref.ref(activations))
    try:
        raise MemoryError("inner")
    except MemoryError:
        raise RuntimeError("out of memory")  # noqa: B904 the inner one is its context


def test_frames_are_emptied_along_causes_and_contexts() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def wraps() -> None:
        logits = Tensor()
        kept.append(weakref.ref(logits))
        try:
            fails(kept)
        except RuntimeError as error:
            raise ValueError("outer") from error

    with pytest.raises(ValueError, match="outer") as raised:
        wraps()
    assert all(reference() is not None for reference in kept)
    assert released(raised.value) is raised.value
    assert [reference() for reference in kept] == [None, None]
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert raised.value.__cause__.__traceback__ is not None  # which lines they were can still be told


def test_errors_that_refer_to_each_other_in_a_circle() -> None:
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert released(first) is first


@pytest.mark.parametrize("of", ["check_errors", "load_errors"])
async def test_an_error_that_is_raised_again_closes_nobody_who_caught_it_before(of: str) -> None:
    loader = ScriptedLoader()
    getattr(loader, of)["refused"] = InsufficientMemoryError("does not fit")
    async with AsyncEngine(loader=loader) as engine:

        async def insists() -> int:
            refusals = 0
            for _ in range(3):
                try:
                    await engine.reload(EngineConfig("refused"))
                except ReloadError:
                    refusals += 1
            return refusals

        assert await asyncio.wait_for(insists(), 10.0) == 3


@pytest.mark.parametrize("run_ahead", [False, True])
async def test_an_error_of_a_step_that_is_kept_does_not_keep_its_tensors(
    monkeypatch: pytest.MonkeyPatch, run_ahead: bool
) -> None:
    kept: list[weakref.ref[Tensor]] = []

    def failing(self: ScriptedModel, batch: Any) -> Any:
        fails(kept)

    async with AsyncEngine(loader=ScriptedLoader(run_ahead=run_ahead)) as engine:
        await engine.reload(EngineConfig("scripted"))
        for name in ("execute", "launch"):
            monkeypatch.setattr(ScriptedModel, name, failing)
        with pytest.raises(StepError) as raised:
            await engine.generate([1, 2], GenerationConfig(max_tokens=4))
        assert isinstance(raised.value.__cause__, RuntimeError)
        assert kept and all(reference() is None for reference in kept)


async def test_a_load_that_is_tried_while_an_error_of_another_is_handled_has_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[weakref.ref[Tensor]] = []
    load = ScriptedLoader.load

    def failing(self: ScriptedLoader, plan: Any) -> Any:
        fails(kept)

    async with AsyncEngine(loader=ScriptedLoader()) as engine:
        monkeypatch.setattr(ScriptedLoader, "load", failing)
        try:
            await engine.reload(EngineConfig("scripted"))
        except ReloadError:
            assert kept and all(reference() is None for reference in kept)
            monkeypatch.setattr(ScriptedLoader, "load", load)
            await engine.reload(EngineConfig("scripted"))
        assert engine.health().ok
