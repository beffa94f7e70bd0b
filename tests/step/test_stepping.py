"""Steps that are launched ahead of the tokens of the steps before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from asyncengine import instructions as ins
from asyncengine.errors import DeadlineExceededError, RequestDroppedError, StepError
from asyncengine.events import Tokens
from asyncengine.instructions import Deadlines, ReplyTo
from asyncengine.outputs import FinishReason
from asyncengine.state import EngineState
from asyncengine.step.batch import StepBatch, StepTokens
from asyncengine.testing.scripted import DeviceLostError
from tests.speculation.drafters import Oracle

from .core_case import EOS, Case, answer, config, loaded


class Log:
    """What a case's model is asked, in order: ("launch", rows), ("collect", rows), ("execute", rows)."""

    def __init__(self, case: Case) -> None:
        self.calls: list[tuple[str, int]] = []
        self.batches: list[StepBatch] = []
        model = case.model
        launch, collect, execute = model.launch, model.collect, model.execute
        rows: dict[int, int] = {}

        def launching(batch: StepBatch) -> Any:
            flight = launch(batch)
            rows[id(flight)] = len(batch.context_lens)
            self.note("launch", batch)
            return flight

        def collecting(flight: Any) -> StepTokens:
            self.calls.append(("collect", rows.pop(id(flight), -1)))  # -1: it was launched before
            return collect(flight)

        def executing(batch: StepBatch) -> StepTokens:
            self.note("execute", batch)
            return execute(batch)

        for name, function in (("launch", launching), ("collect", collecting), ("execute", executing)):
            setattr(model, name, function)

    def note(self, what: str, batch: StepBatch) -> None:
        self.calls.append((what, len(batch.context_lens)))
        self.batches.append(batch)

    @property
    def words(self) -> str:
        """First letters."""
        return "".join(call[0][0] for call in self.calls)


def ahead(script: Any = None, **changes: Any) -> Case:
    return loaded(run_ahead=True, **changes) if script is None else loaded(script, run_ahead=True, **changes)


def under_way(case: Case) -> bool:
    return case.core.stepping.under_way


class TestOrder:
    def test_a_step_is_launched_before_the_one_before_is_collected(self) -> None:
        case = ahead()
        case.add("abcd")
        log = Log(case)
        case.step()
        assert log.words == "lc"  # nothing can follow a prefill that is alone
        case.step()
        assert log.words == "lc" + "llc"
        assert under_way(case)
        case.step()
        assert log.words == "lc" + "llc" + "lc"

    def test_one_step_is_committed_at_a_time(self) -> None:
        case = ahead()
        number = case.add("abcdefgh")
        for length in range(1, 7):
            case.step()
            assert len(case.tokens(number)) == length

    def test_tokens_that_the_host_does_not_know_are_marked(self) -> None:
        case = ahead()
        case.add("abcdefghijkl")
        log = Log(case)
        case.step(3)
        assert [batch.unknown is not None for batch in log.batches] == [False, False, True, True]
        case.add("efgh")
        case.step(4)
        marks = [None if batch.unknown is None else batch.unknown.tolist() for batch in log.batches]
        assert marks[4:] == [[True], [True], [True, False], [True, True]]  # its first token was known when it joined

    def test_positions_and_places_are_those_of_steps_one_by_one(self) -> None:
        logs = []
        for run_ahead in (False, True):
            case = loaded(run_ahead=run_ahead)
            case.add("abcdefghij", max_tokens=9, seed=3)
            logs.append(Log(case))
            case.run()
        assert len(logs[0].batches) == len(logs[1].batches)
        for one, other in zip(logs[0].batches, logs[1].batches, strict=True):
            for name in ("positions", "context_lens", "slot_mapping", "sample_slots", "sample_positions"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name

    def test_an_empty_engine_comes_to_rest(self) -> None:
        case = ahead()
        case.add("abcd")
        case.run()
        assert not under_way(case) and not case.core.runnable
        assert case.pool.num_used == 0

    def test_a_model_that_cannot_is_executed(self) -> None:
        case = loaded()
        case.add("abcd")
        log = Log(case)
        case.run()
        assert log.words == "e" * 5

    def test_prefill_chunks_are_launched_one_after_the_other(self) -> None:
        case = ahead(prefill_chunk_size=4)
        number = case.add("abcdefghij", max_tokens=1)
        log = Log(case)
        case.run()
        assert log.words == "llc" + "lc" + "c"
        assert case.text(number) == "a"

    def test_one_that_starts_joins_the_step_that_is_launched_next(self) -> None:
        case = ahead()
        case.add("abcdefghi")
        case.step(2)
        log = Log(case)
        late = case.add("xyz")
        case.step(2)
        assert [rows for what, rows in log.calls if what == "launch"] == [2, 1]
        assert case.text(late) == "x"


class TestEnds:
    def test_a_length_costs_no_row(self) -> None:
        case = ahead()
        numbers = [case.add("abcdefgh", max_tokens=3), case.add("ijklmnop", max_tokens=5)]
        case.run()
        assert [case.reason(number) for number in numbers] == [FinishReason.LENGTH] * 2
        assert case.model.batches == [(2, 16), (2, 2), (2, 2), (1, 1), (1, 1)]

    def test_the_models_limit_costs_no_row(self) -> None:
        case = ahead(answer("x" * 99), max_total_sequence_length=12)
        number = case.add("abcdef", max_tokens=6)
        case.run()
        assert len(case.tokens(number)) == 6
        assert case.model.steps == 6

    @pytest.mark.parametrize("stop", [{}, {"stop_strs": ("cd",)}, {"stop_token_ids": (EOS, ord("d"))}])
    def test_any_other_end_costs_one(self, stop: dict[str, Any]) -> None:
        counts = []
        for run_ahead in (False, True):
            case = loaded(run_ahead=run_ahead)
            number, other = case.add("abcd", **stop), case.add("efghijkl")
            case.run()
            assert case.reason(number) is FinishReason.STOP
            assert case.tokens(number) == [*b"abcd", *([] if stop else [EOS])]
            assert case.text(other) == "efghijkl"
            assert case.usage(number).completion_tokens == len(case.tokens(number))
            counts.append(sum(rows for rows, _ in case.model.batches))
        assert counts[1] == counts[0] + 2  # one for each of the two

    def test_what_has_ended_is_free_though_its_row_is_still_computed(self) -> None:
        case = ahead(max_num_sequence=1)
        first, second = case.add("ab"), case.add("xyz")
        case.step(3)
        assert case.ended(first) and under_way(case)
        assert case.pool.num_used == 0
        case.step()  # the same slot and, without a cache, the same blocks
        assert case.tokens(second) == []
        case.run()
        assert case.text(second) == "xyz"

    def test_an_abort_takes_effect_before_the_tokens_of_the_step(self) -> None:
        case = ahead()
        number, other = case.add("abcdef"), case.add("uvwxyz")
        case.step(3)
        assert len(case.tokens(number)) == 3
        case.step(pending=[ins.AbortRequests((number,), (), case.reply_to())])
        assert len(case.tokens(number)) == 3
        assert case.reason(number) is FinishReason.ABORT and case.usage(number).completion_tokens == 3
        case.run()
        assert case.text(other) == "uvwxyz"

    def test_an_abort_between_steps_drops_the_token_under_way(self) -> None:
        case = ahead()
        number = case.add("abcdef")
        case.step(3)
        assert under_way(case)
        case.abort(number)
        assert case.pool.num_used == 0 and len(case.tokens(number)) == 3
        assert case.core.runnable  # what is under way is to be collected
        case.run()
        assert len(case.tokens(number)) == 3 and not under_way(case)

    def test_a_deadline_does(self) -> None:
        case = ahead()
        number = case.add("abcdef", deadlines=Deadlines(total=2))
        case.step(3)
        case.now += 3
        case.step()
        assert isinstance(case.end_error(number), DeadlineExceededError)
        assert case.usage(number).completion_tokens == 3

    def test_a_token_that_could_not_be_drawn_for_a_branch_that_has_ended_ends_nobody(self) -> None:
        case = ahead(lambda prompt, branch: [*b"ab"] if branch == 0 else [*b"abcdefgh"])
        number = case.add("xyz", n=2)
        case.step(2)
        collect = case.model.collect

        def failing(flight: Any) -> StepTokens:
            tokens = collect(flight)
            return StepTokens(tokens.token_ids, failed={0: ValueError("a row that counts no more")})

        case.step()
        assert case.reason(number, 0) is FinishReason.STOP and under_way(case)
        case.model.collect = failing  # type: ignore[method-assign]
        case.step()
        case.model.collect = collect  # type: ignore[method-assign]
        case.run()
        assert case.text(number, 1) == "abcdefgh"

    def test_one_of_a_branch_that_goes_on_ends_its_request(self) -> None:
        case = ahead()
        number, other = case.add("abcdefgh"), case.add("ijklmnop")
        case.step(3)
        collect = case.model.collect

        def failing(flight: Any) -> StepTokens:
            return StepTokens(collect(flight).token_ids, failed={0: ValueError("x")})

        case.model.collect = failing  # type: ignore[method-assign]
        case.step()
        case.model.collect = collect  # type: ignore[method-assign]
        assert isinstance(case.end_error(number), RequestDroppedError)
        case.run()
        assert case.text(other) == "ijklmnop"

    def test_keys_of_tokens_stay_the_same_object_while_the_same_ones_decode(self) -> None:
        case = ahead()
        first = case.add("abc")
        for text in ("defghijklm", "nopqrstuvw"):
            case.add(text)
        case.run()
        keys = [event.keys for event in case.box.log if isinstance(event, Tokens)]
        pairs = [key for key in keys if len(key) == 2 and (first, 0) not in key]
        assert len({id(key) for key in pairs}) == 1 < len(pairs)


BOUND: dict[str, dict[str, Any]] = {
    "bad words": {"bad_words": ((1, 2),)},
    "prompt log-probabilities": {"num_prompt_logprobs": 0},
}


class TestWhatNeedsTheTokensFirst:
    @pytest.mark.parametrize("why", BOUND)
    def test_is_executed_and_so_is_whoever_is_beside_it(self, why: str) -> None:
        case = ahead()
        other = case.add("abcdefghijkl")
        case.step(3)
        log = Log(case)
        number = case.add("xyz", **BOUND[why])
        case.step(2)
        assert log.calls == [("collect", -1), ("execute", 2)]
        case.run()
        assert (case.text(number), case.text(other)) == ("xyz", "abcdefghijkl")
        assert "llc" in log.words  # afterwards, steps are launched ahead again

    def test_one_that_cannot_start_keeps_nobody_from_running_ahead(self) -> None:
        case = ahead(max_total_sequence_length=32)
        first = case.add("abcdefghijklmnop", max_tokens=14)
        case.step(2)
        second = case.add("uvwxyz" * 3, max_tokens=2, bad_words=((1,),))
        log = Log(case)
        case.step(3)
        assert log.words == "lclclc"
        case.run()
        assert (case.text(first), case.text(second)) == ("abcdefghijklmn", "uv")

    def test_decoding_with_bad_words_goes_step_by_step(self) -> None:
        case = ahead()
        case.add("abcdef", bad_words=((1, 2),))
        log = Log(case)
        case.run()
        assert set(log.words) == {"e"}

    def test_speculation_does(self) -> None:
        case = ahead()
        case.loader.make_drafter = Oracle
        case.load("other", speculative_mode="ngram")
        number = case.add("abcdefghij")
        log = Log(case)
        case.run()
        assert case.text(number) == "abcdefghij" and case.usage(number).draft_tokens > 0
        assert set(log.words) == {"e"}

    def test_nobody_is_preempted_while_a_step_is_under_way(self) -> None:
        case = ahead(max_total_sequence_length=32, prefix_cache_mode="disable")
        scheduler = case.core.scheduler
        assert scheduler is not None
        preempt, calls = scheduler.preempt, []

        def watched(sequence: Any) -> None:
            assert not under_way(case)
            calls.append(sequence)
            preempt(sequence)

        scheduler.preempt = watched  # type: ignore[method-assign]
        numbers = [case.add(text) for text in ("abcdefgh", "ijklmnop", "qrstuvwx")]
        case.run()
        assert calls
        assert [case.text(number) for number in numbers] == ["abcdefgh", "ijklmnop", "qrstuvwx"]


INSTRUCTIONS: dict[str, tuple[Callable[[ReplyTo], ins.Instruction], EngineState]] = {
    "reload": (lambda to: ins.Reload(config("other"), "abort", to), EngineState.LOADING),
    "unload": (ins.Unload, EngineState.UNLOADED),
    "reset": (ins.Reset, EngineState.READY),
    "pause": (ins.Pause, EngineState.PAUSED),
    "sleep": (ins.Sleep, EngineState.SLEEPING),
    "update_weights": (lambda to: ins.UpdateWeights({"w": 1}, to), EngineState.READY),
    "debug_call": (lambda to: ins.DebugCall("lose_device", (), to), EngineState.READY),
}


class TestInstructions:
    @pytest.mark.parametrize("name", INSTRUCTIONS)
    def test_one_that_touches_the_model_waits_for_the_step_under_way(self, name: str) -> None:
        make, state = INSTRUCTIONS[name]
        case = ahead()
        number = case.add("abcdefgh")
        case.step(3)
        log = Log(case)
        ticket = case.call(make)
        assert log.words == "c"
        assert not under_way(case)
        assert len(case.tokens(number)) == 4  # its token counts
        assert case.state is state
        assert name == "reload" or case.answered(ticket)

    def test_an_abort_that_arrives_meanwhile_takes_effect_before_its_tokens(self) -> None:
        case = ahead()
        number, other = case.add("abcdefgh"), case.add("ijklmnop")
        case.step(3)
        abort, resume = ins.AbortRequests((number,), (), case.reply_to()), ins.Resume(case.reply_to())
        arriving = [abort, resume]

        def pending() -> list[ins.Instruction]:
            taken: list[ins.Instruction] = [*arriving]
            arriving.clear()
            return taken

        case.core.stepping._pending = pending
        case.give(ins.Pause())
        assert len(case.tokens(number)) == 3 and len(case.tokens(other)) == 4
        assert case.state is EngineState.READY  # what arrived was executed afterwards, in order
        assert abort.reply_to is not None and case.answered(abort.reply_to.ticket)
        case.run()
        assert case.text(other) == "ijklmnop"

    @pytest.mark.parametrize("in_flight", ["carry", "wait", "abort"])
    @pytest.mark.parametrize("fits_beside", [True, False])
    def test_a_reload_loses_no_token(self, in_flight: ins.InFlight, fits_beside: bool) -> None:
        case = ahead(fits_beside=fits_beside)
        number = case.add("abcdefgh")
        case.step(3)
        ticket = case.call(lambda to: ins.Reload(config("other"), in_flight, to))
        for _ in range(20):
            case.step()
            if case.jobs:
                case.run_job()
        assert case.answered(ticket) and len(case.loader.models) == 2
        case.run()
        assert case.ended(number)
        assert case.text(number) == "abcdefgh"[: None if in_flight != "abort" else len(case.text(number))]

    def test_a_shutdown_collects_it(self) -> None:
        case = ahead()
        number = case.add("abcdefgh")
        case.step(3)
        log = Log(case)
        case.shutdown()
        assert log.words == "c" and case.core.closed
        assert case.usage(number).completion_tokens == 4

    def test_requests_pins_and_drains_do_not_wait_for_it(self) -> None:
        case = ahead()
        case.add("abcdefgh")
        case.step(3)
        log = Log(case)
        case.add("xyz")
        case.ask(lambda to: ins.Unpin("nobody", to))
        case.call(ins.Drain)
        assert log.words == "" and under_way(case)
        case.run()
        assert case.state is EngineState.READY


class TestFaults:
    """`early` is in the failing step and the one after it, `late` in the one after it alone."""

    def two(self, *, fault: BaseException | None = None, **changes: Any) -> tuple[Case, int, int]:
        """A case in which a step is under way that `early` is in; the next step has `late`, too."""
        case = ahead(**changes)
        early = case.add("abcdefgh")
        case.step(2)
        if fault is not None:
            case.model.fail_next(fault)
        case.step()
        late = case.add("uvwxyz")
        assert under_way(case)
        return case, early, late

    def test_a_step_that_fails_ends_who_is_in_it(self) -> None:
        cause = ValueError("a bad kernel")
        case, early, late = self.two(fault=cause)
        case.step()
        error = case.end_error(early)
        assert isinstance(error, StepError) and error.__cause__ is cause
        assert case.usage(early).completion_tokens == 3 == len(case.tokens(early))
        assert not under_way(case) and not case.ended(late)
        case.run()
        assert case.text(late) == "uvwxyz"
        assert case.usage(late).preemptions == 1
        assert case.core.metrics().counters.failed_steps == 1

    def test_a_launch_that_fails_ends_who_is_in_it_after_the_tokens_of_the_step_before(self) -> None:
        case, early, late = self.two()
        case.model.fail_next_launch(ValueError("no room"))
        case.step()
        for number in (early, late):
            assert isinstance(case.end_error(number), StepError)
        assert case.text(early) == "abcd" and case.text(late) == ""
        assert not under_way(case) and case.pool.num_used == 0

    def test_a_launch_that_fails_spares_who_is_complete_by_then(self) -> None:
        case = ahead()
        done, other = case.add("abcdefgh", max_tokens=4), case.add("ijklmnop")
        case.step(3)
        case.model.fail_next_launch(ValueError("no room"))
        case.step()
        assert case.reason(done) is FinishReason.LENGTH
        assert case.reason(other) is FinishReason.ERROR

    def test_a_first_launch_that_fails(self) -> None:
        case = ahead()
        case.model.fail_next_launch(ValueError("no room"))
        number = case.add("abc")
        case.run()
        assert isinstance(case.end_error(number), StepError)
        again = case.add("abc")
        case.run()
        assert case.text(again) == "abc"

    def test_a_step_and_the_launch_behind_it(self) -> None:
        case, early, late = self.two(fault=ValueError("one"))
        case.model.fail_next_launch(ValueError("two"))
        case.step()
        assert str(case.end_error(early).__cause__) == "one"
        case.run()
        assert case.text(late) == "uvwxyz"
        assert case.core.metrics().counters.failed_steps == 2

    def test_a_step_that_was_dropped_may_fail_too(self) -> None:
        case, early, late = self.two(fault=ValueError("one"))
        collect = case.model.collect

        def failing(flight: Any) -> StepTokens:
            collect(flight)
            raise ValueError("both")

        case.model.collect = failing  # type: ignore[method-assign]
        case.step()
        case.model.collect = collect  # type: ignore[method-assign]
        assert case.ended(early) and not case.ended(late)
        case.run()
        assert case.text(late) == "uvwxyz"

    def test_only_the_rows_that_count_are_in_it(self) -> None:
        case = ahead(lambda prompt, branch: [*b"ab"] if branch == 0 else [*b"abcdefgh"], max_num_sequence=2)
        number, waiting = case.add("xyz", n=2), case.add("mno", n=2)
        case.step(2)
        case.model.fail_next(ValueError("x"))
        case.step()
        assert case.reason(number, 0) is FinishReason.STOP  # its row in the failing step counts no more
        case.step()
        assert case.reason(number, 1) is FinishReason.ERROR
        assert not case.ended(waiting)
        case.run()
        assert case.reason(waiting, 1) is FinishReason.STOP

    def test_a_step_of_rows_that_count_no_more_ends_nobody(self) -> None:
        case = ahead(max_num_sequence=1)
        first, second = case.add("ab"), case.add("xyz")
        case.step(2)
        case.model.fail_next(ValueError("x"))
        case.step()
        assert case.reason(first) is FinishReason.STOP and under_way(case)
        case.run()
        assert case.text(second) == "xyz"

    def test_nothing_of_a_failed_step_is_in_the_prefix_cache(self) -> None:
        """Every check of a case compares the prefix cache with what the model has stored."""
        case = ahead(prefill_chunk_size=4)
        number = case.add("abcdefghijklmnop")
        case.step(2)
        case.model.fail_next(ValueError("x"))
        case.run()
        assert case.ended(number)
        again = case.add("abcdefghijklmnop")
        case.run()
        assert case.text(again) == "abcdefghijklmnop"

    @pytest.mark.parametrize("where", ["step", "launch", "dropped"])
    def test_a_lost_device(self, where: str) -> None:
        case, early, late = self.two(fault=None if where == "launch" else ValueError("one"))
        collect, flights = case.model.collect, []

        def losing(flight: Any) -> StepTokens:
            flights.append(flight)
            if len(flights) == (1 if where == "step" else 2):
                raise DeviceLostError("gone")
            return collect(flight)

        if where == "launch":
            case.model.fail_next_launch(DeviceLostError("gone"))
        else:
            case.model.collect = losing  # type: ignore[method-assign]
        case.step()
        assert case.state is EngineState.FAILED
        assert not under_way(case) and not case.core.runnable
        assert case.ended(early) and case.ended(late) == (where == "launch")
        case.call(ins.Restart)
        case.run_jobs()
        case.run()
        assert where == "launch" or case.text(late) == "uvwxyz"

    def test_a_lost_device_while_a_step_is_landed_for_an_instruction(self) -> None:
        case, _, late = self.two(fault=DeviceLostError("gone"))
        ticket = case.call(ins.Pause)
        assert type(case.error(ticket)).__name__ == "EngineFailedError"
        assert case.state is EngineState.FAILED and not case.ended(late)

    def test_a_defect_of_ours_ends_everybody_and_the_engine_goes_on(self) -> None:
        case, early, late = self.two()

        def defect(*_: Any) -> None:
            raise ZeroDivisionError("ours")

        case.core.commits.commit = defect  # type: ignore[method-assign]
        case.step()
        del case.core.commits.commit
        assert case.ended(early) and case.ended(late) and not under_way(case)
        again = case.add("abc")
        case.run()
        assert case.text(again) == "abc"


def different(prompt: Sequence[int], branch: int) -> Iterable[int]:
    return [97 + (sum(prompt) + 3 * branch + i * i) % 26 for i in range(4 + (sum(prompt) + 5 * branch) % 19)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefill_chunk_size": 3},
        {"max_total_sequence_length": 64},
        {"prefill_mode": "chunked", "max_num_sequence": 3},
        {"prefix_cache_mode": "disable", "max_total_sequence_length": 52},
    ],
)
def test_what_is_generated_is_the_same(changes: dict[str, Any]) -> None:
    found = []
    for run_ahead in (False, True):
        case = loaded(different, run_ahead=run_ahead, **changes)
        numbers = [
            case.add("abcdefgh"[: 2 + i % 7] * (1 + i % 2), n=1 + i % 3, max_tokens=5 + 4 * (i % 4), num_logprobs=1)
            for i in range(12)
        ]
        case.run()
        keys = [(number, branch) for i, number in enumerate(numbers) for branch in range(1 + i % 3)]
        found.append(
            [(case.tokens(*key), case.reason(*key), case.box.logprobs[key], case.box.branch_ends[key]) for key in keys]
        )
        assert case.pool.num_used == 0
    assert found[0] == found[1]
