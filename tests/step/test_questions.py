"""How likely a token is behind a place of a prompt that something else stands behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from asyncengine.errors import InvalidRequestError
from asyncengine.events import PromptLogprobs
from asyncengine.instructions import PromptQuestion
from asyncengine.outputs import FinishReason
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
