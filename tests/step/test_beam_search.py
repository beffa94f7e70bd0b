"""Beam searches in the core: what they find, what they hold meanwhile, and what is left of them when they end early."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncengine import instructions as ins
from asyncengine.errors import DeadlineExceededError, InvalidRequestError, RequestDroppedError, StepError
from asyncengine.generation import SearchParams
from asyncengine.instructions import Deadlines, NewRequest
from asyncengine.outputs import FinishReason
from asyncengine.step.batch import TokenLogprobs
from asyncengine.step.beam_search import BeamSearch, Choice
from asyncengine.step.limits import Limits
from asyncengine.step.sequence import SequenceState
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.speculation.drafters import Guesser

from .beams import found_by
from .core_case import EOS, Case, answer, loaded, params, prompt_of

WIDTH = st.integers(2, 4)
ASKED = st.fixed_dictionaries({
    "prompt": st.text("ab", min_size=1, max_size=13),
    "search": st.none()
    | st.builds(SearchParams, WIDTH, st.sampled_from([-1.0, 0.0, 1.0, 3.0]), st.sampled_from([True, False, "never"])),
    "branches": st.integers(1, 4),
    "max_tokens": st.integers(0, 14),
    "min_tokens": st.integers(0, 3),
    "priority": st.integers(-1, 1),
    "after": st.integers(0, 6),
})  # fmt: skip


def search(width: int = 3, length_penalty: float = 1.0, early_stopping: Any = False, **changes: Any) -> dict[str, Any]:
    """What to ask a core for."""
    return {"search": SearchParams(width, length_penalty, early_stopping), **changes}


def texts(case: Case, number: int, branches: int) -> list[list[int]]:
    return [case.tokens(number, branch) for branch in range(branches)]


def fitting(new: NewRequest, limits: Limits) -> NewRequest:
    """A request with as few tokens as there is room for, as a caller has it."""
    found = new.params.search
    room = limits.max_tokens - len(new.prompt)
    if found is not None:
        room = min(room, limits.written_by_beams(len(new.prompt), found.num_beams))
    return dataclasses.replace(new, params=dataclasses.replace(new.params, max_tokens=min(new.params.max_tokens, room)))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    asked=st.lists(ASKED, min_size=1, max_size=5),
    blocks=st.sampled_from([13, 16, 24, 64]),
    slots=st.sampled_from([4, 5, 8]),
    kept=st.sampled_from([None, None, 0, 3]),
    drafts=st.booleans(),
    run_ahead=st.booleans(),
    changes=st.fixed_dictionaries({
        "prefix_cache_mode": st.sampled_from(["radix", "disable"]),
        "prefill_mode": st.sampled_from(["hybrid", "chunked"]),
        "prefill_chunk_size": st.sampled_from([3, 16]),
    }),
)  # fmt: skip
def test_searches_find_what_they_find_alone(
    asked: list[dict[str, Any]],
    blocks: int,
    slots: int,
    kept: int | None,
    drafts: bool,
    run_ahead: bool,
    changes: dict[str, Any],
) -> None:
    """Beside each other and others, in too little memory, with whatever else the engine does meanwhile."""
    make = (lambda model: Guesser(model, 1)) if drafts else None
    loader = ScriptedLoader(
        lambda prompt, branch: [97 + branch] * 9,
        tokenizer=ByteTokenizer(),
        kept_states=kept,
        drafted_states=16,
        make_drafter=make,
        run_ahead=run_ahead,
    )
    case = Case(loader)
    speculation = {"speculative_mode": "ngram", "spec_draft_length": 2} if drafts else {}
    case.load(max_total_sequence_length=4 * blocks, max_num_sequence=slots, **changes, **speculation)
    news = []
    for given_ in asked:
        found, branches = given_["search"], given_["branches"]
        new = case.new(
            given_["prompt"],
            search=found,
            n=branches if found is None else min(branches, found.num_beams),
            max_tokens=given_["max_tokens"],
            min_tokens=min(given_["min_tokens"], given_["max_tokens"]),
            priority=given_["priority"],
        )
        new = fitting(new, case.model.limits)
        case.give(case.adding(new))
        news.append(new)
        case.step(given_["after"])
    case.run(2000)
    for new in news:
        error = case.box.ends[new.number].error
        assert error is None, error
        got = texts(case, new.number, new.params.n)
        if not new.params.max_tokens:
            assert not any(got)
        elif new.params.search is None:
            assert all(text[:9] == ([97 + branch] * 9)[: new.params.max_tokens] for branch, text in enumerate(got))
        else:
            assert got == found_by(new, new.params.max_tokens)
            assert case.usage(new.number).completion_tokens == sum(map(len, got))
    case.check()
    assert case.pool.num_used == 0


def test_one_that_is_preempted_begins_anew_and_finds_the_same() -> None:
    case = loaded(answer("c" * 40), max_total_sequence_length=4 * 14)
    other = case.add("b" * 16, max_tokens=36)
    new = case.new("abab", max_tokens=12, min_tokens=12, **search(4, n=4))
    case.give(case.adding(new))
    case.run()
    assert case.usage(new.number).preemptions > 0 and case.usage(other).preemptions == 0
    assert case.core.scheduler is not None
    assert case.core.scheduler.num_preemptions == case.usage(new.number).preemptions
    assert texts(case, new.number, 4) == found_by(new, 12)
    assert case.text(other) == "c" * 36


def test_nothing_is_told_before_the_end_and_then_the_best_first() -> None:
    case = loaded(tokenizer=False)
    new = case.new("abc", max_tokens=9, min_tokens=6, num_logprobs=2, **search(4, n=3, length_penalty=2.0))
    case.give(case.adding(new))
    steps = 0
    while not case.ended(new.number):
        assert not case.box.tokens and not case.box.branch_ends
        case.step()
        steps += 1
    assert steps >= 6
    assert texts(case, new.number, 3) == found_by(new, 9)
    scores = []
    for branch in range(3):
        end, entries = case.box.branch_ends[new.number, branch], case.box.logprobs[new.number, branch]
        assert all(len(entry.top_ids) == 2 for entry in entries)
        assert end.score == pytest.approx(math.fsum(entry.logprob for entry in entries) / len(entries) ** 2, rel=1e-6)
        scores.append(end.score)
    assert scores == sorted(scores, reverse=True)
    assert case.usage(new.number).first_token_seconds is not None
    assert case.core.counters.generation_tokens == sum(map(len, texts(case, new.number, 3)))
    best = case.reason(new.number)
    assert {name: count for name, count in case.core.counters.requests.items() if count} == {str(best): 1}


def test_fewer_texts_than_were_asked_for_leave_branches_empty() -> None:
    case = loaded()
    new = case.new("a", max_tokens=1, min_tokens=1, **search(4, n=4))
    case.give(case.adding(new))
    case.run()
    got = texts(case, new.number, 4)
    assert got == found_by(new, 1) and [len(text) for text in got] == [1, 1, 1, 0]
    assert case.box.branch_ends[new.number, 3].score is None and case.box.ends[new.number].error is None


def test_one_that_ends_by_length_counts_as_that_and_has_a_first_token_only_with_tokens() -> None:
    case = loaded()
    number = case.add("abab", max_tokens=2, min_tokens=2, **search(2))
    case.run()
    nothing = case.add("abab", max_tokens=0, **search(2))
    case.run()
    assert case.core.counters.requests["length"] == 2 and not case.box.logprobs
    assert case.usage(number).first_token_seconds is not None and case.usage(nothing).first_token_seconds is None


def test_it_begins_when_there_is_a_block_for_each_beam() -> None:
    """Or it would be preempted at once, or others."""
    case = loaded(answer("c" * 40), max_total_sequence_length=4 * 8)
    other = case.add("b" * 15, max_tokens=4)
    case.step()
    number = case.add("ab", max_tokens=3, min_tokens=3, **search(4))
    case.step()
    assert case.core.requests._requests[number].started_at is None
    case.run()
    assert case.usage(other).preemptions == case.usage(number).preemptions == 0 and case.tokens(number)


def test_nothing_of_former_weights_is_left_in_the_cache() -> None:
    case = loaded()
    number = case.add("abab" * 2, max_tokens=12, min_tokens=12, **search(3))
    case.step(3)
    case.ask(lambda to: ins.UpdateWeights({"w": 1}, to))
    case.run()
    assert len(case.tokens(number)) == 12 and case.usage(number).preemptions == 0
    assert case.pool.num_cached == case.pool.num_used == 0


def test_beams_share_the_blocks_of_what_they_have_in_common() -> None:
    case = loaded(max_total_sequence_length=400, max_single_sequence_length=200)
    case.give(case.adding(case.new("ab" * 32, max_tokens=3, min_tokens=3, **search(4))))
    case.step(5)
    assert case.core.scheduler is not None and case.core.scheduler.num_running == 4
    assert case.pool.num_used == 16 + 4


def test_it_begins_when_all_beams_have_a_place() -> None:
    """Others go on meanwhile; and who comes after it does not go before it."""
    case = loaded(max_num_sequence=4)
    running = [case.add("b", max_tokens=length) for length in (9, 4)]
    new = case.new("a", max_tokens=3, min_tokens=3, **search(3))
    case.give(case.adding(new))
    later = case.add("c", max_tokens=1)
    case.step()
    assert case.core.scheduler is not None and case.core.scheduler.num_running == 2
    while not case.ended(running[1]):
        assert not case.ended(later)
        case.step()
    case.step()
    assert case.core.scheduler.num_running == 4 - case.ended(later)
    case.run()
    assert texts(case, new.number, 1) == found_by(new, 3)


@pytest.mark.parametrize("ahead", [False, True])
def test_one_that_is_aborted_tells_the_best_that_it_has(ahead: bool) -> None:
    """A text that has come to its end keeps its reason; the others are as far as they came."""
    case = loaded(run_ahead=ahead)
    new = case.new("abab", max_tokens=40, **search(4, early_stopping="never", n=3))
    case.give(case.adding(new))
    request = case.core.requests._requests[new.number]
    while request.search is None or sum(text.finish_reason is not None for text in request.search.best(3)) != 1:
        case.step()
        assert not case.ended(new.number)
    case.abort(new.number)
    reasons = [case.reason(new.number, branch) for branch in range(3)]
    assert reasons == [FinishReason.STOP, FinishReason.ABORT, FinishReason.ABORT]
    got = texts(case, new.number, 3)
    assert all(got) and case.usage(new.number).completion_tokens == sum(map(len, got))
    case.check()
    assert case.pool.num_used == 0 and not case.core.runnable


def test_one_that_ends_between_two_steps_leaves_no_state_to_copy() -> None:
    case = loaded(kept_states=3)
    number = case.add("abab", max_tokens=9, min_tokens=9, **search(3))
    case.step()
    case.abort(number)
    case.check()
    assert case.pool.num_used == 0


def test_a_deadline_gives_what_was_found_until_then() -> None:
    case = loaded()
    new = case.new("abab", max_tokens=40, min_tokens=40, deadlines=Deadlines(total=5), **search(2))
    case.give(case.adding(new))
    case.step(4)
    case.now += 6
    case.step()
    assert isinstance(case.box.ends[new.number].error, DeadlineExceededError)
    assert len(case.tokens(new.number)) == 4 and case.reason(new.number) is FinishReason.ABORT


def test_a_failed_step_ends_it_and_others_go_on() -> None:
    case = loaded()
    number = case.add("abab", max_tokens=9, min_tokens=9, **search(3, n=2))
    case.step(3)
    case.model.fail_next(ValueError("a fault"))
    case.step()
    assert isinstance(case.box.ends[number].error, StepError)
    assert {case.reason(number, branch) for branch in range(2)} == {FinishReason.ERROR}
    assert case.pool.num_used == 0
    new = case.new("abab", max_tokens=9, min_tokens=9, **search(3, n=2))
    case.give(case.adding(new))
    case.run()
    assert texts(case, new.number, 2) == found_by(new, 9)


def test_what_depends_on_the_tokens_is_told_which_beam_has_which() -> None:
    """The model is given the tokens of each beam in each step, where penalties, grammars or processors want them."""
    case = loaded()
    placed: dict[int, list[int]] = {}
    place = case.model.place

    def noted(slot: int, params: Any, branch: int, prompt: Any, output: Any) -> None:
        placed[slot] = [*prompt.tolist(), *output.tolist()]
        place(slot, params, branch, prompt, output)

    case.model.place = noted  # type: ignore[method-assign]
    number = case.add("ab", max_tokens=9, min_tokens=9, repetition_penalty=1.5, **search(3))
    case.step()
    request = case.core.requests._requests[number]
    for _ in range(5):
        case.step()
        assert case.core.scheduler is not None
        for beam in request.branches:
            assert placed[beam.slot] == case.core.scheduler.tokens_of(beam).tolist()

    def refuse(*given_: Any) -> None:
        raise ValueError("a refusal")

    case.model.place = refuse  # type: ignore[method-assign]  # of every beam, and it ends once
    case.step()
    assert isinstance(case.box.ends[number].error, RequestDroppedError)
    assert case.pool.num_used == 0


def test_one_of_which_a_beam_cannot_be_drawn_ends_beside_drafts_too() -> None:
    loader = ScriptedLoader(answer("c" * 30), tokenizer=ByteTokenizer(), make_drafter=lambda model: Guesser(model, 1))
    case = Case(loader)
    case.load(speculative_mode="ngram", spec_draft_length=2)
    other = case.add("b", max_tokens=20)
    number = case.add("ab", max_tokens=9, min_tokens=9, **search(3))
    case.step(2)
    slots = [beam.slot for beam in case.core.requests._requests[number].branches]
    execute = case.model.execute

    def failing(batch: Any) -> Any:
        if batch.draft_lengths is None:
            return execute(batch)
        [row] = [row for row, slot in enumerate(batch.sample_slots.tolist()) if slot == slots[1]]
        return dataclasses.replace(execute(batch), failed={row: ValueError("a fault")})

    case.model.execute = failing  # type: ignore[method-assign]
    while not case.ended(number):
        case.step()
    case.model.execute = execute  # type: ignore[method-assign]
    assert isinstance(case.box.ends[number].error, RequestDroppedError)
    case.run()
    assert case.text(other) == "c" * 20


def test_what_depends_on_no_tokens_is_placed_once() -> None:
    case = loaded()
    number, calls = case.add("ab", max_tokens=9, min_tokens=9, **search(3)), []
    place = case.model.place
    case.model.place = lambda *given_: (calls.append(given_), place(*given_))[1]  # type: ignore[method-assign]
    case.run()
    assert len(calls) == 3 and case.ended(number)


@pytest.mark.parametrize(("size", "slots", "fits"), [(64, 4, True), (64, 3, False), (20, 4, False)])
def test_one_is_carried_over_a_reload_where_its_beams_fit(size: int, slots: int, fits: bool) -> None:
    case = loaded()
    new = case.new("ab" * 4, max_tokens=9, min_tokens=9, **search(4, n=2))
    case.give(case.adding(new))
    case.step(3)
    case.load(in_flight="carry", max_total_sequence_length=size, max_num_sequence=slots)
    case.run()
    if fits:
        assert texts(case, new.number, 2) == found_by(new, 9)
    else:
        error = case.box.ends[new.number].error
        assert isinstance(error, InvalidRequestError) and "4 beams do not fit the new model" in str(error)


def test_one_that_is_carried_to_a_model_of_shorter_texts_ends_sooner() -> None:
    case = loaded()
    new = case.new("ab" * 4, max_tokens=9, min_tokens=9, **search(4))
    case.give(case.adding(new))
    case.step(3)
    case.load(in_flight="carry", max_single_sequence_length=12)
    case.run()
    assert texts(case, new.number, 1) == found_by(new, 4) and case.reason(new.number) is FinishReason.LENGTH


def test_a_prompt_that_comes_in_pieces_may_be_searched_behind() -> None:
    case = loaded()
    number = case.open(max_tokens=6, min_tokens=6, **search(3, n=2))
    case.piece(number, "abab" * 3)
    case.step(3)
    request = case.core.requests._requests[number]
    assert request.branches[0].state is SequenceState.HELD
    case.piece(number, "ba", last=True)
    case.run()
    new = case.new("abab" * 3 + "ba", max_tokens=6, min_tokens=6, **search(3, n=2))
    assert texts(case, number, 2) == found_by(new, 6)


@pytest.mark.parametrize(("first", "last"), [(20, 2), (0, 40), (4, 40)])
def test_behind_a_prompt_that_came_in_pieces_as_much_is_written_as_there_is_room_for(first: int, last: int) -> None:
    """How long the prompt would be was not known when it was said how much may be written."""
    case = loaded(max_total_sequence_length=64)
    number = case.open(max_tokens=16, min_tokens=16, **search(4))
    if first:
        case.piece(number, "ab" * (first // 2))
        case.step(3)
    case.piece(number, "ab" * (last // 2), last=True)
    case.run()
    room = case.model.limits.written_by_beams(first + last, 4)
    assert len(case.tokens(number)) == room < 16 and case.reason(number) is FinishReason.LENGTH
    assert case.box.ends[number].error is None and case.usage(number).preemptions == 0


def test_a_prompt_that_came_in_pieces_and_leaves_no_room_for_beams_is_refused() -> None:
    case = loaded(max_total_sequence_length=64)
    number = case.open(max_tokens=16, **search(4))
    case.piece(number, "ab" * 16)
    case.piece(number, "ab" * 10)
    assert isinstance(case.box.ends[number].error, InvalidRequestError)


def test_beams_that_pinned_prompts_leave_no_room_for_end_with_what_they_have() -> None:
    """To begin anew would bring them no further."""
    case = loaded(max_total_sequence_length=64)
    case.add("c" * 24, max_tokens=0, pin="p")
    case.run()
    number = case.add("ab" * 4, max_tokens=12, min_tokens=12, **search(4, n=2))
    case.run()
    assert isinstance(error := case.box.ends[number].error, StepError)
    assert "its 4 beams need more than the 10 of 16 blocks that are not pinned" in str(error)
    for branch in range(2):
        assert len(case.tokens(number, branch)) == 9 and case.reason(number, branch) is FinishReason.ERROR
    assert case.add("ab" * 4, max_tokens=8, min_tokens=8, **search(4)) and case.run() < 12


def test_a_prompt_that_is_pinned_meanwhile_may_leave_no_room_to_part() -> None:
    case = loaded(max_total_sequence_length=64, prefill_chunk_size=3)
    case.add("c" * 40, max_tokens=0)
    case.run()
    number = case.add("ab" * 9, max_tokens=6, **search(4))
    case.step()
    assert case.core.scheduler is not None
    case.core.scheduler.blocks.tree.pin("p", prompt_of("c" * 40))
    case.run()
    assert isinstance(error := case.box.ends[number].error, StepError) and "its 4 beams need more than" in str(error)


def test_others_run_ahead_while_it_waits_for_places() -> None:
    case = loaded(answer("c" * 40), run_ahead=True, max_num_sequence=4)
    case.add("b", max_tokens=30)
    case.add("b", max_tokens=30)
    case.add("a", max_tokens=3, **search(3))
    case.step(3)
    assert case.core.stepping.under_way


def test_sleep_weights_and_a_pause_change_nothing_of_what_is_found() -> None:
    case = loaded()
    new = case.new("abab", max_tokens=9, min_tokens=9, **search(3, n=3))
    case.give(case.adding(new))
    case.step(3)
    case.ask(ins.Sleep)
    case.ask(ins.Wake)
    assert case.core.requests._requests[new.number].preemptions == 1
    case.step(3)
    case.ask(lambda to: ins.UpdateWeights({"w": 1}, to))
    case.step(1)
    case.ask(ins.Pause)
    case.ask(ins.Resume)
    case.run()
    assert texts(case, new.number, 3) == found_by(new, 9)


def test_of_equal_texts_the_first_goes_before_and_what_may_not_go_on_has_ended() -> None:
    found = BeamSearch(params(**search(2)))
    assert found.advance({0: TokenLogprobs(-1.0, (6, 5), (-1.0, -1.0))}, 9) == [Choice(0, 6), Choice(0, 5)]
    found.go_on([0, 1])
    stuck, other = TokenLogprobs(0.0, (), ()), TokenLogprobs(-0.5, (7,), (-0.5,))
    assert found.advance({0: stuck, 1: other}, 9) == [Choice(1, 7)]
    assert [text.score for text in found.best(3)] == [-1.0, -1.0, -1.0]  # before it is known what the choices became
    found.go_on([1])
    ended, under_way = found.best(2)
    assert (ended.token_ids, ended.score, ended.stop_reason) == ([6], -1.0, None)
    assert ended.finish_reason is FinishReason.STOP and under_way.finish_reason is None
    assert (under_way.token_ids, under_way.score) == ([5, 7], -0.75)


def test_a_search_is_over_when_its_beams_are_as_likely_as_the_texts_and_not_likelier() -> None:
    for logprob, over in ((-0.5, True), (-0.25, False)):
        found = BeamSearch(params(**search(2, length_penalty=0.0)))
        found.advance({0: TokenLogprobs(-1.0, (EOS, 6, 5), (-1.0, -1.0, -1.0))}, 9)
        found.go_on([0, 1])
        beams = {0: TokenLogprobs(0.0, (7,), (logprob,)), 1: TokenLogprobs(0.0, (EOS,), (-0.5,))}
        assert (found.advance(beams, 9) == []) == over


def test_one_that_favours_short_texts_hopes_for_no_longer_ones() -> None:
    """As transformers has it: with "never", too, what a beam can become is told by its present length then."""
    found = BeamSearch(params(**search(2, length_penalty=-1.0, early_stopping="never")))
    found.advance({0: TokenLogprobs(-0.25, (6, EOS, 5), (-0.25, -1.0, -1.25))}, 9)
    found.go_on([0, 1])
    beams = {0: TokenLogprobs(0.0, (7, EOS), (-0.25, -0.5)), 1: TokenLogprobs(0.0, (8,), (-1.0,))}
    assert found.advance(beams, 9) == [Choice(0, 7), Choice(1, 8)]
    assert [text.score for text in found.best(2)] == [-1.0, -1.5]


def test_how_much_beams_may_write() -> None:
    """They share the whole blocks of a prompt: of 10 of 4 tokens, one of 6 tokens leaves 9, which is 4 for each."""
    limits = Limits(8, 64, 16, page_size=4, num_blocks=10)
    assert limits.written_by_beams(6, 2) == 4 * 4 - 2
    assert limits.written_by_beams(8, 2) == 4 * 4
    assert limits.written_by_beams(6, 8) == 4 - 2
    assert limits.written_by_beams(7, 10) < 1
