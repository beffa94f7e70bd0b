"""When a model is warmed up: never before anything else, one piece at a time, and at no cost to whoever is served."""

from __future__ import annotations

from typing import Any

import pytest

from asyncengine import WarmUp
from asyncengine import instructions as ins
from asyncengine.outputs import FinishReason
from asyncengine.state import EngineState
from asyncengine.step.warming import QUIET_SECONDS
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from asyncengine.testing.scripted import DeviceLostError
from asyncengine.testing.warming import ScriptedWarmUp

from .core_case import Case, config


def case_of(pieces: int = 3, **loader: Any) -> Case:
    case = Case(ScriptedLoader(tokenizer=ByteTokenizer(), warm_up_pieces=pieces, **loader))
    case.load()
    return case


def warm_up_of(case: Case) -> ScriptedWarmUp:
    return case.loader.warm_ups[-1]


def done(case: Case) -> int:
    return case.core.metrics().warm_up_pieces_done


def served(case: Case) -> int:
    """Serves one request; returns its number."""
    number = case.add("hello")
    case.run()
    assert case.ended(number)
    return number


def pass_quietly(case: Case) -> None:
    """Lets so much time pass without anything to do that a piece is due."""
    if not case.core.runnable:
        case.step()  # it finds nothing to do
    case.now += QUIET_SECONDS


def test_pieces_are_done_one_at_a_time_and_then_no_more() -> None:
    case = case_of(3)
    pass_quietly(case)
    for count in (1, 2, 3):
        assert case.core.warming.progress.goes_on
        assert case.core.warming.advance()
        assert (done(case), case.core.metrics().warm_up_pieces) == (count, 3)
    assert case.core.warming.progress == WarmUp(3, 3, False)
    assert not case.core.warming.advance()
    assert case.core.next_deadline is None


def test_a_model_without_a_warm_up_waits_for_instructions_alone() -> None:
    case = case_of(0)
    pass_quietly(case)
    assert case.core.next_deadline is None
    assert not case.core.warming.advance()
    assert case.core.metrics().warm_up_pieces == 0


def test_nothing_is_done_before_it_was_quiet_for_a_moment() -> None:
    """Or else clients that ask one question after the other would find a piece under way each time."""
    case = case_of()
    case.step()
    due = case.core.next_deadline
    assert due == case.now + QUIET_SECONDS
    assert not case.core.warming.advance()
    case.now += QUIET_SECONDS / 2
    case.step()
    assert case.core.next_deadline == due
    served(case)
    assert case.core.next_deadline == case.now + QUIET_SECONDS
    case.now = due
    case.step()
    assert not case.core.warming.advance()
    pass_quietly(case)
    assert case.core.warming.advance()


def test_an_instruction_is_something_to_do() -> None:
    case = case_of()
    pass_quietly(case)
    case.ask(lambda to: ins.Unpin("nobody", to))
    case.step()
    assert not case.core.warming.advance()
    assert case.core.next_deadline == case.now + QUIET_SECONDS


@pytest.mark.parametrize("run_ahead", [False, True])
def test_never_while_there_is_a_request(run_ahead: bool) -> None:
    case = case_of(run_ahead=run_ahead)
    number = case.add("hello")
    while not case.ended(number):
        pass_quietly(case)
        assert not case.core.warming.advance()
        assert case.core.next_deadline is None
        case.step()
    assert done(case) == 0
    case.run()
    pass_quietly(case)
    assert case.core.warming.advance()


def test_never_while_a_step_is_under_way_though_its_request_is_gone() -> None:
    case = case_of(run_ahead=True)
    number = case.add("hello")
    case.step(2)
    case.abort(number)
    assert case.core.stepping.under_way and not len(case.core.requests)
    pass_quietly(case)
    assert case.core.next_deadline is None and not case.core.warming.advance()
    case.run()
    pass_quietly(case)
    assert case.core.warming.advance()


def test_a_prompt_that_is_still_coming_is_a_request() -> None:
    case = case_of()
    number = case.open()
    pass_quietly(case)
    assert not case.core.runnable and not case.core.warming.advance()
    case.abort(number)
    pass_quietly(case)
    assert case.core.warming.advance()


@pytest.mark.parametrize("make", [ins.Pause, ins.Sleep, ins.Unload])
def test_an_engine_that_was_told_to_rest_rests(make: Any) -> None:
    case = case_of()
    case.ask(make)
    pass_quietly(case)
    assert case.core.next_deadline is None and not case.core.warming.advance()


@pytest.mark.parametrize(("rest", "back"), [(ins.Pause, ins.Resume), (ins.Sleep, ins.Wake)])
def test_and_goes_on_afterwards(rest: Any, back: Any) -> None:
    case = case_of()
    pass_quietly(case)
    case.core.warming.advance()
    case.ask(rest)
    case.ask(back)
    pass_quietly(case)
    assert case.core.warming.advance()
    assert done(case) == 2


def test_reset_drain_and_new_weights_change_nothing() -> None:
    case = case_of()
    pass_quietly(case)
    case.core.warming.advance()
    case.ask(ins.Reset)
    case.ask(lambda to: ins.UpdateWeights({"w": 1}, to))
    drained = case.call(ins.Drain)
    case.step()
    assert case.answered(drained) and case.core.state is EngineState.READY
    pass_quietly(case)
    assert case.core.warming.advance()
    assert done(case) == 2


def test_nothing_is_done_while_another_model_is_loaded_and_then_that_one_is_warmed_up() -> None:
    case = case_of()
    old = warm_up_of(case)
    case.call(lambda to: ins.Reload(config("other"), "abort", to))
    pass_quietly(case)
    assert not case.core.warming.advance()
    case.run_jobs()
    assert case.core.state is EngineState.READY
    pass_quietly(case)
    assert case.core.warming.advance()
    assert (old.warmth.done, warm_up_of(case).warmth.done) == (0, 1)


def test_a_piece_that_raises_ends_the_warm_up_and_nothing_else() -> None:
    case = case_of()
    warm_up_of(case).fail_next(MemoryError("no room"))
    pass_quietly(case)
    assert case.core.warming.advance()
    progress = case.core.warming.progress
    assert (progress.done, progress.of, progress.goes_on) == (0, 3, False)
    assert progress.notes == ("the model's warm-up failed and goes no further: MemoryError('no room')",)
    assert case.core.stepping_since is None
    assert case.core.next_deadline is None and not case.core.warming.advance()
    assert case.reason(served(case)) is FinishReason.STOP
    case.load("other")
    assert case.core.warming.progress == WarmUp(0, 3, True)


def test_after_a_sleep_it_begins_anew_though_a_piece_had_failed() -> None:
    case = case_of()
    warm_up_of(case).fail_next(MemoryError("no room"))
    pass_quietly(case)
    assert case.core.warming.advance() and not case.core.warming.progress.goes_on
    case.ask(ins.Sleep)
    case.ask(ins.Wake)
    pass_quietly(case)
    assert case.core.warming.advance()
    assert case.core.warming.progress == WarmUp(1, 3, True)


def test_a_device_that_is_lost_meanwhile_is_noticed_at_once() -> None:
    case = case_of()
    warm_up_of(case).fail_next(DeviceLostError("lost"))
    pass_quietly(case)
    case.core.warming.advance()
    assert case.core.state is EngineState.FAILED


def test_each_piece_is_in_the_trace() -> None:
    case = case_of(2)
    case.core.trace.start()
    pass_quietly(case)
    while case.core.warming.advance():
        pass
    spans = [event for event in case.core.trace.events() if event["name"] == "warm-up"]
    assert [span["args"] for span in spans] == [
        {"piece": "piece 1", "done": 1, "of": 2},
        {"piece": "piece 2", "done": 2, "of": 2},
    ]
