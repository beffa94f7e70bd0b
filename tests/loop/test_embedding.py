"""Requests for embeddings keep every promise that requests make. A token's hidden state is (token id, position, 1)."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from asyncengine import (
    AsyncEngine,
    DeadlineExceededError,
    Deadlines,
    EngineConfig,
    InvalidRequestError,
    ModelNotLoadedError,
    RequestDroppedError,
    RequestOptions,
    StepError,
)
from asyncengine.testing import ScriptedLoader, ScriptedModel

pytestmark = pytest.mark.loops("either")

PROMPT = [(7 * i) % 200 for i in range(100)]
MEAN = [float(np.mean(PROMPT)), 49.5, 1.0]


async def loaded(loader: ScriptedLoader, **config: int) -> AsyncEngine:
    engine = AsyncEngine(loader=loader)
    await engine.reload(EngineConfig("a", prefill_chunk_size=16, kv_cache_page_size=8, **config))  # type: ignore[arg-type]
    return engine


async def all_is_free(engine: AsyncEngine) -> None:
    while engine.metrics().num_requests_running or engine.metrics().num_requests_waiting:
        await engine.abort_request("nobody")
    assert engine.metrics().kv_blocks_used == 0


async def held_in_the_middle(engine: AsyncEngine, model: ScriptedModel) -> None:
    """Two steps of the prompt are done, a third one waits."""
    for _ in range(2):
        await asyncio.to_thread(model.wait_until_held)
        model.let()
    await asyncio.to_thread(model.wait_until_held)


async def test_pieces_add_up_to_the_mean_of_all_tokens() -> None:
    engine = await loaded(ScriptedLoader())
    mean, last = [(await engine.embed([PROMPT, [5]], way, normalize=False)) for way in ("mean", "last")]  # type: ignore[arg-type]
    assert mean[0].vector.tolist() == pytest.approx(MEAN)
    assert last[0].vector.tolist() == [PROMPT[-1], 99.0, 1.0]
    assert mean[1].vector.tolist() == last[1].vector.tolist() == [5.0, 0.0, 1.0]
    assert (mean[0].usage.prompt_tokens, mean[0].usage.completion_tokens) == (100, 0)
    assert engine.metrics().counters.requests == {"stop": 0, "length": 4, "abort": 0, "error": 0}
    await all_is_free(engine)
    await engine.shutdown()


async def test_many_at_a_time_in_few_blocks() -> None:
    engine = await loaded(ScriptedLoader(), max_total_sequence_length=112, max_num_sequence=4)
    found = await engine.embed([PROMPT] * 7 + [[9] * 20] * 5, "mean", normalize=False)
    assert [one.vector.tolist() for one in found] == [pytest.approx(MEAN)] * 7 + [[9.0, 9.5, 1.0]] * 5
    await all_is_free(engine)
    await engine.shutdown()


async def test_a_cancelled_caller_ends_its_requests() -> None:
    engine = await loaded(loader := ScriptedLoader())
    loader.model.hold()
    task = asyncio.ensure_future(engine.embed([PROMPT, PROMPT]))
    await held_in_the_middle(engine, loader.model)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    loader.model.release()
    await all_is_free(engine)
    assert engine.metrics().counters.requests["abort"] == 2
    await engine.shutdown()


async def test_an_aborted_one_raises() -> None:
    engine = await loaded(loader := ScriptedLoader())
    loader.model.hold()
    task = asyncio.ensure_future(engine.embed([PROMPT], options=RequestOptions(request_id="mine")))
    await held_in_the_middle(engine, loader.model)
    aborting = asyncio.ensure_future(engine.abort_request("mine-0"))
    await asyncio.sleep(0)  # now the instruction is given, and the step is not over
    loader.model.release()
    await aborting
    with pytest.raises(RequestDroppedError, match="mine-0: it was aborted"):
        await task
    await all_is_free(engine)
    await engine.shutdown()


async def test_a_failed_step_ends_those_in_it_and_the_next_one_works() -> None:
    engine = await loaded(loader := ScriptedLoader())
    loader.model.fail_next(ValueError("boom"))
    with pytest.raises(StepError, match="boom"):
        await engine.embed([PROMPT])
    assert (await engine.embed([PROMPT], normalize=False))[0].vector.tolist() == pytest.approx(MEAN)
    await all_is_free(engine)
    await engine.shutdown()


async def test_a_deadline_ends_it() -> None:
    engine = await loaded(loader := ScriptedLoader())
    await engine.pause()
    with pytest.raises(DeadlineExceededError):
        await engine.embed([PROMPT], options=RequestOptions(deadlines=Deadlines(total=0.01)))
    assert loader.model.steps == 0
    await engine.shutdown()


async def test_carried_over_to_another_model_it_is_computed_anew() -> None:
    engine = await loaded(loader := ScriptedLoader())
    first = loader.model
    first.hold()
    task = asyncio.ensure_future(engine.embed([PROMPT], normalize=False))
    await held_in_the_middle(engine, first)
    reloading = asyncio.ensure_future(engine.reload(EngineConfig("b", prefill_chunk_size=16), "carry"))
    await asyncio.sleep(0)
    first.release()
    await reloading
    assert (await task)[0].vector.tolist() == pytest.approx(MEAN)
    await engine.shutdown()


async def test_a_model_without_hidden_states_refuses() -> None:
    loader = ScriptedLoader()
    loader.hidden_size = None
    engine = await loaded(loader)
    with pytest.raises(InvalidRequestError, match="'a' cannot embed"):
        await engine.embed([PROMPT])
    await engine.unload()
    with pytest.raises(ModelNotLoadedError):
        await engine.embed([PROMPT])
    await engine.shutdown()
