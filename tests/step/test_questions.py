"""What is wanted to know of a prompt: how likely a token is behind a place, and what the tokens behind it attend to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from asyncengine.errors import InvalidRequestError, StepError
from asyncengine.events import Attention, PromptLogprobs
from asyncengine.instructions import AlignmentQuestion, PromptQuestion
from asyncengine.outputs import FinishReason
from asyncengine.step.batch import StepTokens
from asyncengine.testing import ByteTokenizer, ScriptedLoader, ScriptedModel, echo
from tests.step.core_case import Case


def case(**changes: Any) -> Case:
    made = Case(ScriptedLoader(echo, tokenizer=ByteTokenizer()))
    made.load(**changes)
    return made


def ask(made: Case, prompt: str, place: int, token_id: int = 99, **changes: Any) -> int:
    new = replace(made.new(prompt, **changes), question=PromptQuestion(place, token_id))
    made.give(made.adding(new))
    return new.number


def answers(made: Case, number: int) -> list[float]:
    """Log-probabilities that were told: of a scripted model they say behind which place."""
    told = (event for event in made.box.log if isinstance(event, PromptLogprobs) and event.number == number)
    return [each.logprob for event in told for each in event.logprobs]


@pytest.mark.parametrize("place", [0, 3, 15, 16, 29])
@pytest.mark.parametrize("changes", [{}, {"prefill_chunk_size": 5}, {"prefix_cache_mode": "disable"}], ids=str)
def test_it_is_answered_once_in_chunks_and_out_of_the_cache(
    place: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, execute = [], ScriptedModel.execute

    def seen(self: Any, batch: Any) -> Any:
        asked.extend(batch.score_token_ids.tolist())
        return execute(self, batch)

    monkeypatch.setattr(ScriptedModel, "execute", seen)
    made, prompt = case(**changes), "abcdefghijklmnopqrstuvwxyz0123"
    for token_id in (99, 98):
        number = ask(made, prompt, place, token_id, max_tokens=3)
        other = made.add("xyz", max_tokens=2)
        made.run()
        assert answers(made, number) == [-float(place)] and answers(made, other) == []
        assert (made.text(number), made.text(other)) == ("abc", "xy")
        cached = made.usage(number).cached_tokens
    assert asked == [99, 98]
    if "prefix_cache_mode" not in changes:
        assert cached == place // 4 * 4  # what is asked for must be computed


def test_it_is_not_asked_again_after_a_preemption() -> None:
    made = case(max_total_sequence_length=32)
    numbers = [ask(made, "abcdefghijkl", 2), ask(made, "mnopqrstuvwx", 5)]
    made.run()
    assert sum(made.usage(number).preemptions for number in numbers) > 0
    assert [answers(made, number) for number in numbers] == [[-2.0], [-5.0]]
    assert made.text(numbers[1]) == "mnopqrstuvwx"


def test_another_model_must_know_the_token() -> None:
    made = case()
    number = ask(made, "abc", 1, token_id=200)
    made.loader.vocab_size = 150
    made.load("other", in_flight="carry")
    made.run()
    assert made.reason(number) is FinishReason.ERROR
    assert isinstance(made.end_error(number), InvalidRequestError) and "outside the new vocab" in str(
        made.end_error(number)
    )


def align(made: Case, prompt: str, place: int) -> int:
    new = replace(made.new(prompt, max_tokens=0), question=AlignmentQuestion(place, 40))
    made.give(made.adding(new))
    return new.number


def attended(made: Case, number: int) -> list[list[int]]:
    """Frames that tokens attend to, each time that it was told: of a scripted model they are their positions."""
    told = (event for event in made.box.log if isinstance(event, Attention) and event.number == number)
    found = [np.concatenate(event.parts, axis=1) for event in told]
    assert all(weights.shape[0] == 1 and weights.shape[2] == 40 for weights in found)
    return [weights[0].argmax(axis=1).tolist() for weights in found]


@pytest.mark.parametrize("place", [0, 13, 16, 29])
@pytest.mark.parametrize("changes", [{}, {"prefill_chunk_size": 5}, {"prefix_cache_mode": "disable"}], ids=str)
def test_what_tokens_attend_to_is_told_once_in_chunks_and_out_of_the_cache(place: int, changes: dict[str, Any]) -> None:
    """Beside others, of which something else is wanted, in the same steps."""
    made, prompt = case(**changes), "abcdefghijklmnopqrstuvwxyz0123"
    for _ in range(2):
        number, other = align(made, prompt, place), ask(made, "xyzw", 2, max_tokens=3)
        embedded = made.add("vwx", max_tokens=2)
        made.run()
        assert attended(made, number) == [list(range(place, 30))] and made.reason(number) is FinishReason.LENGTH
        assert answers(made, other) == [-2.0] and (made.text(other), made.text(embedded)) == ("xyz", "vw")
        assert not answers(made, number) and not attended(made, other) and not made.tokens(number)
        cached = made.usage(number).cached_tokens
    if "prefix_cache_mode" not in changes:
        assert cached == place // 4 * 4


def test_what_was_looked_at_is_not_looked_at_again_after_a_preemption() -> None:
    made = case(prefill_chunk_size=4)
    number = align(made, "abcdefghijkl", 2)
    made.step(2)
    assert made.core.scheduler is not None
    made.core.scheduler.preempt_all()
    made.run()
    assert attended(made, number) == [list(range(2, 12))] and made.usage(number).preemptions == 1
    [told] = (event for event in made.box.log if isinstance(event, Attention))
    assert [part.shape[1] for part in told.parts] == [2, 4, 4]


def test_one_that_ends_before_is_told_nothing() -> None:
    made = case(prefill_chunk_size=4)
    number = align(made, "abcdefghijkl", 2)
    made.step(2)
    made.abort(number)
    made.run()
    assert made.reason(number) is FinishReason.ABORT and not attended(made, number)
    assert made.pool.num_free + made.pool.num_cached == made.pool.num_blocks


@pytest.mark.parametrize("aligns", [True, False])
def test_another_model_looks_at_all_of_it_or_at_nothing(aligns: bool) -> None:
    """What the first one looked at is let go: its heads are others."""
    made = case(prefill_chunk_size=4)
    number = align(made, "abcdefghijkl", 2)
    made.step(2)
    made.loader.takes_audio = aligns
    made.load("other", in_flight="carry", prefill_chunk_size=64)
    made.run()
    if aligns:
        [told] = (event for event in made.box.log if isinstance(event, Attention))
        assert [part.shape for part in told.parts] == [(1, 10, 40)]
    else:
        assert made.reason(number) is FinishReason.ERROR and not attended(made, number)
        assert "does not tell what its tokens attend to" in str(made.end_error(number))


def test_a_model_that_does_not_tell_fails_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = ScriptedModel._draw

    def silent(self: Any, batch: Any) -> StepTokens:
        return replace(draw(self, batch), attention=())

    monkeypatch.setattr(ScriptedModel, "_draw", silent)
    made = case()
    number = align(made, "abc", 1)
    made.run()
    assert made.reason(number) is FinishReason.ERROR and isinstance(made.end_error(number), StepError)
