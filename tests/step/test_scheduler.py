"""Which sequences take part in a step, on counted blocks. The model is whoever draws the next token."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from asyncengine import instructions as ins
from asyncengine.step.decode_rows import DecodeRows
from asyncengine.step.sequence import Request, SequenceState

from .core_case import loaded, prompt_of
from .line import Line


def states(request: Request) -> list[str]:
    return [branch.state.value for branch in request.branches]


class TestPrefill:
    def test_is_cut_into_chunks_of_the_budget(self) -> None:
        line = Line(prefill_chunk_size=8)
        line.add("a" * 20)
        plans = [line.step() for _ in range(4)]
        assert [[chunk.count for chunk in plan.chunks] for plan in plans] == [[8], [8], [4], []]
        assert [[chunk.last for chunk in plan.chunks] for plan in plans] == [[False], [False], [True], []]
        assert [len(plan.batch.sample_index) for plan in plans] == [0, 0, 1, 1]

    def test_the_budget_is_shared_in_order_of_arrival(self) -> None:
        line = Line(prefill_chunk_size=8)
        first, second, third = line.add("a" * 6), line.add("b" * 6), line.add("c" * 3)
        plan = line.step()
        assert [(chunk.sequence.request, chunk.count) for chunk in plan.chunks] == [(first, 6), (second, 2)]
        plan = line.step()
        assert [(chunk.sequence.request, chunk.count) for chunk in plan.chunks] == [(second, 4), (third, 3)]

    def test_a_prompt_that_has_begun_goes_before_a_more_urgent_one_that_has_not(self) -> None:
        line = Line(prefill_chunk_size=8)
        begun = line.add("a" * 20)
        line.step()
        urgent = line.add("b" * 4, priority=-5)
        assert [chunk.sequence.request for chunk in line.step().chunks] == [begun]
        assert [chunk.sequence.request for chunk in line.step().chunks] == [begun, urgent]

    def test_nothing_is_drawn_for_a_request_that_wants_no_tokens(self) -> None:
        line = Line()
        request = line.add("abc", n=2, max_tokens=0)
        plan = line.schedule()
        assert plan.chunks[0].last and plan.chunks[0].branches == ()
        line.scheduler.advance(plan)
        line.end(request)
        assert line.scheduler.slots.num_free == 8


class TestWholePrompts:
    """Of models in which tokens look at those behind them."""

    @staticmethod
    def line(**changes: Any) -> Line:
        return Line(prefill_chunk_size=8, whole_prompts=True, prefix_cache=False, **changes)

    @staticmethod
    def counts(line: Line, steps: int) -> list[list[int]]:
        found = []
        for _ in range(steps):
            plan = line.schedule()
            found.append([chunk.count for chunk in plan.chunks])
            assert all(chunk.last for chunk in plan.chunks)
            line.scheduler.advance(plan)
            for chunk in plan.chunks:
                line.end(chunk.sequence.request)
        assert line.scheduler.schedule() is None
        return found

    def test_are_never_parted_be_they_longer_than_a_step(self) -> None:
        line = self.line()
        for length in (6, 20, 6, 8):
            line.add("a" * length, pooling="mean", max_tokens=0)
        assert self.counts(line, 4) == [[6], [20], [6], [8]]

    def test_shorter_ones_go_before_one_that_does_not_fit_once(self) -> None:
        line = self.line()
        for length in (5, 20, 3, 2, 4):
            line.add("a" * length, pooling="mean", max_tokens=0)
        assert self.counts(line, 3) == [[5, 3], [20], [2, 4]]

    def test_where_they_are_pooled_and_of_which_text_their_tokens_are(self) -> None:
        line = self.line()
        for pooling, second in (("mean", None), ("cls", 2), ("last", 1)):
            line.add("ab" if second is None else "abc", pooling=pooling, second=second, max_tokens=0)  # type: ignore[arg-type]
        batch = line.schedule().batch
        assert batch.pool_spans.tolist() == [[0, 2], [2, 3], [7, 8]]
        assert batch.token_types is not None
        assert batch.token_types.tolist() == [0, 0, 0, 0, 1, 0, 1, 1]

    def test_one_text_has_no_types(self) -> None:
        line = self.line()
        line.add("ab", pooling="cls", max_tokens=0)
        assert line.schedule().batch.token_types is None


class TestDecodes:
    def test_never_wait_for_a_long_prefill(self) -> None:
        line = Line(prefill_chunk_size=4)
        short = line.add("ab")
        line.step()
        line.add("c" * 40)
        for _ in range(10):
            plan = line.step()
            assert plan.decodes == [short.branches[0]]
            assert [chunk.count for chunk in plan.chunks] == [4]

    def test_wait_for_prefills_where_steps_are_not_mixed(self) -> None:
        line = Line(prefill_chunk_size=4, hybrid=False)
        line.add("ab")
        line.step()
        line.add("c" * 8)
        plans = [line.step() for _ in range(3)]
        assert [(len(plan.decodes), len(plan.chunks)) for plan in plans] == [(0, 1), (0, 1), (2, 0)]

    def test_are_the_same_list_while_they_stay_the_same(self) -> None:
        line = Line()
        line.add("ab")
        line.step()
        first, second = line.step(), line.step()
        assert first.decodes is second.decodes
        line.add("cd")
        third, fourth = line.step(), line.step()
        assert third.decodes is first.decodes
        assert fourth.decodes is not first.decodes

    def test_enter_their_blocks_each_at_its_own_step(self) -> None:
        line = Line()
        for length in (1, 3, 4, 6, 9):
            line.add("a" * length)
        line.step(15)  # `Line.check` compares each batch with the slot table
        late = line.add("b" * 7)
        line.step(2)
        assert late.branches[0].state is SequenceState.DECODE
        line.step(10)
        line.end(late)
        line.step(5)

    def test_are_looked_up_only_where_a_block_begins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looked_up = []
        monkeypatch.setattr(
            DecodeRows, "lacking", lambda self, lacking=DecodeRows.lacking: looked_up.append(self) or lacking(self)
        )
        line = Line()
        for length in (1, 3, 3):
            line.add("a" * length)
        line.step(2)
        looked_up.clear()
        line.step(12)
        assert len(looked_up) == 2 * 12 // 4  # in four steps, one row enters a block in one, and two in another

    @pytest.mark.parametrize("chunks", [1, 3, 4, 5, 9])
    @pytest.mark.parametrize("spare", [0, 4])
    def test_have_all_their_blocks_after_steps_beside_a_prompt_that_came_to_nothing(
        self, chunks: int, spare: int
    ) -> None:
        line = Line(prefill_chunk_size=4)
        long = line.add("a" * 16)
        line.step(4)
        line.add("b")
        line.step()
        # Drafts that were not kept leave blocks behind.
        line.scheduler.slots.append_blocks(long.branches[0].slot, line.scheduler.blocks.pool.allocate(spare))
        same = line.step().decodes
        given_up = line.add("c" * 40)
        line.step(chunks)
        line.end(given_up)
        for _ in range(6):
            assert line.step().decodes is same  # `Line.check` compares each batch with the slot table

    def test_are_known_to_be_unknown_while_their_step_is_under_way(self) -> None:
        line = Line()
        line.add("abc")
        line.step()
        launched = line.schedule()
        line.scheduler.advance(launched)
        ahead = line.scheduler.schedule(ahead=True)
        assert ahead is not None and ahead.batch.unknown is not None and ahead.batch.unknown.tolist() == [True]
        assert ahead.batch.positions.tolist() == [launched.batch.positions[0] + 1]
        line.scheduler.settle(launched)
        line.scheduler.slots.append_tokens(launched.decode_slots, prompt_of("x"))
        again = line.scheduler.schedule(ahead=True)
        assert again is not None and again.batch.unknown is None
        assert again.batch.token_ids.tolist() == [ord("x")]

    def test_lie_before_prefills_in_the_batch(self) -> None:
        line = Line()
        line.add("ab")
        line.step()
        line.add("cdef")
        batch = line.schedule().batch
        assert batch.num_decodes == 1
        assert batch.query_start.tolist() == [0, 1, 5]
        assert batch.token_ids.tolist() == [65, *b"cdef"]
        assert batch.positions.tolist() == [2, 0, 1, 2, 3]
        assert batch.context_lens.tolist() == [2, 0]
        assert batch.sample_index.tolist() == [0, 4]
        assert batch.sample_positions.tolist() == [1, 0]


class TestOrder:
    def test_is_first_come_first_served(self) -> None:
        line = Line(max_num_sequence=1)
        requests = [line.add("ab") for _ in range(3)]
        for request in requests:
            assert line.step().chunks[0].sequence.request is request
            line.end(request)

    def test_is_by_priority_first(self) -> None:
        line = Line(max_num_sequence=1)
        later, urgent = line.add("ab", priority=1), line.add("cd", priority=0)
        assert line.step().chunks[0].sequence.request is urgent
        line.end(urgent)
        assert line.step().chunks[0].sequence.request is later

    def test_nobody_overtakes_a_head_for_which_there_are_no_blocks(self) -> None:
        line = Line(num_blocks=6, prefix_cache=False)
        line.add("a" * 12)
        line.step()
        big, small = line.add("b" * 12), line.add("c")
        line.step()
        assert states(big) == states(small) == ["waiting"]


class TestPreemption:
    def full(self, **changes: Any) -> tuple[Line, list[Request]]:
        """Three sequences that fill a cache of six blocks to the last token."""
        line = Line(**({"num_blocks": 6, "prefix_cache": False} | changes))
        requests = [line.add("abcd") for _ in range(3)]
        line.step()
        for _ in range(3):
            line.step()
        return line, requests

    def test_preempts_newest_when_blocks_run_out(self) -> None:
        line, requests = self.full()
        line.step(2)
        assert [states(request) for request in requests] == [["decode"], ["decode"], ["waiting"]]
        assert line.scheduler.num_preemptions == 1
        assert requests[2].preemptions == 1

    def test_preempts_the_least_urgent_first(self) -> None:
        line = Line(num_blocks=6, prefix_cache=False)
        requests = [line.add("abcd", priority=priority) for priority in (1, 0, 0)]
        line.step(6)
        assert [states(request) for request in requests] == [["waiting"], ["decode"], ["decode"]]

    def test_preempts_as_many_as_it_takes(self) -> None:
        line, requests = self.full()
        line.step(6)
        assert [states(request) for request in requests] == [["decode"], ["waiting"], ["waiting"]]
        line.step(4)
        assert len(line.scheduler.slots.known_tokens(requests[0].branches[0].slot)) > 12

    def test_a_preempted_one_keeps_its_tokens_and_its_place(self) -> None:
        line, requests = self.full()
        line.step(2)
        newest = requests[2].branches[0]
        assert newest.tokens.tolist() == [*b"abcd", *[65] * 5]
        assert newest.num_output == 5
        assert newest.slot == -1
        later = line.add("e")
        line.end(requests[0])
        line.end(requests[1])
        plan = line.step()
        assert [chunk.sequence.request for chunk in plan.chunks] == [requests[2], later]
        assert line.placed[-2] == (newest, newest.tokens.tolist())
        assert plan.batch.sample_positions.tolist()[-2:] == [5, 0]

    def test_a_preempted_one_finds_its_own_blocks_in_the_cache(self) -> None:
        line, requests = self.full(prefix_cache=True)
        line.scheduler.preempt(requests[2].branches[0])
        plan = line.step()
        [chunk] = plan.chunks
        assert chunk.sequence is requests[2].branches[0]
        assert chunk.count < len(chunk.sequence.tokens)

    def test_one_that_is_still_prefilling_may_be_it(self) -> None:
        line = Line(num_blocks=9, prefix_cache=False, prefill_chunk_size=4)
        first = line.add("abcd")
        line.step(3)
        second = line.add("b" * 24, n=3)
        line.step()
        assert states(second) == ["prefill", "unborn", "unborn"]
        assert line.scheduler.slots.num_free == 4
        line.scheduler.preempt(second.branches[0])
        assert line.scheduler.slots.num_free == 7
        line.scheduler.check()
        line.end(first)
        line.step()
        assert states(second) == ["prefill", "unborn", "unborn"]

    def test_of_a_branch_takes_its_copy_along(self) -> None:
        line = Line()
        request = line.add("abcde", n=3)
        line.step()
        line.scheduler.preempt(request.branches[1])
        assert [branch for _, _, branch in line.scheduler.blocks.copies] == [request.branches[2]]
        line.scheduler.check()

    def test_of_all_leaves_no_copy_behind(self) -> None:
        line = Line()
        line.add("abcde", n=3)
        line.step()
        assert line.scheduler.blocks.copies
        line.scheduler.preempt_all()
        assert not line.scheduler.blocks.copies
        assert line.scheduler.num_running == 0
        line.scheduler.check()


class TestStarting:
    def test_leaves_a_spare_block_for_each_that_runs(self) -> None:
        line = Line(num_blocks=5, prefix_cache=False)
        first = line.add("abcd")
        second = line.add("abcd")
        line.step()
        third = line.add("ab")
        line.step()
        # Two run; of five blocks three are left, they take one each, and one is not enough for three.
        assert [states(request) for request in (first, second, third)] == [["decode"], ["decode"], ["waiting"]]

    def test_nothing_is_spared_for_those_that_wait(self) -> None:
        line = Line(num_blocks=2)
        request = line.add("abcdefgh")
        line.step()
        assert states(request) == ["decode"]

    def test_counts_what_is_in_the_prefix_cache(self) -> None:
        line = Line(num_blocks=8)
        first = line.add("a" * 16 + "b")
        line.step(2)
        second = line.add("a" * 16 + "c")
        line.step()
        assert states(first) == states(second) == ["decode"]
        assert second.cached_tokens == 16
        assert (line.scheduler.prefix_queries, line.scheduler.prefix_hits) == (34, 16)

    def test_without_the_prefix_cache_has_to_wait(self) -> None:
        line = Line(num_blocks=8, prefix_cache=False)
        line.add("a" * 16 + "b")
        line.step(2)
        second = line.add("a" * 16 + "c")
        line.step()
        assert states(second) == ["waiting"]

    def test_the_last_token_is_always_computed(self) -> None:
        line = Line()
        first = line.add("abcdefgh")
        line.step()
        line.end(first)
        second = line.add("abcdefgh")
        plan = line.step()
        assert [chunk.count for chunk in plan.chunks] == [4]
        assert second.cached_tokens == 4

    def test_a_failed_start_holds_nothing(self) -> None:
        line = Line(num_blocks=8)
        first = line.add("a" * 17)
        line.step(2)
        waits = line.add("a" * 16 + "b" * 15)
        used = line.scheduler.blocks.pool.num_used
        line.step()
        assert states(waits) == ["waiting"]
        assert line.scheduler.blocks.pool.num_used == used
        line.end(first)
        line.step()
        assert states(waits) == ["prefill"] or states(waits) == ["decode"]

    def test_one_that_is_refused_goes_aside_and_holds_nothing(self) -> None:
        line = Line()
        line.refused = {1}
        refused = line.add("abc", n=3)
        line.refused = {1}
        fine = line.add("def")
        plan = line.schedule()
        assert [chunk.sequence.request for chunk in plan.chunks] == [fine]
        [(sequence, error)] = line.scheduler.dropped
        assert sequence is refused.branches[0] and isinstance(error, ValueError)
        assert line.scheduler.slots.num_free == 7
        line.end(refused)
        line.scheduler.dropped.clear()
        line.finish(plan)


class TestBranches:
    def test_share_the_blocks_of_the_prompt(self) -> None:
        line = Line()
        request = line.add("a" * 10, n=3)
        assert len(line.step().chunks) == 1
        tables = [line.scheduler.slots.block_table(branch.slot).tolist() for branch in request.branches]
        assert tables[0][:2] == tables[1][:2] == tables[2][:2]
        assert len({table[2] for table in tables}) == 3
        assert line.scheduler.blocks.pool.num_used == 5

    def test_copy_the_block_that_is_partly_filled(self) -> None:
        line = Line()
        request = line.add("a" * 10, n=3)
        line.step()
        tables = [line.scheduler.slots.block_table(branch.slot).tolist() for branch in request.branches]
        batch = line.schedule().batch
        assert batch.copies.tolist() == [[tables[0][2], tables[1][2]], [tables[0][2], tables[2][2]]]
        assert not line.scheduler.blocks.copies

    def test_copy_nothing_where_the_prompt_fills_its_blocks(self) -> None:
        line = Line()
        line.add("a" * 8, n=3)
        line.step()
        assert line.schedule().batch.copies.tolist() == []

    def test_one_that_ends_at_once_is_not_copied(self) -> None:
        line = Line()
        request = line.add("a" * 10, n=3)
        line.step()
        line.scheduler.end(request.branches[1])
        assert len(line.schedule().batch.copies) == 1

    def test_survive_the_end_of_the_first(self) -> None:
        line = Line()
        request = line.add("a" * 10, n=3)
        line.step()
        line.scheduler.end(request.branches[0])
        other = line.add("b" * 10)
        plan = line.schedule()  # the freed block may be in use again: copies come before anything is written
        assert len(plan.batch.copies) == 2
        line.finish(plan)
        line.step(3)
        line.end(request)
        line.end(other)

    def test_wait_where_there_is_no_block_for_the_copy(self) -> None:
        line = Line(num_blocks=3, prefix_cache=False)
        request = line.add("a" * 10, n=3)
        line.step()
        assert states(request) == ["decode", "waiting", "waiting"]
        assert [branch.tokens.tolist()[10:] for branch in request.branches[1:]] == [[66], [67]]
        assert [branch.num_output for branch in request.branches[1:]] == [1, 1]
        assert line.scheduler.slots.num_free == 7

    def test_wait_where_there_is_no_slot(self) -> None:
        line = Line(max_num_sequence=2)
        request = line.add("a" * 10, n=5)
        plan = line.step()
        assert len(plan.chunks[0].branches) == 2
        assert states(request) == ["decode", "decode", "waiting", "waiting", "waiting"]
        line.scheduler.end(request.branches[0])
        line.step()
        assert states(request)[2] == "decode"
        assert request.branches[2].tokens.tolist() == [97] * 10

    def test_that_wait_go_before_later_requests(self) -> None:
        line = Line(max_num_sequence=2)
        request, later = line.add("a" * 10, n=3), line.add("b")
        line.step()
        line.scheduler.end(request.branches[0])
        line.step()
        assert states(request) == ["ended", "decode", "decode"] and states(later) == ["waiting"]

    def test_are_drawn_from_the_same_token(self) -> None:
        line = Line()
        request = line.add("abc", n=3)
        batch = line.schedule().batch
        assert batch.sample_index.tolist() == [2, 2, 2]
        assert batch.sample_slots.tolist() == [branch.slot for branch in request.branches]
        assert batch.sample_positions.tolist() == [0, 0, 0]


class TestPrefixCache:
    def test_keeps_what_has_ended(self) -> None:
        line = Line()
        request = line.add("abcdefgh")
        line.step(6)
        line.end(request)
        assert line.scheduler.blocks.pool.num_cached == 3
        assert line.scheduler.blocks.pool.num_used == 0

    def test_of_sequences_that_compute_the_same_at_once_one_is_kept(self) -> None:
        line = Line(prefill_chunk_size=32)
        first, second = line.add("abcdefgh"), line.add("abcdefgh")
        line.step()
        tables = [line.scheduler.slots.block_table(r.branches[0].slot).tolist() for r in (first, second)]
        assert tables[0] == tables[1]
        assert line.scheduler.blocks.pool.num_used == 2

    def test_is_evicted_for_those_that_run(self) -> None:
        line = Line(num_blocks=4)
        first = line.add("a" * 12)
        line.step()
        line.end(first)
        assert line.scheduler.blocks.pool.num_cached == 3
        second = line.add("b" * 15)
        line.step()
        assert states(second) == ["decode"]

    def test_with_other_weights_is_empty(self) -> None:
        line = Line()
        first = line.add("abcdefgh")
        line.step()
        line.scheduler.blocks.forget_cache()
        second = line.add("abcdefghi")
        line.step()
        assert second.cached_tokens == 0
        line.end(first)
        third = line.add("abcdefghi")
        line.step()
        assert third.cached_tokens == 8  # the second's
        line.end(second)
        line.end(third)
        assert line.scheduler.blocks.pool.num_cached == 2

    def test_keeps_at_most_so_many(self) -> None:
        line = Line(max_recycling=2)
        for letter in "abcde":
            request = line.add(letter * 8)
            line.step()
            line.end(request)
        assert line.scheduler.blocks.pool.num_cached == 4

    def test_keeps_none_if_told_so(self) -> None:
        line = Line(max_recycling=0)
        requests = [line.add(letter * 8) for letter in "ab"]
        line.step()
        for request in requests:
            line.end(request)
        assert line.scheduler.blocks.pool.num_cached == 0

    def test_the_same_prompt_at_once_with_few_kept(self) -> None:
        line = Line(max_recycling=1, prefill_chunk_size=12)
        others = [line.add("xxxx"), line.add("yyyy")]
        line.step()
        first, second = line.add("a" * 8), line.add("a" * 8)
        line.step()
        line.end(first)
        line.step(4)
        for request in (second, *others):
            line.end(request)
        line.scheduler.check()


def lines_of(function: Callable[[], object]) -> int:
    """How many lines of the engine a call executes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if "asyncengine" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


class TestCost:
    """In executed lines, not in seconds."""

    @pytest.mark.parametrize("hybrid", [True, False])
    @pytest.mark.parametrize("num_blocks", [32, 4])
    def test_of_a_step_does_not_grow_with_those_that_wait(self, hybrid: bool, num_blocks: int) -> None:
        counts = []
        for waiters in (10, 2000):
            case = loaded(
                max_num_sequence=2,
                max_total_sequence_length=4 * num_blocks,
                prefill_mode="hybrid" if hybrid else "chunked",
            )
            case.give(case.adding(*(case.new("abcdef" + chr(97 + i % 26)) for i in range(waiters))))
            counts.append([lines_of(case.core.step) for _ in range(12)])
        assert counts[0] == counts[1]

    def test_of_a_step_does_not_grow_with_those_that_queue(self) -> None:
        counts = []
        for waiters in (10, 2000):
            case = loaded(max_queue_size=1)
            case.give(case.adding(*(case.new("abc") for _ in range(waiters))))
            counts.append([lines_of(case.core.step) for _ in range(8)])
        assert counts[0] == counts[1]

    def test_of_an_abort_does_not_grow_with_those_that_wait(self) -> None:
        counts = []
        for waiters in (10, 2000):
            case = loaded()
            news = [case.new("abc") for _ in range(waiters)]
            case.give(case.adding(*news))
            middle = news[waiters // 2]
            counts.append(lines_of(lambda c=case, new=middle: c.core.handle([ins.AbortRequests((new.number,))])))  # type: ignore[misc]
        assert counts[0] == counts[1]

    def test_of_a_refused_start_does_not_grow_with_those_that_wait(self) -> None:
        counts = []
        for waiters in (10, 2000):
            case = loaded(max_total_sequence_length=32)
            case.add("a" * 20)
            case.step(2)
            case.give(case.adding(*(case.new("b" * 20) for _ in range(waiters))))
            counts.append(lines_of(case.core.step))
        assert counts[0] == counts[1]


def test_nothing_to_do_is_no_plan() -> None:
    line = Line()
    assert line.scheduler.schedule() is None
    assert not line.scheduler.has_work


def test_check_notices_blocks_that_nobody_holds() -> None:
    line = Line()
    line.scheduler.blocks.pool.allocate(1)
    with pytest.raises(AssertionError, match="1 blocks are used while nothing runs"):
        line.scheduler.check()
