"""The scripted model's states: moved as a batch says, and compared with what is in the cache."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, StepError
from asyncengine.step.batch import NO_INDEX, NO_TOKENS, StepBatch
from asyncengine.testing import ByteTokenizer, ScriptedLoader, scripted_engine
from asyncengine.testing.states import ScriptedStates

pytestmark = pytest.mark.timeout(60)


def batch(*rows: tuple[int, int, int], copies: Any = (), saves: Any = (), **changes: Any) -> StepBatch:
    """A step of rows (slot, context, tokens)."""
    made = StepBatch(
        token_ids=NO_TOKENS,
        positions=NO_TOKENS,
        query_start=np.cumsum([0, *(count for _, _, count in rows)], dtype=np.int32),
        context_lens=np.array([context for _, context, _ in rows], dtype=np.int32),
        block_tables=np.empty((len(rows), 0), dtype=np.int32),
        slot_mapping=NO_INDEX,
        sample_index=NO_INDEX,
        sample_slots=NO_INDEX,
        sample_positions=NO_INDEX,
        copies=np.empty((0, 2), dtype=np.int64),
        num_decodes=0,
        slots=np.array([slot for slot, _, _ in rows], dtype=np.int64),
        state_copies=np.array(copies, dtype=np.int64).reshape(-1, 2),
        state_saves=np.array(saves, dtype=np.int64).reshape(-1, 3),
    )
    return dataclasses.replace(made, **changes)


def drafted(*rows: tuple[int, int, int], **changes: Any) -> StepBatch:
    """The same, whose rows decode and have drafts behind their first tokens."""
    lengths = np.array([count - 1 for _, _, count in rows])
    return batch(*rows, num_decodes=len(rows), draft_lengths=lengths, **changes)


def begun() -> ScriptedStates:
    """Two slots and three places; the first slot's state is of the tokens 5, 6, 7, a kept one of 5, 6."""
    states = ScriptedStates(2, 3, 4)
    states.move(batch((0, 0, 3), saves=[(0, 2, 4)]), [[5, 6, 7]])
    return states


def test_a_state_is_of_the_tokens_that_were_computed() -> None:
    states = begun()
    states.move(batch((0, 3, 1)), [[5, 6, 7, 8]])
    assert (states.at(0), states.at(1), states.at(4)) == ((5, 6, 7, 8), None, (5, 6))


def test_a_row_at_the_beginning_has_none_whatever_was_there() -> None:
    states = begun()
    states.move(batch((0, 0, 1)), [[9]])
    assert states.at(0) == (9,)


def test_copies_come_before_saves() -> None:
    states = begun()
    states.move(batch((1, 2, 2), copies=[(4, 1)], saves=[(0, 1, 4)]), [[5, 6, 1, 2]])
    assert (states.at(1), states.at(4)) == ((5, 6, 1, 2), (5, 6, 1))


@pytest.mark.parametrize("tokens", [[5, 6, 8, 9], [5, 6], [5, 6, 7, 7, 9]])
def test_another_state_than_that_of_the_cache_is_noticed(tokens: list[int]) -> None:
    states = begun()
    with pytest.raises(AssertionError, match="the state of slot 0 is of"):
        states.move(batch((0, len(tokens) - 1, 1)), [tokens])


def test_a_state_that_was_never_there_is_noticed() -> None:
    with pytest.raises(AssertionError, match="the state of slot 1 is of None"):
        begun().move(batch((1, 3, 1)), [[5, 6, 7, 8]])


@pytest.mark.parametrize("what", ["slot", "copy", "save"])
def test_what_a_failed_step_has_moved_is_rubbish(what: str) -> None:
    states = begun()
    failed = {
        "slot": batch((0, 3, 1)),
        "copy": batch((1, 0, 1), copies=[(4, 0)]),
        "save": batch((1, 0, 1), saves=[(0, 1, 4)]),
    }
    states.spoil(failed[what])
    assert states.at(4 if what == "save" else 0) is None
    states.clear()
    assert {states.at(place) for place in range(5)} == {None}


WRONG: dict[str, tuple[StepBatch, str]] = {
    "no slots": (batch((0, 3, 1), slots=None), "no slots"),
    "too few slots": (batch((0, 3, 1), slots=NO_INDEX), "no slots"),
    "too many drafts": (batch((0, 3, 2), num_decodes=1, draft_lengths=np.array([5])), "5 tokens are drafted; .* of 4"),
    "a draft's save over a row's state": (drafted((0, 3, 2), saves=[(0, 1, 0)]), "to one place"),
    "two rows' saves at one place": (drafted((0, 3, 2), (1, 0, 1), saves=[(0, 1, 3), (1, 1, 3)]), "to one place"),
    "a slot twice": (batch((0, 3, 1), (0, 0, 1)), "there twice"),
    "a copy to a kept place": (batch((0, 3, 1), copies=[(0, 4)]), "from or to nowhere"),
    "a copy from nowhere": (batch((0, 3, 1), copies=[(5, 1)]), "from or to nowhere"),
    "a save over a row's state": (batch((0, 3, 1), saves=[(0, 1, 0)]), "to one place"),
    "two saves at one place": (batch((0, 3, 2), saves=[(0, 1, 3), (0, 2, 3)]), "to one place"),
    "a save nowhere": (batch((0, 3, 1), saves=[(0, 1, 5)]), "saved nowhere"),
    "a save of nothing": (batch((0, 3, 1), saves=[(0, 0, 3)]), "not computed"),
    "a save beyond the row": (batch((0, 3, 1), saves=[(0, 2, 3)]), "not computed"),
    "saves in no order": (batch((0, 3, 2), saves=[(0, 2, 3), (0, 1, 4)]), "not in order"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_malformed_batch_is_noticed(what: str) -> None:
    wrong, words = WRONG[what]
    with pytest.raises(AssertionError, match=words):
        begun().move(wrong, [[5, 6, 7, 8, 9], [1]][: len(wrong.context_lens)])


async def test_an_engine_over_a_model_that_keeps_states() -> None:
    async with scripted_engine("fine, thanks", kept_states=4, kv_cache_page_size=4) as engine:
        first = await engine.generate("hello, world", GenerationConfig(n=3))
        again = await engine.generate("hello, world")
        assert {output.text for output in [*first.outputs, *again.outputs]} == {"fine, thanks"}
        assert again.usage.cached_tokens == 8


async def test_one_that_keeps_none_answers_all_the_same() -> None:
    async with scripted_engine("fine, thanks", kept_states=0, kv_cache_page_size=4) as engine:
        for _ in range(2):
            result = await engine.generate("hello, world", GenerationConfig(n=2))
            assert result.text == "fine, thanks" and result.usage.cached_tokens == 0


def test_with_drafts_states_are_of_the_tokens_that_count() -> None:
    states, tokens = begun(), [[5, 6, 7, 8, 9], [4, 3]]
    states.move(batch((1, 0, 1)), [[4]])
    step = drafted((0, 3, 2), (1, 1, 1), saves=[(0, 1, 2), (0, 2, 2), (1, 1, 3)])
    states.move(step, tokens)
    assert states.at(0) is states.at(1) is states.at(2) is None
    states.take(step, tokens, [1, 1])
    assert (states.at(0), states.at(1)) == ((5, 6, 7, 8), (4, 3))
    assert (states.at(2), states.at(3)) == ((5, 6, 7, 8), (4, 3))
    again = drafted((0, 4, 2), saves=[(0, 1, 2), (0, 2, 4)])
    states.move(again, [[5, 6, 7, 8, 1, 2]])
    states.take(again, [[5, 6, 7, 8, 1, 2]], [0])
    assert states.at(0) is None and (states.at(2), states.at(4)) == ((5, 6, 7, 8), (5, 6))


async def test_drafts_are_made_for_a_model_that_keeps_states() -> None:
    async with scripted_engine("aabaabaab", kept_states=4, speculative_mode="ngram") as engine:
        result = await engine.generate("aab")
        assert result.text == "aabaabaab" and 0 < result.usage.accepted_draft_tokens < result.usage.draft_tokens


async def test_a_mistake_about_states_is_noticed() -> None:
    loader = ScriptedLoader(tokenizer=ByteTokenizer(), kept_states=4)
    async with AsyncEngine(EngineConfig("m"), loader=loader) as engine:
        model = loader.model
        model.hold()
        task = asyncio.create_task(engine.generate("hello"))
        assert await asyncio.to_thread(model.wait_until_held)
        model.let()
        assert await asyncio.to_thread(model.wait_until_held)
        assert model._states is not None
        model._states.clear()
        model.release()
        with pytest.raises(StepError, match="the state of slot"):
            await task
