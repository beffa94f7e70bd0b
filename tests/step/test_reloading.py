"""One model takes the place of another. The loader's jobs end when the test says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from asyncengine import instructions as ins
from asyncengine.config import EngineConfig
from asyncengine.errors import (
    EngineClosedError,
    IllegalStateError,
    InvalidRequestError,
    ModelNotLoadedError,
    ReloadError,
)
from asyncengine.instructions import JobDone
from asyncengine.state import EngineState
from asyncengine.step.core import Core
from asyncengine.testing import ByteTokenizer, ScriptedLoader, ScriptedModel

from .core_case import EOS, Case, config, loaded


def reload(
    case: Case,
    model: str = "other",
    in_flight: ins.InFlight = "abort",
    new_requests: ins.NewRequests = "wait",
    **changes: Any,
) -> int:
    return case.call(lambda to: ins.Reload(config(model, **changes), in_flight, to, new_requests))


def names(case: Case) -> list[bool]:
    return [model.closed for model in case.loader.models]


class TestFromNothing:
    def test_loads(self) -> None:
        case = Case(ScriptedLoader())
        ticket = reload(case)
        assert case.state is EngineState.LOADING
        assert case.core.reloading.phase == "checking"
        case.run_job()
        case.run_jobs()
        complete = case.answer(ticket)
        assert complete == case.core.view.config  # type: ignore[union-attr]
        assert None not in (complete.max_num_sequence, complete.kv_cache_page_size)
        assert case.state is EngineState.READY
        assert case.core.reloading.phase is None

    @pytest.mark.parametrize("what", ["check_errors", "load_errors"])
    def test_a_failure_leaves_it_unloaded_and_usable(self, what: str) -> None:
        case = Case(ScriptedLoader())
        cause = OSError("no such file")
        setattr(case.loader, what, {"bad": cause})
        ticket = reload(case, "bad")
        held = case.call(lambda to: case.adding(case.new("x"), to=to))
        case.run_jobs()
        error = case.error(ticket)
        assert type(error) is ReloadError and error.__cause__ is cause
        assert "'bad'" in str(error) and "no such file" in str(error)
        assert isinstance(case.error(held), ModelNotLoadedError)
        assert case.state is EngineState.UNLOADED
        case.load("good")
        number = case.add("abc")
        case.run()
        assert case.text(number) == "abc"


class TestBothFit:
    def test_the_old_one_serves_until_the_swap(self) -> None:
        case = loaded()
        number = case.add("abcdef")
        case.step(2)
        ticket = reload(case)
        case.step()
        case.run_job()
        assert case.core.reloading.phase == "loading beside the present model"
        case.step()
        assert case.text(number) == "abcd"
        assert names(case) == [False]
        case.run_job()
        assert case.answered(ticket)
        assert names(case) == [True, False]
        assert case.reason(number) == "abort"
        assert case.usage(number).completion_tokens == 4
        later = case.add("xyz")
        case.run()
        assert case.text(later) == "xyz"

    @pytest.mark.parametrize("what", ["check_errors", "load_errors"])
    def test_a_failure_leaves_the_old_one_serving(self, what: str) -> None:
        case = loaded()
        number = case.add("abcdef")
        case.step(2)
        setattr(case.loader, what, {"bad": ReloadError("does not fit")})
        ticket = reload(case, "bad")
        case.step()
        case.run_jobs()
        assert str(case.error(ticket)) == "does not fit"
        assert case.state is EngineState.READY
        case.run()
        assert case.text(number) == "abcdef"
        assert names(case) == [False]

    @pytest.mark.parametrize("instruction", [ins.Pause, ins.Sleep])
    def test_a_failure_returns_to_the_state_before(self, instruction: Any) -> None:
        case = loaded()
        number = case.add("abcdef")
        case.step(2)
        case.ask(instruction)
        state, steps = case.state, case.model.steps
        case.loader.load_errors = {"bad": ReloadError("x")}
        reload(case, "bad")
        case.step(3)
        case.run_jobs()
        assert case.state is state
        assert case.model.steps == steps
        case.ask(ins.Resume if instruction is ins.Pause else ins.Wake)
        case.run()
        assert case.text(number) == "abcdef"

    def test_the_epoch_changes_with_the_model(self) -> None:
        case = loaded()
        before = case.core.view
        case.load("other")
        assert before is not None and case.core.view is not None
        assert case.core.view.epoch > before.epoch


class TestOnlyOneFits:
    def test_the_old_one_goes_first(self) -> None:
        case = loaded(fits_beside=False)
        number = case.add("abcdef")
        case.step(2)
        reload(case)
        case.step()
        assert case.text(number) == "abc"
        case.run_job()
        assert case.core.reloading.phase == "loading"
        assert names(case) == [True]
        assert case.core.view is None and case.core.scheduler is None
        assert case.reason(number) == "abort"
        case.step()
        case.run_job()
        assert case.state is EngineState.READY

    def test_a_failing_check_leaves_the_old_one_serving(self) -> None:
        case = loaded(fits_beside=False)
        number = case.add("abcdef")
        case.step()
        case.loader.check_errors = {"bad": ReloadError("x")}
        ticket = reload(case, "bad")
        case.run_jobs()
        assert isinstance(case.error(ticket), ReloadError)
        case.run()
        assert case.text(number) == "abcdef"

    def test_a_failing_load_leaves_it_unloaded_and_usable(self) -> None:
        case = loaded(fits_beside=False)
        carried = case.add("abcdef", n=2)
        case.step(2)
        cause = OSError("gone")
        case.loader.load_errors = {"bad": cause}
        ticket = reload(case, "bad", "carry")
        case.run_jobs()
        assert case.error(ticket).__cause__ is cause
        assert case.state is EngineState.UNLOADED
        error = case.end_error(carried)
        assert isinstance(error, ReloadError) and error.__cause__ is cause
        assert case.usage(carried).completion_tokens == 4
        case.load("good")
        number = case.add("abc")
        case.run()
        assert case.text(number) == "abc"


FITS = pytest.mark.parametrize("fits_beside", [True, False])


class TestNewRequests:
    def test_are_served_by_the_present_model_until_the_next_one_is_there(self) -> None:
        case = loaded()
        ticket = reload(case, "other", "wait", "serve")
        while_checking = case.add("abc")
        case.step()
        assert case.text(while_checking) == "a"
        case.run_job()
        while_loading = case.add("xyz")
        case.step()
        assert case.text(while_loading) == "x" and not case.core._held
        case.run_job()
        later = case.new("new")
        admission = case.call(lambda to: case.adding(later, to=to))
        assert not case.answered(admission)  # or else the swap might never come
        case.run()
        assert case.text(while_checking) == "abc" and case.text(while_loading) == "xyz"
        assert case.answered(ticket) and case.answer(admission) is False
        assert names(case) == [True, False]

    @FITS
    @pytest.mark.parametrize(("in_flight", "outcome"), [("abort", "abort"), ("carry", "stop")])
    def test_share_the_lot_of_those_before(self, fits_beside: bool, in_flight: Any, outcome: str) -> None:
        case = loaded(fits_beside=fits_beside)
        reload(case, "other", in_flight, "serve")
        number = case.add("abcdef")
        case.step(2)
        case.run_jobs()
        case.run()
        assert case.reason(number) == outcome

    def test_wait_where_there_is_no_model_to_serve_them(self) -> None:
        case = loaded(fits_beside=False)
        reload(case, "other", "abort", "serve")
        case.run_job()
        held = case.call(lambda to: case.adding(case.new("abc"), to=to))
        assert not case.answered(held)
        case.run_jobs()
        assert case.answered(held)

    @pytest.mark.parametrize("instruction", [ins.Pause, ins.Sleep])
    def test_wait_where_the_present_model_does_not_step(self, instruction: Any) -> None:
        case = loaded()
        case.ask(instruction)
        reload(case, "other", "abort", "serve")
        held = case.call(lambda to: case.adding(case.new("abc"), to=to))
        case.run_job()
        assert not case.answered(held)

    def test_overtake_nothing_that_waits(self) -> None:
        case = loaded()
        reload(case, "other", "abort", "serve")
        paused = case.call(ins.Pause)
        held = case.call(lambda to: case.adding(case.new("abc"), to=to))
        assert not case.answered(paused) and not case.answered(held)

    def test_to_be_carried_to_another_tokenizer_are_refused_before_there_are_any(self) -> None:
        case = loaded()
        case.loader.tokenizer = None
        ticket = reload(case, "other", "carry", "serve")
        case.run_jobs()
        assert "another tokenizer" in str(case.error(ticket)) and case.state is EngineState.READY

    def test_go_on_after_a_load_that_failed(self) -> None:
        case = loaded()
        case.loader.load_errors = {"bad": OSError("gone")}
        reload(case, "bad", "abort", "serve")
        number = case.add("abc")
        case.run_jobs()
        case.run()
        assert case.text(number) == "abc" and case.state is EngineState.READY


class TestInFlight:
    @FITS
    def test_abort_ends_them_at_the_swap(self, fits_beside: bool) -> None:
        case = loaded(fits_beside=fits_beside, max_queue_size=1)
        number, queued = case.add("abcdef", n=2), case.new("xy")
        admission = case.call(lambda to: case.adding(queued, to=to))
        reload(case)
        case.run_jobs()
        assert case.reason(number) == case.reason(number, 1) == "abort"
        assert case.reason(queued.number) == "abort" and case.answered(admission)

    @FITS
    def test_wait_lets_them_finish(self, fits_beside: bool) -> None:
        case = loaded(fits_beside=fits_beside, max_queue_size=1)
        number, queued = case.add("abcdef", n=2), case.new("xy")
        case.call(lambda to: case.adding(queued, to=to))
        ticket = reload(case, "other", "wait")
        case.run_jobs()
        assert case.core.reloading.phase == "waiting for requests in flight"
        later = case.new("new")
        admission = case.call(lambda to: case.adding(later, to=to))
        case.run()
        case.run_jobs()
        assert case.answered(ticket)
        assert case.text(number, 1) == "abcdef" and case.text(queued.number) == "xy"
        assert case.answer(admission) is False  # prepared for the model before
        assert names(case) == [True, False]

    def test_wait_for_the_last_one_aborted(self) -> None:
        case = loaded()
        number = case.add("abcdef")
        ticket = reload(case, "other", "wait")
        case.run_jobs()
        case.abort(number)
        case.step()
        assert case.answered(ticket)

    @pytest.mark.parametrize("instruction", [ins.Pause, ins.Sleep])
    def test_wait_for_those_that_will_not_finish_is_refused(self, instruction: Any) -> None:
        case = loaded()
        case.add("abc")
        case.ask(instruction)
        state = case.state
        ticket = reload(case, "other", "wait")
        assert isinstance(case.error(ticket), IllegalStateError)
        assert case.state is state and not case.jobs

    @FITS
    def test_carry_goes_on_with_them(self, fits_beside: bool) -> None:
        def script(prompt: Any, branch: int) -> list[int]:
            return [65 + branch] * (2 + 4 * branch)

        case = loaded(script, fits_beside=fits_beside)
        number = case.add("abcdef", n=3)
        waiting = case.add("ghi")
        case.step(4)
        assert [case.reason(number, branch) for branch in range(3)] == ["stop", None, None]
        reload(case, "other", "carry")
        case.step()
        case.run_jobs()
        case.run()
        assert [case.text(number, branch) for branch in range(3)] == ["AA", "B" * 6, "C" * 10]
        assert case.usage(number).completion_tokens == 3 + 7 + 11
        assert case.text(waiting) == "AA"
        assert names(case) == [True, False]

    @FITS
    def test_carry_keeps_those_that_queue(self, fits_beside: bool) -> None:
        case = loaded(fits_beside=fits_beside, max_queue_size=1)
        case.add("abc")
        queued = case.new("xy")
        admission = case.call(lambda to: case.adding(queued, to=to))
        reload(case, "other", "carry", max_queue_size=1)
        case.run_jobs()
        case.run()
        assert case.answer(admission) is True and case.text(queued.number) == "xy"

    @FITS
    def test_carry_to_a_smaller_model_ends_those_that_do_not_fit(self, fits_beside: bool) -> None:
        case = loaded(fits_beside=fits_beside, max_queue_size=2)
        long = case.add("a" * 30)
        case.step()
        grown, short = case.add("b" * 14), case.add("c" * 3)
        case.step(3)
        queued = [case.new("d" * 30), case.new("e"), case.new("f" * 30), case.new("g")]
        tickets = [case.call(lambda to, new=new: case.adding(new, to=to)) for new in queued]  # type: ignore[misc]
        case.ask(ins.Pause)
        reload(case, "small", "carry", max_single_sequence_length=16, max_queue_size=2)
        case.run_jobs()
        for number in (long, grown):
            assert isinstance(case.end_error(number), InvalidRequestError)
            assert "at most 16 tokens" in str(case.end_error(number))
            assert case.reason(number) == "error"
        case.run()
        assert case.text(short) == "ccc"
        assert [case.text(new.number) for new in queued] == ["", "e", "", "g"]
        assert isinstance(case.end_error(queued[2].number), InvalidRequestError)
        assert all(map(case.answered, tickets))

    @FITS
    def test_carry_to_a_smaller_vocabulary_ends_those_outside(self, fits_beside: bool) -> None:
        case = loaded(lambda prompt, branch: [90, 90, 90], fits_beside=fits_beside, max_queue_size=3)
        outside, grown = case.add([200, 60]), case.add([60, 62])
        case.step()
        fresh, queued = case.new([60, 63]), case.new([201])
        case.call(lambda to: case.adding(case.new([1]), case.new([2]), fresh, queued, to=to))
        case.loader.vocab_size = 90
        case.loader.script = lambda prompt, branch: [70, 70, 70]
        reload(case, "small", "carry", max_queue_size=3)
        case.run_jobs()
        for number in (outside, grown, queued.number):
            assert isinstance(case.end_error(number), InvalidRequestError)
            assert "vocabulary of 90" in str(case.end_error(number))
        case.run()
        assert case.tokens(fresh.number) == [70, 70, 70, EOS]

    def test_carry_to_a_model_that_cannot_embed_ends_embeddings_alone(self) -> None:
        case = loaded(prefill_chunk_size=4)
        text = case.add("abcdef")
        embedding = dataclasses.replace(case.new("abcdefghi", max_tokens=0), pooling="mean")
        case.give(case.adding(embedding))
        case.step(2)
        case.loader.hidden_size = None
        reload(case, "other", "carry")
        case.run_jobs()
        case.run()
        assert isinstance(case.end_error(embedding.number), InvalidRequestError)
        assert case.text(text) == "abcdef"

    @FITS
    def test_carry_to_another_tokenizer_is_refused(self, fits_beside: bool) -> None:
        case = loaded(fits_beside=fits_beside)
        number = case.add("abcdef")
        case.step(2)
        case.loader.tokenizer = None
        ticket = reload(case, "other", "carry")
        case.run_jobs()
        assert isinstance(case.error(ticket), ReloadError) and "another tokenizer" in str(case.error(ticket))
        case.run()
        assert case.text(number) == "abcdef"
        assert case.state is EngineState.READY

    def test_carry_of_nothing_to_another_tokenizer_is_allowed(self) -> None:
        case = loaded()
        case.loader.tokenizer = None
        case.load("other", "carry")

    @pytest.mark.parametrize("late", [False, True])
    def test_wait_behind_a_lost_device_carries_where_that_is_sound(self, late: bool) -> None:
        for tokenizer, outcome in ((ByteTokenizer(), "stop"), (None, "abort")):
            case = loaded(max_num_sequence=1)
            case.add("abc")
            waiting = case.add("def")
            case.step()
            if not late:
                case.model.lose_device()
                case.step()
            case.loader.tokenizer = tokenizer
            ticket = reload(case, "other", "wait")
            case.run_job()
            if late:
                case.model.lose_device()
                case.step()
            case.run_jobs()
            case.step()
            case.run_jobs()
            assert case.answered(ticket)
            case.run()
            assert case.reason(waiting) == outcome

    def test_carry_while_paused_or_asleep_goes_on_with_the_new_model(self) -> None:
        for instruction in (ins.Pause, ins.Sleep):
            case = loaded()
            number = case.add("abcdef", n=2)
            case.step(2)
            case.ask(instruction)
            case.load("other", "carry")
            case.run()
            assert case.text(number, 1) == "abcdef"


class TestHeld:
    def test_instructions_given_after_a_reload_are_executed_in_order_after_it(self) -> None:
        case = loaded()
        ticket = reload(case)
        held = [case.call(ins.Pause), case.call(ins.Drain), case.call(ins.Resume), case.call(ins.Drain)]
        assert not any(map(case.answered, held))
        case.run_jobs()
        assert case.answered(ticket)
        assert isinstance(case.error(held[1]), IllegalStateError)
        case.step()
        order = list(case.box.replies)
        assert order.index(ticket) < order.index(held[0]) < order.index(held[2]) < order.index(held[3])

    def test_two_reloads_each_resolve_for_their_own(self) -> None:
        case = loaded()
        first, second = reload(case, "first"), reload(case, "second")
        case.run_jobs()
        assert case.answer(first).model == "first"
        assert case.answer(second).model == "second"
        assert names(case) == [True, True, False]

    def test_a_failed_reload_does_not_answer_for_the_next(self) -> None:
        case = loaded()
        case.loader.check_errors = {"bad": ReloadError("bad")}
        first, second = reload(case, "bad"), reload(case, "good")
        case.run_job()
        assert isinstance(case.error(first), ReloadError) and not case.answered(second)
        case.run_jobs()
        assert case.answer(second).model == "good"

    def test_an_unload_beside_a_reload_is_not_taken_for_it(self) -> None:
        case = loaded()
        first, unload, second = reload(case, "first"), case.call(ins.Unload), reload(case, "second")
        assert not case.answered(unload)
        case.run_jobs()
        assert case.answer(first).model == "first"
        assert case.answer(unload) is None
        assert case.answer(second).model == "second"
        assert names(case) == [True, True, False]
        assert case.state is EngineState.READY

    def test_what_arrived_in_a_step_comes_after_what_was_held(self) -> None:
        case = loaded()
        case.add("a", max_tokens=3)
        reload(case, "other", "wait")
        case.run_jobs()
        held = case.call(ins.Pause)
        later = case.reply_to()
        case.step(2)
        case.step(pending=[ins.Resume(later)])
        case.step()
        order = list(case.box.replies)
        assert order.index(held) < order.index(later.ticket)
        assert case.state is EngineState.READY

    def test_an_add_that_is_held_can_be_aborted(self) -> None:
        case = loaded()
        reload(case)
        gone, kept = case.new("abc", n=2), case.new("def")
        ticket = case.call(lambda to: case.adding(gone, to=to, epoch=2))
        both = case.call(lambda to: case.adding(case.new("x", request_id="byname"), kept, to=to, epoch=2))
        case.abort(gone.number)
        case.ask(lambda to: ins.AbortRequests((), ("byname",), to))
        case.run_jobs()
        assert case.answer(ticket) is True and case.answer(both) is True
        assert [case.reason(gone.number, branch) for branch in range(2)] == ["abort", "abort"]
        assert not case.core._cancelled
        case.run()
        assert case.text(kept.number) == "def"
        assert case.core.metrics().counters.requests["abort"] == 2

    def test_an_add_that_arrives_in_a_step_and_is_held_can_be_aborted(self) -> None:
        case = loaded()
        case.add("abcdef")
        case.step()
        reload(case)
        new = case.new("abc")
        case.core.step(lambda: [case.adding(new), ins.AbortRequests((new.number,))])
        case.give()
        case.run_jobs()
        assert case.reason(new.number) == "abort"
        assert not case.core._cancelled

    def test_aborts_are_not_held(self) -> None:
        case = loaded()
        number = case.add("abcdef")
        reload(case, "other", "wait")
        case.abort(number)
        assert case.ended(number)

    def test_unpin_is_not_held(self) -> None:
        case = loaded()
        case.add("abcdef", pin="p", max_tokens=0)
        case.run()
        reload(case, "other", "wait")
        assert case.ask(lambda to: ins.Unpin("p", to)) is True


class TestLostDevice:
    def test_while_loading_beside_finishes_the_load(self) -> None:
        case = loaded(max_num_sequence=1)
        lost, waiting = case.add("abc"), case.add("def")
        case.step()
        ticket = reload(case, "other", "carry")
        case.run_job()
        case.model.lose_device()
        case.step()
        steps = case.model.steps
        assert case.state is EngineState.LOADING
        assert case.reason(lost) == "error"
        case.step(3)
        assert case.model.steps == steps
        case.run_jobs()
        assert case.answered(ticket) and case.state is EngineState.READY
        case.run()
        assert case.text(waiting) == "def"

    def test_while_loading_beside_that_fails_too(self) -> None:
        case = loaded(max_num_sequence=1)
        case.add("abc")
        waiting = case.add("def")
        case.step()
        case.loader.load_errors = {"other": ReloadError("x")}
        reload(case, "other", "carry")
        case.run_job()
        case.model.lose_device()
        case.step()
        case.run_jobs()
        assert case.state is EngineState.FAILED
        case.call(ins.Restart)
        case.run_jobs()
        case.run()
        assert case.text(waiting) == "def"

    def test_while_checking_loads_alone(self) -> None:
        case = loaded()
        case.add("abc")
        reload(case)
        case.model.lose_device()
        case.step()
        case.run_job()
        assert names(case) == [True]
        case.run_jobs()
        assert case.state is EngineState.READY


class TestShutdown:
    @pytest.mark.parametrize("jobs", [0, 1])
    @FITS
    def test_during_a_load_lets_the_model_go_that_arrives_later(self, fits_beside: bool, jobs: int) -> None:
        case = loaded(fits_beside=fits_beside)
        number = case.add("abc")
        ticket = reload(case, "other", "carry")
        for _ in range(jobs):
            case.run_job()
        held = case.call(ins.Reset)
        shutdown = case.shutdown()
        assert isinstance(case.error(ticket), EngineClosedError)
        assert isinstance(case.error(held), EngineClosedError)
        assert case.answer(shutdown) == (f"r{number}",)
        case.run_jobs()
        assert all(names(case))

    def test_while_requests_in_flight_finish_lets_both_models_go(self) -> None:
        case = loaded()
        number = case.add("abc")
        reload(case, "other", "wait")
        case.run_jobs()
        shutdown = case.shutdown(drain=10)
        case.step(10)
        assert case.answer(shutdown) == ()
        assert case.text(number) == "abc"
        assert names(case) == [True, True]

    def test_from_nothing(self) -> None:
        case = Case(ScriptedLoader())
        ticket = reload(case)
        case.run_job()
        shutdown = case.shutdown(drain=10)
        assert isinstance(case.error(ticket), EngineClosedError)
        assert case.answer(shutdown) == ()
        case.run_jobs()
        assert names(case) == [True]

    def test_after_it_a_load_that_fails_harms_nobody(self) -> None:
        case = Case(ScriptedLoader())
        reload(case)
        case.shutdown()
        case.run_job(error=OSError("x"))
        assert case.state is EngineState.CLOSED


class TestLoadersThatBreakTheirPromise:
    def test_a_check_that_returns_nothing(self) -> None:
        case = loaded()
        ticket = reload(case)
        [(job, _)] = case.jobs
        case.jobs.clear()
        case.give(JobDone(job, None))
        assert isinstance(case.error(ticket), ReloadError)
        assert case.state is EngineState.READY

    @FITS
    def test_a_load_that_returns_nothing(self, fits_beside: bool) -> None:
        case = loaded(fits_beside=fits_beside)
        ticket = reload(case)
        case.run_job()
        [(job, _)] = case.jobs
        case.jobs.clear()
        case.give(JobDone(job, None))
        assert isinstance(case.error(ticket), ReloadError)
        assert case.state is (EngineState.READY if fits_beside else EngineState.UNLOADED)
        case.load("good")

    @FITS
    def test_limits_that_cannot_be_served(self, fits_beside: bool) -> None:
        """The tables of slots do not fit into memory."""
        case = loaded(fits_beside=fits_beside)
        number = case.add("abc")
        case.step()
        ticket = reload(case, "huge", "carry", max_num_sequence=2**40, max_single_sequence_length=2**40)
        held = reload(case, "good")
        case.run_jobs()
        assert isinstance(case.error(ticket), ReloadError)
        assert case.answer(held).model == "good"
        assert isinstance(case.end_error(number), ReloadError)
        assert names(case) == [True, True, False]

    def test_a_job_that_cannot_be_started(self) -> None:
        loader = ScriptedLoader()
        broken = True

        def start(job: int, function: Any) -> None:
            if broken:
                raise RuntimeError("can't start new thread")
            case.jobs.append((job, function))

        case = Case(loader)
        case.core = Core(loader, start, clock=lambda: case.now)
        ticket = reload(case)
        assert isinstance(case.error(ticket).__cause__, RuntimeError)
        assert case.state is EngineState.UNLOADED
        broken = False
        case.load()
        broken = True
        second = reload(case)
        assert case.answered(second) and case.state is EngineState.READY

    @FITS
    def test_an_old_model_that_cannot_be_closed(self, fits_beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded(fits_beside=fits_beside)
        monkeypatch.setattr(case.model, "close", lambda: 1 / 0)
        ticket = reload(case)
        case.run_jobs()
        assert isinstance(case.error(ticket), ReloadError)
        assert case.state is EngineState.UNLOADED
        case.load("good")

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_a_new_model_that_cannot_be_closed_when_a_shutdown_gives_it_up(
        self, jobs: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        case = loaded()
        number = case.add("abc")
        ticket = reload(case, "other", "wait")
        for _ in range(jobs):
            case.run_job()
        monkeypatch.setattr(ScriptedModel, "close", lambda model: 1 / 0)
        shutdown = case.shutdown()
        assert case.answer(shutdown) == (f"r{number}",)
        assert isinstance(case.error(ticket), EngineClosedError)
        case.run_jobs()
        assert case.state is EngineState.CLOSED
        assert "could not be let go" in caplog.text

    def test_neither_model_can_be_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = loaded()
        ticket = reload(case)
        with monkeypatch.context() as patch:
            patch.setattr(ScriptedModel, "close", lambda model: 1 / 0)
            case.run_jobs()
        assert isinstance(case.error(ticket), ReloadError)
        assert case.state is EngineState.UNLOADED
        case.load("good")


def test_a_job_may_end_before_it_is_waited_for() -> None:
    """A loader that works inline: its outcome is there before the instruction is through."""
    loader, done = ScriptedLoader(), []

    def inline(job: int, function: Any) -> None:
        done.append(JobDone(job, function()))

    core = Core(loader, inline)
    core.handle([ins.Reload(EngineConfig("x"))])
    while done:
        core.handle([done.pop(0)])
    assert core.state is EngineState.READY
