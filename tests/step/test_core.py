"""The core driven by hand: instructions in, events out, one step at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from asyncengine import instructions as ins
from asyncengine.errors import (
    AsyncEngineError,
    DeadlineExceededError,
    EngineClosedError,
    EngineDrainingError,
    EngineFailedError,
    EngineOverloadedError,
    IllegalStateError,
    InvalidRequestError,
    ModelNotLoadedError,
    ReloadError,
    RequestDroppedError,
    StepError,
)
from asyncengine.instructions import Deadlines, JobDone, ReplyTo
from asyncengine.outputs import FinishReason
from asyncengine.state import TRANSITIONS, Action, EngineState, next_state
from asyncengine.step.batch import StepBatch, StepTokens
from asyncengine.testing import ScriptedLoader

from .core_case import EOS, Box, Case, answer, config, loaded

Make = Callable[[ReplyTo], ins.Instruction]

ASKED: dict[Action, Make] = {
    Action.RELOAD: lambda to: ins.Reload(config("other"), "abort", to),
    Action.UNLOAD: ins.Unload,
    Action.RESET: ins.Reset,
    Action.PAUSE: ins.Pause,
    Action.RESUME: ins.Resume,
    Action.SLEEP: ins.Sleep,
    Action.WAKE: ins.Wake,
    Action.UPDATE_WEIGHTS: lambda to: ins.UpdateWeights({"a": 1}, to),
    Action.DEBUG_CALL: lambda to: ins.DebugCall("device_lost", (None,), to),
    Action.DRAIN: ins.Drain,
    Action.RESTART: ins.Restart,
    Action.SHUTDOWN: lambda to: ins.Shutdown(0.0, to),
}


def in_state(state: EngineState) -> Case:
    """A core in a state; with a request that has begun wherever that is possible."""
    if state is EngineState.UNLOADED:
        return Case(ScriptedLoader())
    case = loaded()
    case.add("some prompt")
    case.step(2)
    match state:
        case EngineState.PAUSED:
            case.ask(ins.Pause)
        case EngineState.SLEEPING:
            case.ask(ins.Sleep)
        case EngineState.DRAINING:
            case.call(ins.Drain)
        case EngineState.FAILED:
            case.add("another prompt")
            case.model.lose_device()
            case.step()
        case EngineState.CLOSED:
            case.shutdown()
        case _:
            assert state is EngineState.READY
    assert case.state is state
    return case


STATES = [state for state in EngineState if state is not EngineState.LOADING]
ILLEGAL = [(action, state) for action in ASKED for state in STATES if state not in TRANSITIONS[action]]


class TestEveryInstructionInEveryState:
    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("action", ASKED)
    def test_obeys_the_table(self, state: EngineState, action: Action) -> None:
        case = in_state(state)
        ticket = case.call(ASKED[action])
        case.check()
        after = TRANSITIONS[action].get(state)
        if action is Action.DRAIN and after is not None:
            assert not case.answered(ticket) and case.state is EngineState.DRAINING
        elif after is EngineState.LOADING:
            assert not case.answered(ticket) and case.state is EngineState.LOADING and case.jobs
        elif after is not None:
            case.answer(ticket)
            assert case.state is after
        else:
            with pytest.raises(AsyncEngineError) as expected:
                next_state(action, state)
            error = case.error(ticket)
            assert type(error) is type(expected.value)
            assert str(error) == str(expected.value)

    @pytest.mark.parametrize(("action", "state"), ILLEGAL)
    def test_an_illegal_one_changes_nothing(self, state: EngineState, action: Action) -> None:
        case = in_state(state)
        before = case.core.metrics(), case.core.view, case.core.requests.request_ids(), len(case.box.log)
        case.call(ASKED[action])
        after = case.core.metrics(), case.core.view, case.core.requests.request_ids(), len(case.box.log) - 1
        assert before == after
        assert case.state is state

    @pytest.mark.parametrize(
        ("state", "error"),
        [
            (EngineState.UNLOADED, ModelNotLoadedError),
            (EngineState.DRAINING, EngineDrainingError),
            (EngineState.FAILED, EngineFailedError),
            (EngineState.CLOSED, EngineClosedError),
        ],
    )
    def test_requests_are_refused_with_a_reason(self, state: EngineState, error: type[Exception]) -> None:
        case = in_state(state)
        new = case.new("x")
        ticket = case.call(lambda to: case.adding(new, to=to))
        assert type(case.error(ticket)) is error
        case.check()

    @pytest.mark.parametrize("state", [EngineState.READY, EngineState.PAUSED, EngineState.SLEEPING])
    def test_requests_are_taken(self, state: EngineState) -> None:
        case = in_state(state)
        number = case.add("x")
        assert not case.ended(number)

    @pytest.mark.parametrize("state", STATES)
    def test_abort_is_always_answered(self, state: EngineState) -> None:
        case = in_state(state)
        case.abort(1, 2, 99)
        assert not len(case.core.requests)
        case.check()

    @pytest.mark.parametrize("state", STATES)
    def test_unpin_is_always_answered(self, state: EngineState) -> None:
        assert in_state(state).ask(lambda to: ins.Unpin("none", to)) is False

    def test_instructions_without_an_address_are_executed(self) -> None:
        case = loaded()
        case.give(ins.Pause(), ins.Wake(), ins.Unload())
        assert case.state is EngineState.UNLOADED


class TestOrder:
    def test_instructions_are_executed_in_the_order_given(self) -> None:
        case = loaded()
        tickets = [case.reply_to() for _ in range(4)]
        case.give(ins.Pause(tickets[0]), ins.Drain(tickets[1]), ins.Resume(tickets[2]), ins.Drain(tickets[3]))
        assert type(case.error(tickets[1].ticket)) is IllegalStateError
        case.step()
        assert [reply for reply in case.box.replies][-4:] == [to.ticket for to in tickets]

    def test_all_pending_ones_come_before_the_step(self) -> None:
        case = loaded()
        new = case.new("abc")
        case.give(case.adding(new), ins.AbortRequests((new.number,)))
        steps = case.model.steps
        case.step()
        assert case.model.steps == steps
        assert case.tokens(new.number) == []
        assert case.reason(new.number) == "abort"

    def test_an_instruction_that_arrives_in_a_step_waits_for_its_end(self) -> None:
        case = loaded()
        number = case.add("abcdef")
        case.step()
        case.step(pending=[ins.Pause()])
        assert case.state is EngineState.READY
        case.step()
        assert case.state is EngineState.PAUSED
        assert len(case.tokens(number)) == 2

    def test_instructions_that_arrived_in_a_step_go_before_later_ones(self) -> None:
        case = loaded()
        case.add("abcdef")
        case.step()
        first, second = case.new("x", request_id="same"), case.new("y", request_id="same")
        case.core.step(lambda: [case.adding(first)])
        to = case.reply_to()
        case.give(case.adding(second, to=to))
        assert isinstance(case.error(to.ticket), InvalidRequestError)
        assert case.core.requests.numbers_of(["same"]) == [first.number]

    def test_a_defect_in_one_instruction_does_not_stop_the_others(self) -> None:
        case = loaded()
        broken, fine = case.reply_to(), case.reply_to()
        case.give(ins.DebugCall("no_such_function", (), broken), ins.Pause(fine))
        assert isinstance(case.error(broken.ticket), AttributeError)
        assert case.answer(fine.ticket) is None

    def test_a_debug_call_that_exits_does_not_end_the_thread(self) -> None:
        case = loaded()

        def leave() -> None:
            raise SystemExit(3)

        case.model.leave = leave  # type: ignore[attr-defined]
        broken, fine = case.reply_to(), case.reply_to()
        case.give(ins.DebugCall("leave", (), broken), ins.Pause(fine))
        assert isinstance(case.error(broken.ticket), SystemExit)
        assert case.answered(fine.ticket)

    def test_a_debug_call_answers_with_its_results(self) -> None:
        case = loaded()
        assert case.ask(lambda to: ins.DebugCall("device_lost", (ValueError(),), to)) == [False]


class TestAbort:
    def test_between_execute_and_publish_takes_effect_before_publish(self) -> None:
        case = loaded()
        kept, aborted = case.add("abcdef"), case.add("ghijkl")
        case.step(2)
        case.step(pending=[ins.AbortRequests((aborted,))])
        assert case.text(aborted) == "gh"
        assert case.reason(aborted) == "abort"
        assert case.usage(aborted).completion_tokens == 2
        assert case.text(kept) == "abc"
        case.run()
        assert case.text(kept) == "abcdef"

    def test_of_a_prefill_between_execute_and_publish(self) -> None:
        case = loaded()
        number = case.add("abcdef", n=3)
        case.step(pending=[ins.AbortRequests((), ("r1",))])
        assert number == 1
        assert [case.tokens(number, branch) for branch in range(3)] == [[], [], []]
        assert [case.reason(number, branch) for branch in range(3)] == ["abort"] * 3
        assert case.pool.num_used == 0

    def test_of_everything_between_execute_and_publish(self) -> None:
        case = loaded()
        numbers = [case.add("abcdef") for _ in range(3)]
        case.step(2)
        case.step(pending=[ins.AbortRequests(tuple(numbers))])
        assert all(case.reason(number) == "abort" for number in numbers)
        steps = case.model.steps
        case.run()
        assert case.model.steps == steps

    def test_counts_only_what_was_delivered(self) -> None:
        case = loaded()
        numbers = [case.add("abcdef"), case.add("ghijkl")]
        case.step(2)
        case.step(pending=[ins.AbortRequests((numbers[0],))])
        case.run()
        delivered = sum(case.usage(number).completion_tokens for number in numbers)
        assert case.core.metrics().counters.generation_tokens == delivered

    def test_unknown_and_second_and_after_the_end_are_passed_over(self) -> None:
        case = loaded()
        number = case.add("ab")
        case.abort(number + 50)
        case.abort(number)
        case.abort(number)
        case.ask(lambda to: ins.AbortRequests((), ("r1", "nobody"), to))
        assert case.reason(number) == "abort"
        done = case.add("ab")
        case.run()
        case.abort(done)
        assert case.reason(done) == "stop"

    def test_matches_ids_exactly(self) -> None:
        case = loaded()
        long, short = case.add("abc", request_id="chat-12"), case.add("abc", request_id="chat-1")
        case.ask(lambda to: ins.AbortRequests((), ("chat-1",), to))
        assert case.ended(short) and not case.ended(long)

    def test_frees_the_blocks_before_it_is_answered(self) -> None:
        case = loaded(prefix_cache_mode="disable")
        number = case.add("abcdefgh" * 3)
        case.step()
        case.abort(number)
        assert case.pool.num_free == case.pool.num_blocks

    def test_branches_that_had_finished_keep_their_reason_and_blocks_are_freed_once(self) -> None:
        lengths = [1, 9, 9]
        case = loaded(lambda prompt, branch: [65 + branch] * lengths[branch])
        number = case.add("abcdef", n=3)
        case.step(4)
        assert case.reason(number, 0) == "stop"
        case.abort(number)
        case.check()
        assert [case.reason(number, branch) for branch in range(3)] == ["stop", "abort", "abort"]
        assert case.usage(number).completion_tokens == 2 + 4 + 4
        assert case.pool.num_used == 0

    def test_of_a_request_that_waits_in_the_queue(self) -> None:
        case = loaded(max_num_sequence=1)
        case.add("abcdef")
        waiting = case.add("ghijkl")
        case.step()
        case.abort(waiting)
        assert case.usage(waiting).completion_tokens == 0
        case.run()
        assert case.core.metrics().num_requests_waiting == 0

    def test_of_a_mailbox_that_nobody_reads_ends_its_requests_alone(self) -> None:
        case = loaded()
        gone = Box()
        new, kept = case.new("abcdef"), case.add("abcdef")
        queued = case.new("abc")
        case.give(ins.AddRequests((new, queued), 1, gone))
        gone.open = False
        case.step()
        assert case.core.requests.request_ids() == (f"r{kept}",)
        case.run()
        assert case.text(kept) == "abcdef"


class TestIds:
    def test_a_duplicate_is_refused_without_touching_the_first(self) -> None:
        case = loaded()
        first = case.add("abcdef", request_id="same")
        case.step(2)
        second = case.new("xyz", request_id="same")
        ticket = case.call(lambda to: case.adding(second, to=to))
        assert isinstance(case.error(ticket), InvalidRequestError)
        assert "'same'" in str(case.error(ticket))
        case.run()
        assert case.text(first) == "abcdef"
        assert not case.ended(second.number)

    def test_a_duplicate_within_one_instruction_refuses_all_of_it(self) -> None:
        case = loaded()
        news = [case.new("a", request_id="x"), case.new("b", request_id="y"), case.new("c", request_id="x")]
        ticket = case.call(lambda to: case.adding(*news, to=to))
        assert isinstance(case.error(ticket), InvalidRequestError)
        assert not len(case.core.requests)

    def test_a_duplicate_of_a_queued_request_is_refused(self) -> None:
        case = loaded(max_queue_size=1)
        case.add("a")
        queued = case.new("b", request_id="q")
        case.call(lambda to: case.adding(queued, to=to))
        ticket = case.call(lambda to: case.adding(case.new("c", request_id="q"), to=to))
        assert isinstance(case.error(ticket), InvalidRequestError)

    def test_may_be_used_again_after_the_end(self) -> None:
        case = loaded()
        case.add("a", request_id="x")
        case.run()
        again = case.add("b", request_id="x")
        case.run()
        assert case.text(again) == "b"

    def test_may_be_used_again_by_the_instruction_after_its_abort(self) -> None:
        case = loaded()
        case.add("abcdef", request_id="x")
        case.step()
        again = case.new("b", request_id="x")
        case.step(pending=[ins.AbortRequests((), ("x",)), case.adding(again)])
        case.run()
        assert case.text(again.number) == "b"


class TestAdmission:
    def full(self, size: int = 2) -> Case:
        """A core that steps nobody, with a full queue."""
        case = loaded(max_queue_size=size)
        case.ask(ins.Pause)
        for _ in range(size):
            case.add("ab")
        return case

    def test_refuses_at_once_where_the_caller_does_not_wait(self) -> None:
        case = self.full()
        ticket = case.call(lambda to: case.adding(case.new("c"), when_full="raise", to=to))
        assert isinstance(case.error(ticket), EngineOverloadedError)
        assert case.error(ticket).retryable
        assert case.core.metrics().counters.admission_rejections == 1
        case.check()

    def test_waiters_are_admitted_first_come_first_served(self) -> None:
        case = self.full()
        tickets = [case.call(lambda to: case.adding(case.new("cd"), to=to)) for _ in range(3)]
        assert not any(map(case.answered, tickets))
        assert case.core.metrics().num_requests_queued == 3
        case.ask(ins.Resume)
        case.run()
        answers = [ticket for ticket in case.box.replies if ticket in tickets]
        assert answers == tickets
        assert all(case.answer(ticket) is True for ticket in tickets)
        assert case.core.metrics().num_requests_queued == 0

    def test_a_newcomer_does_not_overtake_a_waiter(self) -> None:
        case = self.full(1)
        waiter = case.call(lambda to: case.adding(case.new("cd"), to=to))
        case.abort(1)
        ticket = case.call(lambda to: case.adding(case.new("c"), when_full="raise", to=to))
        assert isinstance(case.error(ticket), EngineOverloadedError)
        case.step()
        assert case.answered(waiter)

    def test_a_cancelled_waiter_loses_nothing_and_holds_nobody_up(self) -> None:
        case = self.full()
        cancelled, patient = case.new("cd"), case.new("ef")
        first = case.call(lambda to: case.adding(cancelled, to=to))
        second = case.call(lambda to: case.adding(patient, to=to))
        case.abort(cancelled.number)
        assert case.answer(first) is True
        assert case.reason(cancelled.number) == "abort"
        case.ask(ins.Resume)
        case.run()
        assert case.answer(second) is True
        assert case.text(patient.number) == "ef"
        assert case.tokens(cancelled.number) == []

    def test_all_or_none_of_one_instruction_is_refused(self) -> None:
        case = loaded(max_queue_size=3)
        case.ask(ins.Pause)
        case.add("a")
        news = [case.new("b") for _ in range(3)]
        ticket = case.call(lambda to: case.adding(*news, when_full="raise", to=to))
        assert isinstance(case.error(ticket), EngineOverloadedError)
        assert len(case.core.requests) == 1

    def test_more_than_the_queue_ever_takes_come_in_when_nobody_waits(self) -> None:
        case = loaded(max_queue_size=2)
        news = [case.new("b", max_tokens=1) for _ in range(5)]
        ticket = case.call(lambda to: case.adding(*news, when_full="raise", to=to))
        assert case.core.metrics().num_requests_queued == 3
        refused = case.call(lambda to: case.adding(case.new("c"), when_full="raise", to=to))
        assert isinstance(case.error(refused), EngineOverloadedError)
        case.run()
        assert case.answer(ticket) is True
        case.check()

    def test_a_waiter_is_admitted_when_a_single_step_ends_all_others(self) -> None:
        case = loaded(max_queue_size=1)
        case.add("a", max_tokens=1)
        waiter = case.new("b", max_tokens=1)
        ticket = case.call(lambda to: case.adding(waiter, to=to))
        case.run()
        assert case.answer(ticket) is True
        assert case.text(waiter.number) == "b"

    def test_a_waiter_is_admitted_when_a_failed_step_ends_all_others(self) -> None:
        case = loaded(max_queue_size=1)
        case.add("a")
        waiter = case.new("b")
        case.call(lambda to: case.adding(waiter, to=to))
        case.model.fail_next(ValueError("x"))
        case.run()
        assert case.text(waiter.number) == "b"

    def test_one_instruction_is_answered_when_its_last_request_is_admitted(self) -> None:
        case = loaded(max_queue_size=1)
        news = [case.new("ab") for _ in range(3)]
        ticket = case.call(lambda to: case.adding(*news, to=to))
        assert not case.answered(ticket)
        case.run()
        assert case.answer(ticket) is True
        assert [case.text(new.number) for new in news] == ["ab"] * 3

    def test_no_requests_are_answered_too(self) -> None:
        case = loaded()
        assert case.ask(lambda to: case.adding(to=to)) is True

    def test_requests_prepared_for_another_model_are_sent_back(self) -> None:
        case = loaded()
        new = case.new("a")
        assert case.ask(lambda to: case.adding(new, to=to, epoch=0)) is False
        assert not len(case.core.requests)

    def test_requests_that_queue_end_with_the_others(self) -> None:
        for make in (ins.Unload, ins.Reset, lambda to: ins.Shutdown(0.0, to)):
            case = self.full()
            queued = case.new("cd", n=2)
            ticket = case.call(lambda to, new=queued, case=case: case.adding(new, to=to))  # type: ignore[misc]
            case.ask(make)
            assert case.answered(ticket)
            assert [case.reason(queued.number, branch) for branch in range(2)] == ["abort"] * 2


class TestDeadlines:
    def test_in_the_queue(self) -> None:
        case = loaded(max_num_sequence=1)
        running = case.add("abcdef", deadlines=Deadlines(queue=5))
        waiting = case.add("ghi", deadlines=Deadlines(queue=5))
        case.step()
        assert case.core.next_deadline == 105
        case.now += 4.9
        case.step()
        assert not case.ended(waiting)
        case.now += 0.1
        case.step()
        assert isinstance(case.end_error(waiting), DeadlineExceededError)
        assert "queue deadline of 5 s" in str(case.end_error(waiting))
        assert case.reason(waiting) == "abort"
        case.run()
        assert case.text(running) == "abcdef"

    def test_to_the_first_token(self) -> None:
        case = loaded(prefill_chunk_size=4)
        slow = case.add("abcdefghijkl", deadlines=Deadlines(first_token=2))
        quick = case.add("ab", deadlines=Deadlines(first_token=2), priority=-1)
        case.step(2)
        case.now += 2
        case.step()
        assert isinstance(case.end_error(slow), DeadlineExceededError)
        case.run()
        assert case.reason(quick) == "stop"

    def test_in_total_delivers_what_there_is(self) -> None:
        case = loaded()
        number = case.add("abcdef", n=2, deadlines=Deadlines(total=3))
        case.step(3)
        case.now += 3
        case.step()
        assert case.text(number) == "abc"
        assert case.usage(number).completion_tokens == 6
        assert isinstance(case.end_error(number), DeadlineExceededError)
        assert isinstance(case.end_error(number), TimeoutError)
        assert case.core.next_deadline is None

    @pytest.mark.parametrize("instruction", [ins.Pause, ins.Sleep])
    def test_pass_while_nothing_is_stepped(self, instruction: Make) -> None:
        case = loaded()
        number = case.add("abcdef", deadlines=Deadlines(total=3))
        case.step()
        case.ask(instruction)
        case.now += 3
        case.step()
        assert isinstance(case.end_error(number), DeadlineExceededError)

    def test_pass_while_the_model_is_away(self) -> None:
        case = loaded(fits_beside=False)
        number = case.add("abcdef", deadlines=Deadlines(total=3))
        case.step(2)
        case.call(lambda to: ins.Reload(config("other"), "carry", to))
        case.run_job()
        assert case.core.scheduler is None
        case.now += 3
        case.step()
        assert case.usage(number).completion_tokens == 2
        case.run_jobs()
        assert not len(case.core.requests)

    def test_of_requests_that_have_ended_are_forgotten(self) -> None:
        case = loaded()
        for _ in range(300):
            case.add("a", max_tokens=1, deadlines=Deadlines(queue=1e6, first_token=1e6, total=1e6))
            case.run()
        assert len(case.core.requests._deadlines._heap) < 100
        assert case.core.next_deadline is None

    def test_pass_while_there_is_no_room(self) -> None:
        case = loaded(max_queue_size=1)
        case.ask(ins.Pause)
        case.add("a")
        patient = case.new("b", deadlines=Deadlines(queue=9))
        queued = case.new("c", deadlines=Deadlines(queue=1, total=5))
        tickets = [case.call(lambda to, new=new: case.adding(new, to=to)) for new in (patient, queued)]  # type: ignore[misc]
        assert case.core.next_deadline == 101
        case.now += 1
        case.step()
        assert [case.answered(ticket) for ticket in tickets] == [False, True]
        assert "queue deadline of 1 s" in str(case.end_error(queued.number))
        assert case.reason(queued.number) == "abort" and not case.ended(patient.number)
        assert case.core.next_deadline == 109
        case.ask(ins.Resume)
        case.run()
        assert case.text(patient.number) == "b"

    def test_count_from_before_the_admission(self) -> None:
        case = loaded(max_num_sequence=1)
        case.add("abcdef")
        early = case.add("g", deadlines=Deadlines(first_token=5, since=97))
        late = case.add("h", deadlines=Deadlines(first_token=5, since=90))
        case.step()
        assert isinstance(case.end_error(late), DeadlineExceededError) and not case.ended(early)
        case.now += 2
        case.step()
        assert isinstance(case.end_error(early), DeadlineExceededError)

    def test_pass_while_a_reload_holds_requests_up(self) -> None:
        case = loaded()
        case.call(lambda to: ins.Reload(config("other"), "abort", to))
        limits = [Deadlines(queue=3, total=2, since=100), Deadlines(total=4, since=100), Deadlines(since=100), None]
        held = [case.new("a", deadlines=each) for each in limits]
        tickets = [case.call(lambda to, new=new: case.adding(new, to=to)) for new in held]  # type: ignore[misc]
        assert case.core.next_deadline == 102
        case.abort(held[0].number)
        case.now += 2
        case.step()
        assert [case.answered(ticket) for ticket in tickets] == [True, False, False, False]
        assert isinstance(case.error(tickets[0]), DeadlineExceededError)
        assert "total deadline of 2 s" in str(case.error(tickets[0]))
        assert case.core.next_deadline == 104 and not case.core._cancelled
        case.run_jobs()
        case.step()
        case.run_jobs()
        assert [case.answer(ticket) for ticket in tickets[1:]] == [False] * 3  # it is another model
        assert case.core.next_deadline is None


class TestStepFailure:
    def test_ends_the_requests_of_the_batch_alone(self) -> None:
        case = loaded(max_num_sequence=2)
        running = [case.add("abcdef"), case.add("ghijkl")]
        waiting = case.add("mno")
        case.step(3)
        cause = ValueError("a bad kernel")
        case.model.fail_next(cause)
        case.step()
        for number in running:
            error = case.end_error(number)
            assert type(error) is StepError and error.retryable
            assert error.__cause__ is cause
            assert "a bad kernel" in str(error)
            assert case.reason(number) == "error"
            assert case.usage(number).completion_tokens == 3
        assert case.state is EngineState.READY
        case.run()
        assert case.text(waiting) == "mno"
        assert case.core.metrics().counters.failed_steps == 1

    def test_recomputes_those_that_were_not_in_the_batch(self) -> None:
        case = loaded(prefill_mode="chunked", prefill_chunk_size=4)
        decoding = case.add("abcdef")
        case.step(3)
        prefilling = case.add("ghijklmnop")
        case.step()
        case.model.fail_next(ValueError("x"))
        case.step()
        assert case.reason(prefilling) == "error"
        case.run()
        assert case.text(decoding) == "abcdef"
        assert case.usage(decoding).preemptions == 1

    def test_keeps_what_it_was_writing_out_of_the_prefix_cache(self) -> None:
        case = loaded()
        case.add("abcdefghijkl")
        case.model.fail_next(ValueError("x"))
        case.step()
        again = case.add("abcdefghijkl")
        case.run()
        assert case.usage(again).cached_tokens == 0
        assert case.text(again) == "abcdefghijkl"

    def test_keeps_what_had_been_generated_out_of_the_prefix_cache(self) -> None:
        case = loaded()
        case.add("abcdefghijkl")
        case.step(9)
        case.model.fail_next(ValueError("x"))
        case.step()
        assert case.pool.num_cached == 3  # the prompt, known since it was computed

    def test_with_forks_waiting_for_their_copy(self) -> None:
        case = loaded(prefill_mode="chunked", prefill_chunk_size=8)
        forked = case.add("abcde", n=3)
        case.add("xyzxyz")
        case.step()  # forks; the copies come with the next step
        case.add("uvw")
        case.model.fail_next(ValueError("x"))
        case.step()
        case.run()
        assert [case.text(forked, branch) for branch in range(3)] in (["abcde"] * 3, ["a"] * 3)

    def test_the_wrong_number_of_tokens_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded()
        number = case.add("abc")
        model, execute = case.model, case.model.execute

        def too_few(batch: StepBatch) -> StepTokens:
            monkeypatch.setattr(model, "execute", execute)
            return StepTokens(np.empty(0, dtype=np.int32))

        monkeypatch.setattr(model, "execute", too_few)
        case.step()
        error = case.end_error(number)
        assert isinstance(error, StepError)
        assert "drew 0 tokens; 1 were due" in str(error)
        again = case.add("abc")
        case.run()
        assert case.text(again) == "abc"

    def test_nothing_at_all_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded()
        number = case.add("abc")
        monkeypatch.setattr(case.model, "execute", lambda batch: None)
        case.step()
        assert isinstance(case.end_error(number), StepError)

    def test_aborts_and_deadlines_still_work_after_it(self) -> None:
        case = loaded(max_num_sequence=1)
        case.add("abc")
        aborted, late = case.add("def"), case.add("ghi", deadlines=Deadlines(total=1))
        case.model.fail_next(ValueError("x"))
        case.step()
        case.abort(aborted)
        case.now += 1
        case.step()
        assert case.reason(aborted) == "abort"
        assert isinstance(case.end_error(late), DeadlineExceededError)

    def test_a_defect_of_the_core_ends_the_admitted_requests_and_it_serves_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = loaded(max_queue_size=1)
        number = case.add("abc", n=2)
        case.step()
        case.add("xyz")
        queued = case.new("later")
        ticket = case.call(lambda to: case.adding(queued, to=to))
        cause = KeyError("oops")

        def defect(*_: object) -> None:
            monkeypatch.undo()
            raise cause

        assert case.core.scheduler is not None
        preemptions = case.core.metrics().counters.preemptions
        monkeypatch.setattr(case.core.scheduler, "schedule", defect)
        case.step()
        assert case.end_error(number).__cause__ is cause
        assert [case.reason(number, branch) for branch in range(2)] == ["error"] * 2
        assert case.usage(number).completion_tokens == 2
        assert case.core.metrics().counters.preemptions == preemptions
        case.run()
        assert case.answer(ticket) is True
        assert case.text(queued.number) == "later"


class TestPlacing:
    def test_a_refusal_ends_that_request_only(self) -> None:
        case = loaded()
        fine = case.add("abc")
        case.step()
        cause = ValueError("no such adapter")
        refused, after = case.add("def", n=3), case.add("ghi")
        case.model.refuse_next(cause)
        case.run()
        error = case.end_error(refused)
        assert isinstance(error, RequestDroppedError) and not error.retryable
        assert error.__cause__ is cause and "no such adapter" in str(error)
        assert [case.reason(refused, branch) for branch in range(3)] == ["error"] * 3
        assert case.text(fine) == "abc" and case.text(after) == "ghi"

    def test_a_refusal_of_a_later_branch_ends_the_whole_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded()
        place = case.model.place

        def picky(slot: int, params: Any, branch: int, prompt: Any, output: Any) -> None:
            if branch == 2:
                raise ValueError("not the third")
            place(slot, params, branch, prompt, output)

        monkeypatch.setattr(case.model, "place", picky)
        refused, fine = case.add("abc", n=3), case.add("def")
        case.run()
        assert [case.reason(refused, branch) for branch in range(3)] == ["error"] * 3
        assert case.text(fine) == "def"

    def test_a_refusal_of_a_branch_that_starts_late_ends_those_that_run(self) -> None:
        def script(prompt: Sequence[int], branch: int) -> Iterable[int]:
            return [65] * (3 if branch < 2 else 9)

        case = loaded(script, max_num_sequence=3)
        number = case.add("abcdefg", n=4)
        case.step()
        case.model.refuse_next(ValueError("x"))
        case.run()
        assert [case.reason(number, branch) for branch in range(4)] == ["stop", "stop", "error", "error"]
        assert case.pool.num_used == 0

    def test_when_alone_does_not_end_the_next_in_line_as_stuck(self) -> None:
        case = loaded(max_num_sequence=1)
        refused, fine = case.add("abc"), case.add("def")
        case.model.refuse_next(ValueError("x"))
        case.run()
        assert case.reason(refused) == "error"
        assert case.text(fine) == "def"


class TestText:
    def test_a_stop_string_ends_a_branch(self) -> None:
        case = loaded(answer("one two three"))
        number = case.add("x", stop_strs=("two", "three"))
        case.run()
        assert case.text(number) == "one two"
        assert case.reason(number) == "stop" and case.stop_reason(number) == "two"

    def test_a_stop_string_may_be_the_first_token(self) -> None:
        case = loaded(answer("one two"))
        number = case.add("x", n=2, stop_strs=("o",))
        case.run()
        assert case.text(number, 1) == "o" and case.stop_reason(number, 1) == "o"

    def test_a_decoder_that_fails_ends_that_request_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded(answer("ab!cd"))
        assert case.loader.tokenizer is not None
        decode = case.loader.tokenizer.decode

        def picky(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
            if ord("!") in token_ids:
                raise ValueError("no exclamation marks")
            return decode(token_ids, skip_special_tokens)

        monkeypatch.setattr(case.loader.tokenizer, "decode", picky)
        fails, fine = case.add("x", n=3, stop_strs=("zz",)), case.add("x")
        case.run()
        assert isinstance(case.end_error(fails), RequestDroppedError)
        assert [case.text(fails, branch) for branch in range(3)] == ["ab!"] * 3
        assert case.text(fine) == "ab!cd"

    def test_a_decoder_that_fails_while_another_branch_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded(lambda prompt, branch: b"a!" if branch == 0 else b"ab")
        assert case.loader.tokenizer is not None
        decode = case.loader.tokenizer.decode
        monkeypatch.setattr(
            case.loader.tokenizer, "decode", lambda ids, skip: 1 / 0 if ord("!") in ids else decode(ids, skip)
        )
        number = case.add("x", n=3, max_tokens=2, stop_strs=("zz",))
        case.run()
        assert [case.reason(number, branch) for branch in range(3)] == ["error"] * 3

    def test_a_stop_token_is_not_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded(answer("ab!"))
        assert case.loader.tokenizer is not None
        decode = case.loader.tokenizer.decode
        monkeypatch.setattr(
            case.loader.tokenizer, "decode", lambda ids, skip: 1 / 0 if ord("!") in ids else decode(ids, skip)
        )
        number = case.add("x", stop_token_ids=(ord("!"),), stop_strs=("zz",))
        case.run()
        assert case.reason(number) == "stop" and case.stop_reason(number) == ord("!")

    def test_a_decoder_that_fails_at_the_first_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded(answer("abc"), max_num_sequence=2)
        monkeypatch.setattr(case.loader.tokenizer, "decode", lambda *_: 1 / 0)
        fails, fine = case.add("x", n=4, stop_strs=("zz",)), case.add("x")
        case.run()
        assert [case.reason(fails, branch) for branch in range(4)] == ["error"] * 4
        assert case.text(fine) == "abc"


class TestLength:
    def test_max_tokens_is_exact(self) -> None:
        case = loaded(answer("abcdefgh"))
        numbers = [case.add("prompt", max_tokens=limit, n=2) for limit in range(5)]
        case.run()
        for limit, number in enumerate(numbers):
            assert [case.text(number, branch) for branch in range(2)] == ["abcdefgh"[:limit]] * 2
            assert case.reason(number) == "length"

    def test_the_end_token_wins_over_the_length(self) -> None:
        case = loaded(answer("ab"))
        number = case.add("x", max_tokens=3)
        case.run()
        assert case.reason(number) == "stop" and case.stop_reason(number) == EOS

    def test_sequences_end_at_the_limit_of_the_model(self) -> None:
        case = loaded(lambda prompt, branch: [65] * 1000, max_single_sequence_length=16)
        number = case.add("0123456789")
        case.run()
        assert case.reason(number) == "length"
        assert case.usage(number).total_tokens == 16

    def test_sequences_end_at_the_capacity_of_the_cache(self) -> None:
        case = loaded(lambda prompt, branch: [65] * 1000, max_total_sequence_length=24)
        numbers = [case.add("0123456789"), case.add("9876543210")]
        case.run()
        assert [case.usage(number).total_tokens for number in numbers] == [24, 24]

    def test_a_prompt_one_token_short_of_the_capacity_is_served(self) -> None:
        case = loaded(max_total_sequence_length=24)
        number = case.add("x" * 23)
        case.run()
        assert case.reason(number) == "length" and case.text(number) == "x"

    def test_stop_tokens_do_not_count_below_min_tokens(self) -> None:
        case = loaded(lambda prompt, branch: [7, 7, 7, 7, 7])
        numbers = [case.add("x", min_tokens=count, stop_token_ids=(7,)) for count in range(4)]
        case.run()
        assert [len(case.tokens(number)) for number in numbers] == [1, 2, 3, 4]

    def test_more_stop_tokens_than_the_table_is_wide(self) -> None:
        case = loaded(answer("abcdefgh"))
        many = case.add("x", stop_token_ids=tuple(range(100, 120)))
        none = case.add("x", stop_token_ids=())
        case.run()
        assert case.text(many) == "abcd"
        assert case.reason(none) == "length"


class TestAccounts:
    def test_are_looked_at_when_nothing_is_left_to_do_and_begin_anew_where_they_are_wrong(self) -> None:
        case = loaded()
        case.add("abc")
        case.run()
        assert case.core.metrics().counters.failed_steps == 0
        assert case.core.scheduler is not None
        case.core.scheduler.blocks.pool.allocate(2)  # and nobody holds them
        case.core.step()
        assert case.core.metrics().counters.failed_steps == 1
        case.check()
        number = case.add("xyz")
        case.run()
        assert case.text(number) == "xyz"

    def test_that_are_wrong_are_logged_since_nobody_else_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        case = loaded()
        case.add("abc")
        case.run()
        assert not caplog.records and case.core.scheduler is not None
        case.core.scheduler.blocks.pool.allocate(2)
        case.core.step()
        case.core.step()
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("asyncengine", "ERROR")
        assert record.exc_info is not None and record.exc_info[0] is AssertionError
        assert record.getMessage().startswith("the accounts of the KV cache were wrong and begin anew: ")
        assert not logging.getLogger("asyncengine").handlers

    def test_go_on_where_the_programs_own_log_handler_raises(self) -> None:
        class Broken(logging.Handler):
            emitted = 0

            def emit(self, record: logging.LogRecord) -> None:
                self.emitted += 1
                raise OSError("the disk is full")

        case = loaded()
        case.add("abc")
        case.run()
        assert case.core.scheduler is not None
        case.core.scheduler.blocks.pool.allocate(2)
        logger, broken = logging.getLogger("asyncengine"), Broken()
        logger.addHandler(broken)
        try:
            case.core.step()
        finally:
            logger.removeHandler(broken)
        assert broken.emitted == 1
        number = case.add("xyz")
        case.run()
        assert case.text(number) == "xyz"


class TestStuckHead:
    def pinned(self) -> Case:
        case = loaded(max_total_sequence_length=32)
        case.add("a" * 24, max_tokens=0, pin="all")
        case.run()
        return case

    def test_ends_with_a_reason(self) -> None:
        case = self.pinned()
        number = case.add("b" * 20)
        case.run(at_most=5)
        error = case.end_error(number)
        assert isinstance(error, StepError)
        assert "20 tokens need 5 blocks" in str(error) and "pinned" in str(error)

    def test_one_that_grew_too_long_ends_with_a_reason(self) -> None:
        case = self.pinned()
        number = case.add("b" * 5)
        case.run(at_most=50)
        assert case.text(number) == "b" * 4 or case.reason(number) in ("stop", "error")
        long = case.add("c" * 7)
        case.run(at_most=50)
        assert isinstance(case.end_error(long), StepError)
        assert case.usage(long).completion_tokens > 0

    def test_does_not_end_those_that_fit(self) -> None:
        case = self.pinned()
        number = case.add("b" * 3)
        case.run(at_most=20)
        assert case.text(number) == "bbb"

    def test_unpinning_makes_room(self) -> None:
        case = self.pinned()
        assert case.ask(lambda to: ins.Unpin("all", to)) is True
        assert case.ask(lambda to: ins.Unpin("all", to)) is False
        number = case.add("b" * 20, max_tokens=5)
        case.run()
        assert case.text(number) == "b" * 5


class TestPauseAndSleep:
    def test_nothing_is_stepped_while_paused(self) -> None:
        case = loaded()
        number = case.add("abcdef")
        case.step(2)
        case.ask(ins.Pause)
        steps = case.model.steps
        assert not case.core.runnable
        case.step(3)
        assert case.model.steps == steps
        later = case.add("gh")
        case.ask(ins.Resume)
        case.run()
        assert (case.text(number), case.text(later)) == ("abcdef", "gh")

    def test_sequences_are_computed_again_after_sleep(self) -> None:
        case = loaded()
        number = case.add("abcdef", n=2)
        case.step(3)
        case.ask(ins.Sleep)
        assert case.model.asleep
        assert case.pool.num_free == case.pool.num_blocks
        assert not case.core.runnable
        case.step(2)
        case.ask(ins.Wake)
        case.run()
        assert [case.text(number, branch) for branch in range(2)] == ["abcdef"] * 2
        assert case.usage(number).preemptions == 2

    def test_twice_is_once(self) -> None:
        case = loaded()
        for instruction in (ins.Sleep, ins.Sleep, ins.Wake, ins.Wake, ins.Pause, ins.Pause, ins.Resume, ins.Resume):
            case.ask(instruction)
        assert case.state is EngineState.READY and not case.model.asleep

    def test_a_model_that_cannot_sleep_stays_awake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded()
        number = case.add("abc")
        case.step()
        monkeypatch.setattr(case.model, "sleep", lambda: 1 / 0)
        ticket = case.call(ins.Sleep)
        assert isinstance(case.error(ticket), ZeroDivisionError)
        assert case.state is EngineState.READY
        case.run()
        assert case.text(number) == "abc"

    def test_a_model_that_cannot_wake_sleeps_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded()
        number = case.add("abc")
        case.ask(ins.Sleep)
        monkeypatch.setattr(case.model, "wake", lambda: 1 / 0)
        ticket = case.call(ins.Wake)
        assert isinstance(case.error(ticket), ZeroDivisionError)
        assert case.state is EngineState.SLEEPING
        monkeypatch.undo()
        case.ask(ins.Wake)
        case.run()
        assert case.text(number) == "abc"

    def test_abort_while_asleep(self) -> None:
        case = loaded()
        number = case.add("abcdef")
        case.step(2)
        case.ask(ins.Sleep)
        case.abort(number)
        assert case.usage(number).completion_tokens == 2
        case.ask(ins.Wake)
        assert not case.core.runnable


class TestReset:
    def test_ends_requests_and_empties_the_cache_and_zeroes_the_metrics(self) -> None:
        case = loaded()
        case.add("abcdefgh", pin="p", max_tokens=2)
        case.run()
        case.add("abcdefgh")
        number = case.add("xyz")
        case.step()
        case.ask(ins.Reset)
        assert case.reason(number) == "abort"
        assert case.pool.num_free == case.pool.num_blocks
        counters = case.core.metrics().counters
        assert (counters.generation_tokens, counters.prefix_cache_queries, counters.steps) == (0, 0, 0)
        assert counters.requests == {"stop": 0, "length": 0, "abort": 0, "error": 0}
        assert case.ask(lambda to: ins.Unpin("p", to)) is False
        again = case.add("abcdefgh")
        case.run()
        assert case.usage(again).cached_tokens == 0
        assert case.core.metrics().counters.requests["stop"] == 1

    def test_without_a_model_is_allowed(self) -> None:
        Case(ScriptedLoader()).ask(ins.Reset)

    def test_ends_a_drain(self) -> None:
        case = loaded()
        case.add("abc")
        drain = case.call(ins.Drain)
        case.ask(ins.Reset)
        case.step()
        assert case.answer(drain) is None
        assert case.state is EngineState.READY


class TestWeights:
    def test_requests_go_on_and_the_cache_begins_anew(self) -> None:
        case = loaded()
        number = case.add("abcdefgh")
        case.step(3)
        first = case.ask(lambda to: ins.UpdateWeights({"w": 1}, to))
        assert case.model.weights == {"w": 1}
        case.run()
        assert case.text(number) == "abcdefgh"
        second = case.ask(lambda to: ins.UpdateWeights({"w": 2}, to))
        assert second > first

    def test_sequences_that_run_across_an_update_stay_out_of_the_cache(self) -> None:
        case = loaded(prefill_chunk_size=4)
        decoding = case.add("abcdefgh", n=2)
        case.step(4)
        prefilling = case.add("ijklmnopqrst", n=3)
        case.step(2)
        case.ask(lambda to: ins.UpdateWeights({"w": 1}, to))
        assert case.pool.num_cached == 0
        case.run()
        assert case.pool.num_free == case.pool.num_blocks
        for number, prompt in ((decoding, "abcdefgh"), (prefilling, "ijklmnopqrst")):
            assert case.text(number) == prompt
            again = case.add(prompt)
            case.run()
            assert case.usage(again).cached_tokens == 0

    def test_sequences_that_start_after_an_update_are_cached(self) -> None:
        case = loaded(max_num_sequence=1)
        case.add("abcdefgh")
        waiting = case.add("ijklmnop")
        case.step()
        case.ask(lambda to: ins.UpdateWeights({"w": 1}, to))
        case.run()
        again = case.add("ijklmnop")
        case.run()
        assert case.ended(waiting)
        assert case.usage(again).cached_tokens == 4

    def test_a_preempted_sequence_computed_anew_is_cached_again(self) -> None:
        case = loaded()
        case.add("abcdefgh")
        case.step(2)
        case.ask(lambda to: ins.UpdateWeights({"w": 1}, to))
        case.ask(ins.Sleep)
        case.ask(ins.Wake)
        case.run()
        again = case.add("abcdefgh")
        case.run()
        assert case.usage(again).cached_tokens == 4

    def test_a_refused_update_changes_nothing(self) -> None:
        case = loaded()
        case.add("abcdefgh")
        case.run()
        ticket = case.call(lambda to: ins.UpdateWeights({"a": 1, "b": None}, to))
        assert isinstance(case.error(ticket), ReloadError)
        assert case.model.weights == {}
        again = case.add("abcdefgh")
        case.run()
        assert case.usage(again).cached_tokens == 4


class TestDrain:
    def test_refuses_new_ones_finishes_the_others_then_takes_them_again(self) -> None:
        case = loaded()
        number = case.add("abc")
        drain = case.call(ins.Drain)
        ticket = case.call(lambda to: case.adding(case.new("d"), to=to))
        assert isinstance(case.error(ticket), EngineDrainingError)
        assert not case.answered(drain)
        case.run()
        assert case.answer(drain) is None
        assert case.text(number) == "abc"
        assert case.state is EngineState.READY
        case.add("d")

    def test_with_nothing_to_do_is_over_at_once(self) -> None:
        case = loaded()
        drain = case.call(ins.Drain)
        case.step()
        assert case.answer(drain) is None

    def test_finishes_queued_requests_too(self) -> None:
        case = loaded(max_queue_size=1)
        case.add("ab")
        queued = case.new("cd")
        case.call(lambda to: case.adding(queued, to=to))
        drain = case.call(ins.Drain)
        case.run()
        assert case.text(queued.number) == "cd" and case.answered(drain)

    def test_an_unload_ends_it(self) -> None:
        case = loaded()
        case.add("ab")
        drain = case.call(ins.Drain)
        case.ask(ins.Unload)
        assert case.answer(drain) is None
        assert case.state is EngineState.UNLOADED

    @pytest.mark.parametrize("left", [0, 1])
    def test_a_lost_device_ends_it_with_an_error(self, left: int) -> None:
        case = loaded(max_num_sequence=1)
        for _ in range(1 + left):
            case.add("ab")
        drain = case.call(ins.Drain)
        case.step()
        case.model.lose_device()
        case.step(3)
        assert case.state is EngineState.FAILED
        assert isinstance(case.error(drain), EngineFailedError)
        restart = case.call(ins.Restart)
        case.run_jobs()
        case.answer(restart)
        case.run()
        assert case.state is EngineState.READY


class TestLostDevice:
    def test_waiting_requests_keep_their_place_over_a_restart(self) -> None:
        case = loaded(max_num_sequence=1)
        lost = case.add("abc")
        case.step(2)
        waiting = [case.add("def"), case.add("ghi"), case.add("jkl", priority=-1)]
        case.model.lose_device()
        case.step()
        assert case.state is EngineState.FAILED
        assert isinstance(case.core.failure, Exception)
        assert isinstance(case.end_error(lost), StepError)
        assert not case.core.runnable
        restart = case.call(ins.Restart)
        case.run_jobs()
        assert case.answer(restart).model == "scripted"
        assert case.core.failure is None
        case.run()
        assert list(case.box.ends) == [lost, waiting[2], waiting[0], waiting[1]]
        assert [case.text(number) for number in waiting] == ["def", "ghi", "jkl"]
        assert [model.closed for model in case.loader.models] == [True, False]

    def test_nothing_is_loaded_beside_it(self) -> None:
        case = in_state(EngineState.FAILED)
        case.call(lambda to: ins.Reload(config("other"), "abort", to))
        case.run_job()
        assert case.loader.models[0].closed
        case.run_jobs()
        assert case.state is EngineState.READY

    def test_a_restart_whose_check_fails_can_be_repeated(self) -> None:
        case = loaded(max_num_sequence=1)
        case.add("abc")
        waiting = case.add("def")
        case.model.lose_device()
        case.step()
        case.loader.check_errors["scripted"] = ReloadError("busy")
        restart = case.call(ins.Restart)
        case.run_jobs()
        assert isinstance(case.error(restart), ReloadError)
        assert case.state is EngineState.FAILED
        case.loader.check_errors.clear()
        case.call(ins.Restart)
        case.run_jobs()
        case.run()
        assert case.text(waiting) == "def"

    def test_a_restart_whose_load_fails_leaves_the_engine_unloaded(self) -> None:
        case = loaded(max_num_sequence=1)
        case.add("abc")
        waiting = case.add("def")
        case.model.lose_device()
        case.step()
        case.loader.load_errors["scripted"] = OSError("gone")
        restart = case.call(ins.Restart)
        case.run_jobs()
        assert isinstance(case.error(restart).__cause__, OSError)
        assert case.state is EngineState.UNLOADED
        assert isinstance(case.end_error(waiting), ReloadError)

    def test_shutdown_of_a_failed_engine_steps_nothing(self) -> None:
        case = loaded(max_num_sequence=1)
        case.add("abc")
        case.add("def")
        case.model.lose_device()
        case.step()
        steps = case.model.steps
        ticket = case.shutdown(drain=100)
        case.step()
        assert case.answer(ticket) == ("r2",)
        assert case.model.steps == steps

    def test_in_the_last_step_of_a_shutdown_ends_it(self) -> None:
        case = loaded(max_num_sequence=1)
        case.add("abc")
        case.add("def")
        case.step()
        ticket = case.shutdown(drain=100)
        case.model.lose_device()
        case.step()
        assert case.answer(ticket) == ("r2",)
        assert case.state is EngineState.CLOSED


class TestShutdown:
    def test_ends_what_is_left_and_says_what(self) -> None:
        case = loaded()
        numbers = [case.add("abcdef", n=2), case.add("ghi")]
        case.step(2)
        ticket = case.shutdown()
        assert case.answer(ticket) == ("r1", "r2")
        assert case.state is EngineState.CLOSED
        assert [case.usage(number).completion_tokens for number in numbers] == [4, 2]
        assert case.model.closed and case.core.closed
        assert case.core.next_deadline is None

    def test_finishes_what_it_can_by_the_deadline(self) -> None:
        case = loaded()
        short, long = case.add("ab"), case.add("abcdefghijkl")
        case.step()
        ticket = case.shutdown(drain=10)
        refused = case.call(lambda to: case.adding(case.new("x"), to=to))
        assert isinstance(case.error(refused), EngineClosedError)
        case.step(4)
        case.now += 10
        case.step()
        assert case.answer(ticket) == (f"r{long}",)
        assert case.text(short) == "ab"
        assert case.text(long) == "abcdef"

    def test_with_everything_finished_leaves_nothing(self) -> None:
        case = loaded()
        number = case.add("ab")
        ticket = case.shutdown(drain=10)
        case.step(5)
        assert case.answer(ticket) == ()
        assert case.reason(number) == "stop"

    def test_twice_takes_the_earlier_deadline(self) -> None:
        case = loaded()
        case.add("abcdefghijkl")
        case.step()
        first, second = case.shutdown(drain=100), case.shutdown(drain=1)
        case.shutdown(drain=1000)
        case.now += 1
        case.step()
        assert case.answer(first) == case.answer(second) == ("r1",)
        third = case.shutdown()
        assert isinstance(case.error(third), EngineClosedError)

    def test_of_a_paused_engine_lets_requests_finish(self) -> None:
        case = loaded()
        number = case.add("ab")
        case.ask(ins.Pause)
        ticket = case.shutdown(drain=10)
        case.step(5)
        assert case.answer(ticket) == ()
        assert case.text(number) == "ab"

    def test_of_a_sleeping_engine_ends_requests(self) -> None:
        case = loaded()
        case.add("ab")
        case.ask(ins.Sleep)
        assert case.answer(case.shutdown(drain=10)) == ("r1",)

    @pytest.mark.parametrize("fits_beside", [True, False])
    @pytest.mark.parametrize("instruction", [ins.Pause, ins.Sleep])
    def test_while_loading_beside_a_model_that_must_not_be_stepped(self, instruction: Make, fits_beside: bool) -> None:
        case = loaded(fits_beside=fits_beside)
        number = case.add("ab")
        case.step()
        case.ask(instruction)
        steps = case.model.steps
        reload = case.call(lambda to: ins.Reload(config("other"), "carry", to))
        ticket = case.shutdown(drain=10)
        case.step(5)
        assert isinstance(case.error(reload), EngineClosedError)
        assert case.core.closed and case.answered(ticket)
        if instruction is ins.Sleep:
            assert case.model.steps == steps
        assert case.reason(number) in ("abort", "stop")

    def test_while_loading_beside_a_lost_device(self) -> None:
        case = loaded(max_num_sequence=1)
        case.add("ab")
        case.add("cd")
        case.call(lambda to: ins.Reload(config("other"), "carry", to))
        case.model.lose_device()
        case.step()
        steps = case.model.steps
        ticket = case.shutdown(drain=10)
        case.step()
        assert case.answer(ticket) == ("r2",)
        assert case.model.steps == steps

    def test_without_a_model(self) -> None:
        case = Case(ScriptedLoader())
        assert case.answer(case.shutdown(drain=10)) == ()
        assert case.core.closed

    @pytest.mark.parametrize("drain", [math.nan, -1.0, "soon", None])
    def test_a_senseless_deadline_is_refused_and_changes_nothing(self, drain: Any) -> None:
        case = loaded()
        number = case.add("ab")
        ticket = case.shutdown(drain=drain)
        assert case.error(ticket)
        assert case.state is EngineState.READY
        case.run()
        assert case.text(number) == "ab"
        assert case.answer(case.shutdown()) == ()

    def test_without_a_deadline_waits_for_the_last(self) -> None:
        case = loaded()
        number = case.add("abcdef")
        ticket = case.shutdown(drain=math.inf)
        case.step(10)
        assert case.answer(ticket) == () and case.text(number) == "abcdef"

    def test_a_model_that_cannot_be_closed_does_not_stop_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded()
        case.add("abc")
        monkeypatch.setattr(case.model, "close", lambda: 1 / 0)
        ticket = case.shutdown()
        case.step()
        assert case.answer(ticket) == ("r1",)
        assert case.core.closed

    def test_instructions_after_it_are_refused(self) -> None:
        case = loaded()
        replies = [case.reply_to() for _ in range(4)]
        shutdown = case.reply_to()
        case.give(
            ins.Shutdown(0.0, shutdown),
            case.adding(case.new("a"), to=replies[0]),
            ins.Reload(config(), "abort", replies[1]),
            ins.AbortRequests((1,), (), replies[2]),
            ins.Reset(replies[3]),
        )
        assert case.answer(shutdown.ticket) == ()
        assert [type(case.box.replies[to.ticket].error) for to in replies] == [
            EngineClosedError,
            EngineClosedError,
            type(None),
            EngineClosedError,
        ]

    def test_instructions_that_arrived_in_its_last_step_are_refused(self) -> None:
        case = loaded()
        case.add("a")
        case.step()
        ticket = case.shutdown(drain=5)
        reset, again = case.reply_to(), case.reply_to()
        case.core.step(lambda: [ins.Reset(reset), ins.Shutdown(0.0, again)])
        case.flush()
        if not case.core.closed:
            case.step(2)
        assert case.answered(ticket)
        assert case.answered(reset.ticket) and case.answered(again.ticket)

    def test_a_reload_that_slips_in_while_draining_is_answered(self) -> None:
        case = loaded()
        case.add("abc")
        case.step()
        shutdown, unload, reload = case.reply_to(), case.reply_to(), case.reply_to()
        case.give(ins.Shutdown(10.0, shutdown), ins.Unload(unload), ins.Reload(config("other"), "abort", reload))
        case.step(2)
        assert case.core.closed
        assert all(case.answered(to.ticket) for to in (shutdown, unload, reload))
        case.run_jobs()

    def test_refused_instructions_are_each_answered(self) -> None:
        case = loaded()
        case.shutdown()
        replies = [case.reply_to() for _ in range(3)]
        case.core.refuse([ins.Shutdown(0.0, replies[0]), ins.AbortRequests((), (), replies[1]), ins.Drain(replies[2])])
        case.flush()
        assert case.answer(replies[0].ticket) == ()
        assert case.answer(replies[1].ticket) is None
        assert isinstance(case.error(replies[2].ticket), EngineClosedError)


class TestDeath:
    def test_leaves_nobody_waiting(self) -> None:
        case = loaded(max_queue_size=1)
        number = case.add("abc", n=2)
        case.step()
        case.add("def")
        queued = case.new("ghi")
        admission = case.call(lambda to: case.adding(queued, to=to))
        reload = case.call(lambda to: ins.Reload(config("other"), "wait", to))
        held = [case.call(ins.Reset), case.call(lambda to: case.adding(case.new("j"), to=to))]
        later = case.reply_to()
        case.core.step(lambda: [ins.Pause(later)])
        cause = MemoryError("all gone")
        case.core.die(cause)
        case.flush()
        assert case.core.closed
        for ticket in (reload, *held, later.ticket):
            assert isinstance(case.error(ticket), EngineClosedError)
        assert case.answered(admission)
        assert case.end_error(number).__cause__ is cause
        assert [case.reason(number, branch) for branch in range(2)] == ["error"] * 2
        assert case.ended(queued.number)
        assert case.usage(number).completion_tokens == len(case.tokens(number)) + len(case.tokens(number, 1))

    def test_answers_drains_and_shutdowns(self) -> None:
        case = loaded()
        case.add("abc")
        drain = case.call(ins.Drain)
        shutdown = case.shutdown(drain=10)
        case.core.die(MemoryError("x"))
        case.flush()
        assert isinstance(case.error(drain), EngineClosedError)
        assert isinstance(case.error(shutdown), EngineClosedError)


class TestMetrics:
    def test_count_what_there_is(self) -> None:
        case = loaded(max_num_sequence=2, max_queue_size=2)
        case.add("abcdef", n=2)
        case.step()
        for _ in range(2):
            case.add("ghi")
        case.call(lambda to: case.adding(case.new("x"), to=to))
        metrics = case.core.metrics()
        assert (metrics.num_requests_running, metrics.num_requests_waiting, metrics.num_requests_queued) == (1, 2, 1)
        assert metrics.state == "ready"
        assert metrics.kv_blocks_used + metrics.kv_blocks_free + metrics.kv_blocks_cached == metrics.kv_blocks_total
        assert metrics.kv_blocks_used > 0
        case.run()
        counters = case.core.metrics().counters
        assert counters.requests["stop"] == 4
        assert counters.prompt_tokens == 6 + 3 + 3 + 1
        assert counters.generation_tokens == 2 * 7 + 4 + 4 + 2
        assert counters.time_to_first_token_seconds.count == 4
        assert counters.e2e_request_latency_seconds.count == 4

    def test_survive_a_reload(self) -> None:
        case = loaded()
        case.add("abcdefgh")
        case.add("abcdefgh")
        case.run()
        before = case.core.metrics().counters.prefix_cache_queries
        case.load("other")
        assert case.core.metrics().counters.prefix_cache_queries == before == 16

    def test_a_copy_does_not_change(self) -> None:
        case = loaded()
        before = case.core.metrics()
        case.add("abc")
        case.run()
        assert before.counters.steps == 0 and before.counters.requests["stop"] == 0

    def test_a_step_that_runs_is_visible(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded()
        case.add("abc")
        seen: list[float] = []
        execute = case.model.execute

        def look(batch: StepBatch) -> StepTokens:
            case.now += 3
            seen.append(case.core.metrics().step_running_seconds)
            return execute(batch)

        monkeypatch.setattr(case.model, "execute", look)
        case.step()
        assert seen == [3]
        assert case.core.metrics().step_running_seconds == 0


class TestTrace:
    def test_follows_every_request(self) -> None:
        case = loaded()
        case.core.trace.start()
        number = case.add("abc")
        aborted = case.add("def")
        case.step()
        case.abort(aborted)
        case.run()
        events = case.core.trace.events()
        for request, reason in ((number, "stop"), (aborted, "abort")):
            own = [(event["ph"], event["name"]) for event in events if event.get("id") == request]
            assert own == [("b", "request"), ("n", "prefill"), ("n", "first token"), ("e", "request")]
            [end] = [event for event in events if event.get("id") == request and event["ph"] == "e"]
            assert end["args"]["finish_reason"] == reason
        assert sum(event["name"] == "step" for event in events) == case.model.steps


def test_finish_reasons_are_those_that_the_counters_know() -> None:
    assert set(FinishReason) == set(loaded().core.metrics().counters.requests)


def test_a_job_that_nobody_waits_for_is_let_go() -> None:
    case = loaded()
    model = case.loader.load(case.loader.check(config("other"), None))
    case.give(JobDone(999, model))
    assert model.model.closed  # type: ignore[attr-defined]
    assert case.state is EngineState.READY
