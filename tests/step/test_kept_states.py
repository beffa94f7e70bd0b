"""Which states are kept and when. In the second half, the scripted model looks at each one that a row goes on from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from asyncengine import instructions as ins
from asyncengine.errors import StepError
from asyncengine.instructions import ReplyTo
from asyncengine.outputs import FinishReason
from asyncengine.speculation.lengths import DraftLengths
from asyncengine.state import EngineState
from asyncengine.step.batch import NO_PAIRS, StepBatch, StepTokens
from asyncengine.step.drafting import Drafting, shared
from asyncengine.step.kept_states import KeptStates
from asyncengine.step.plan import Plan, StateMoves
from asyncengine.step.sequence import Request, SequenceState
from asyncengine.step.state_places import StatePlaces
from asyncengine.testing import ByteTokenizer, ScriptedLoader, ScriptedModel, echo
from asyncengine.testing.adapters import ScriptedAdapter
from tests.speculation.drafters import Guesser, Liar, Oracle, Scripted

from .core_case import EOS, Case, answer, loaded, prompt_of
from .line import Line

FIRST = 8
"""The first place that is no slot's own."""


def line(kept_states: int = 20, **changes: Any) -> Line:
    return Line(kept_states=kept_states, **changes)


def saves(plan: Plan) -> list[tuple[int, int]]:
    """Row and count of the saves at places that are no slot's own."""
    return [(row, count) for row, count, place in plan.batch.state_saves.tolist() if place >= FIRST]


def states_of(one: Line | Case) -> KeptStates:
    scheduler = one.scheduler if isinstance(one, Line) else one.core.scheduler
    assert scheduler is not None and scheduler.blocks.states is not None
    return scheduler.blocks.states


def places_of(one: Line | Case) -> StatePlaces:
    return states_of(one).places


def usable(one: Line, text: str) -> int:
    """How many tokens need not be computed by whoever goes on behind them."""
    return 4 * len(one.scheduler.blocks.tree.usable(prompt_of(text)))


def done(one: Line, prompt: str, **changes: Any) -> Request:
    """A request that was computed and has ended."""
    request = one.add(prompt, **changes)
    while any(branch.state is not SequenceState.DECODE for branch in request.branches):
        one.step()
    one.end(request)
    return request


class TestSlots:
    def test_are_told_to_models_that_keep_states(self) -> None:
        own = line()
        own.add("ab")
        own.step()
        other = own.add("cdef")
        batch = own.step().batch  # `Line.check` compares them with the plan
        assert batch.slots is not None and len(batch.slots) == 2
        own.step()
        own.end(other)
        assert own.step().batch.slots is not None

    def test_are_not_told_to_others(self) -> None:
        own = Line()
        own.add("ab")
        assert own.step().batch.slots is own.step().batch.slots is None
        assert own.scheduler.blocks.states is None

    def test_are_told_with_whatever_is_copied_and_saved(self) -> None:
        own = line()
        own.add("ab")
        own.step()
        rows, moves = own.step().decodes, StateMoves(np.array([[9, 0]]), np.array([[0, 1, 8]]))
        decoding = own.scheduler.residents.rows
        assert decoding.sequences is rows
        batch = decoding.batch(NO_PAIRS, False, moves)
        assert batch.state_copies is moves.copies and batch.state_saves is moves.saves


class TestPrompts:
    def test_save_where_their_last_block_ends_before_their_last_token(self) -> None:
        own = line()
        own.add("abcdefghij")
        assert saves(own.step()) == [(0, 8)]
        assert usable(own, "abcdefghij") == 8

    def test_save_nothing_where_there_is_no_such_block(self) -> None:
        own = line()
        own.add("abc")
        assert saves(own.step()) == []

    def test_save_at_their_end_as_well_where_a_block_ends(self) -> None:
        own = line()
        request = own.add("abcdefgh")
        assert saves(own.step()) == [(0, 4), (0, 8)]
        assert usable(own, "abcdefgh") == 4
        own.end(request)
        assert usable(own, "abcdefgh") == 8

    def test_are_not_known_before_their_step_is_settled(self) -> None:
        own = line()
        request = own.add("abcdefghij")
        plan = own.schedule()
        own.scheduler.advance(plan)
        assert usable(own, "abcdefghij") == 0
        own.scheduler.end(request.branches[0])  # it was aborted meanwhile
        assert usable(own, "abcdefghij") == 0 and places_of(own).num_free == 20

    def test_save_behind_each_chunk_in_one_place(self) -> None:
        own = line(prefill_chunk_size=6)
        request = own.add("a" * 23)
        plans = [own.step() for _ in range(4)]
        assert [saves(plan) for plan in plans] == [[(0, 4)], [(0, 6)], [(0, 4)], [(0, 2)]]
        places = [plan.batch.state_saves[0, 2] for plan in plans]
        assert places[0] == places[1] == places[2] != places[3]
        assert usable(own, "a" * 23) == 20
        own.end(request)
        assert places_of(own).num_known == 2  # behind 16 tokens and 20

    def test_save_for_others_also_in_a_chunk_that_is_not_the_last(self) -> None:
        own = line(prefill_chunk_size=8)
        own.add("a" * 10)
        assert [saves(own.step()) for _ in range(4)] == [[(0, 8)], [], [], [(0, 1)]]
        assert usable(own, "a" * 10) == 8  # the last one is saved elsewhere

    def test_that_end_in_the_middle_are_gone_on_with(self) -> None:
        own = line(prefill_chunk_size=6)
        request = own.add("a" * 23)
        own.step(2)
        own.scheduler.preempt(request.branches[0])
        own.scheduler.check()
        plan = own.step()
        assert plan.batch.context_lens.tolist() == [12] and len(plan.batch.state_copies) == 1

    def test_that_are_computed_at_once_keep_one_state(self) -> None:
        own = line(prefill_chunk_size=32)
        own.add("abcdefghij")
        own.add("abcdefghij")
        assert saves(own.step()) == [(0, 8), (1, 8)]
        assert (places_of(own).num_known, places_of(own).num_held) == (1, 0)


class TestHits:
    def test_copy_the_state_to_the_slot(self) -> None:
        own = line()
        done(own, "abcdefghij")
        other = own.add("abcdefghxyz")
        plan = own.schedule()
        assert plan.batch.state_copies.tolist() == [[FIRST, other.branches[0].slot]]
        assert plan.batch.context_lens.tolist() == [8]
        assert (other.cached_tokens, own.scheduler.prefix_hits) == (8, 8)
        own.finish(plan)
        assert own.step().batch.state_copies.tolist() == []

    def test_end_at_the_deepest_state(self) -> None:
        own = line(num_blocks=64)
        done(own, "abcdefghijklmn")  # a state behind 12
        other = own.add("abcdefghxyz")  # two blocks of it are known, and no state there
        plan = own.step()
        assert plan.batch.context_lens.tolist() == [0] and other.cached_tokens == 0
        assert own.scheduler.prefix_hits == 0

    def test_save_where_two_prompts_part(self) -> None:
        own = line(num_blocks=64)
        done(own, "abcdefghijklmn")
        own.add("abcdefghvwxyz")
        assert saves(own.step()) == [(0, 8), (0, 12)]
        third = own.add("abcdefgh12345")
        plan = own.step()
        assert third.cached_tokens == 8 and saves(plan) == [(1, 4)]

    def test_that_may_not_be_used_are_not_saved_again(self) -> None:
        own = line(num_blocks=64)
        done(own, "abcdefghij")
        scored = own.add("abcdefghvwxyz", num_prompt_logprobs=0)
        assert saves(own.step()) == [(0, 12)] and scored.cached_tokens == 0

    def test_share_the_blocks_that_were_computed_again(self) -> None:
        own = line(num_blocks=64)
        first = own.add("abcdefghijklmn")
        own.step()
        second = own.add("abcdefghvwxyz")
        own.step()
        tables = [own.scheduler.slots.block_table(r.branches[0].slot).tolist() for r in (first, second)]
        assert tables[0][:2] == tables[1][:2] and tables[0][2] != tables[1][2]

    def test_of_whoever_waits_are_not_taken_back_before_they_are_copied(self) -> None:
        own = line(kept_states=1)
        done(own, "abcdefghij")
        own.add("xy")
        own.step()
        own.add("abcdefghij")
        own.add("z", bad_words=((1, 2),))
        assert own.scheduler.schedule(ahead=True) is None  # the first was started, the second must not be yet
        assert places_of(own).take() is None
        own.scheduler.blocks.forget_cache()
        assert places_of(own).take() is None  # not even where the tree knows nothing any more
        own.scheduler.check()
        assert len(own.step().batch.state_copies) == 1
        assert places_of(own).num_free == 1

    def test_that_come_to_nothing_hold_nothing(self) -> None:
        own = line(kept_states=1)
        done(own, "abcdefghij")
        own.add("xy")
        own.step()
        request = own.add("abcdefghij")
        own.add("z", bad_words=((1, 2),))
        assert own.scheduler.schedule(ahead=True) is None
        own.end(request)
        assert places_of(own).num_used == 0 and own.step().batch.state_copies.tolist() == []

    def test_of_one_that_is_refused_hold_nothing(self) -> None:
        own = line()
        done(own, "abcdefghij")
        own.refused = {0}
        request = own.add("abcdefghij")
        assert own.scheduler.schedule() is None
        own.end(request)
        own.scheduler.dropped.clear()
        own.scheduler.check()

    def test_may_be_saved_over_in_the_step_that_copies_them(self) -> None:
        own = line(kept_states=1)
        done(own, "abcdefghij")
        own.add("abcdefghijklmn")
        batch = own.step().batch
        assert batch.state_copies[0, 0] == FIRST and batch.state_saves.tolist() == [[0, 4, FIRST]]
        assert usable(own, "abcdefghij") == 0 and usable(own, "abcdefghijkl") == 12


class TestDecodes:
    @pytest.mark.parametrize("beside", [False, True])
    def test_save_at_the_end_of_each_block(self, beside: bool) -> None:
        own = line(num_blocks=200, prefill_chunk_size=64, max_num_sequence=FIRST)
        for length in (1, 3, 4, 6, 9, 11):
            own.add("a" * length)
        own.step()
        for _ in range(20):
            if beside:
                extra = own.add("bc")
            plan = own.step()
            ends = [row for row, context in enumerate(plan.batch.context_lens[:6].tolist()) if context % 4 == 3]
            assert saves(plan) == [(row, 1) for row in ends]
            if beside:
                own.end(extra)

    def test_save_in_one_place(self) -> None:
        own = line()
        request = own.add("ab")
        own.step()
        plans = [own.step() for _ in range(12)]
        assert [len(plan.batch.state_saves) for plan in plans] == [0, 1, 0, 0] * 3
        assert len({place for plan in plans for place in plan.batch.state_saves[:, 2].tolist()}) == 1
        assert places_of(own).num_known == 0 and places_of(own).num_held == 1
        own.end(request)
        assert usable(own, "ab" + "A" * 20) == 12
        assert places_of(own).num_known == 1

    def test_are_gone_on_with_by_the_next_turn(self) -> None:
        own = line()
        request = own.add("abcdef")
        own.step(8)
        own.end(request)
        turn = own.add("abcdef" + "A" * 7 + "ghi")
        assert own.step().batch.context_lens.tolist() == [12] and turn.cached_tokens == 12

    def test_that_are_preempted_go_on_behind_their_own_state(self) -> None:
        own = line()
        request = own.add("abcdef")
        own.step(8)
        own.scheduler.preempt(request.branches[0])
        own.scheduler.check()
        plan = own.step()
        assert plan.batch.context_lens.tolist() == [12]
        assert places_of(own).num_held == 0

    def test_that_are_computed_again_save_in_the_place_of_their_own(self) -> None:
        own = line(prefix_cache=True)
        request = own.add("abcdef")
        own.step(8)
        own.scheduler.preempt(request.branches[0])
        own.scheduler.blocks.tree.clear()
        assert saves(own.step()) == [(0, 12)]
        assert usable(own, "abcdef" + "A" * 8) == 0 and places_of(own).num_held == 1

    @pytest.mark.parametrize("committed", [True, False])
    def test_are_not_believed_where_the_token_does_not_count(self, committed: bool) -> None:
        own = line()
        request = own.add("abcdef")
        own.step()
        plan = own.schedule()
        own.scheduler.advance(plan)
        ahead = own.scheduler.schedule(ahead=True)
        assert ahead is not None and len(ahead.batch.state_saves) == 1  # behind 8 tokens
        own.scheduler.advance(ahead)
        own.scheduler.settle(plan)
        own.scheduler.slots.append_tokens(plan.decode_slots, prompt_of("x"))
        if committed:
            own.scheduler.settle(ahead)
            own.scheduler.slots.append_tokens(plan.decode_slots, prompt_of("y"))
        own.end(request)
        assert usable(own, "abcdefAx") == (8 if committed else 4)
        assert places_of(own).num_known == 1 + committed

    def test_do_not_believe_what_a_step_under_way_writes_over(self) -> None:
        own = line()
        request = own.add("ab")
        own.step(3)
        assert places_of(own).num_held == 1  # behind 4 tokens
        own.step(2)
        plan = own.schedule()
        own.scheduler.advance(plan)
        ahead = own.scheduler.schedule(ahead=True)
        assert ahead is not None and len(ahead.batch.state_saves) == 1
        own.end(request)
        assert usable(own, "abAAAAAA") == 0 and places_of(own).num_free == 20


class TestPlaces:
    def test_that_lack_are_done_without(self) -> None:
        own = line(kept_states=1)
        first, second = own.add("ab"), own.add("cd")
        plans = [own.step() for _ in range(3)]
        assert [saves(plan) for plan in plans] == [[], [], [(0, 1)]]
        own.step(4)
        own.end(first)
        own.end(second)
        assert usable(own, "abAAAAAA") == 8 and usable(own, "cdAAAAAA") == 0

    def test_of_the_tree_are_had_by_those_that_run(self) -> None:
        own = line(kept_states=2)
        for prompt in ("aaaab", "bbbbc", "ccccd"):
            done(own, prompt)
        assert [usable(own, prompt) for prompt in ("aaaab", "bbbbc", "ccccd")] == [0, 4, 4]

    def test_are_had_for_prompts_before_those_that_decode(self) -> None:
        own = line(kept_states=1)
        own.add("ab")
        own.step(2)
        own.add("abcde")
        assert saves(own.step()) == [(1, 4)]

    def test_that_lack_leave_a_sequence_its_own(self) -> None:
        own = line(kept_states=1, prefill_chunk_size=8)
        own.add("a" * 14)
        plans = [own.step() for _ in range(2)]
        assert [saves(plan) for plan in plans] == [[(0, 8)], [(0, 4)]]  # the second one in the place of the first

    def test_may_be_none(self) -> None:
        own = line(kept_states=0)
        done(own, "abcdefghij", n=2)
        assert own.scheduler.blocks.pool.num_cached == 0  # blocks without a state are of no use
        again = own.add("abcdefghij", n=2)
        plan = own.step()
        assert again.cached_tokens == 0 and saves(plan) == []
        assert plan.batch.state_saves.tolist() == [[0, 10, again.branches[1].slot]]

    def test_are_not_used_without_a_prefix_cache(self) -> None:
        own = line(prefix_cache=False)
        request = own.add("abcdefghij", n=2)
        plan = own.step()
        assert plan.batch.state_saves.tolist() == [[0, 10, request.branches[1].slot]]
        own.step(8)
        assert places_of(own).num_free == 20

    def test_are_given_back_where_the_weights_change(self) -> None:
        own = line()
        request = own.add("ab")
        own.step(3)
        own.scheduler.blocks.forget_cache()
        assert places_of(own).num_free == 20
        assert all(saves(own.step()) == [] for _ in range(8))
        own.scheduler.check()
        own.end(request)
        assert places_of(own).num_free == 20
        assert usable(own, "abAAAAAA") == 0

    def test_go_with_their_blocks(self) -> None:
        own = line(num_blocks=8)
        done(own, "a" * 13)
        assert usable(own, "a" * 13) == 12
        own.add("b" * 26)
        own.step()
        assert usable(own, "a" * 13) == 0 and places_of(own).num_known == 0

    def test_go_with_the_sequences_that_are_trimmed(self) -> None:
        own = line(max_recycling=1)
        for prompt in ("aaaab", "bbbbc"):
            done(own, prompt)
        assert [usable(own, prompt) for prompt in ("aaaab", "bbbbc")] == [0, 4]
        assert places_of(own).num_known == 1

    def test_that_nobody_holds_are_noticed(self) -> None:
        own = line()
        places_of(own).take()
        with pytest.raises(AssertionError, match="1 places of states are used while nothing runs"):
            own.scheduler.blocks.check_idle()
        with pytest.raises(AssertionError, match="places are held so often"):
            own.scheduler.check()

    def test_of_sequences_that_are_gone_are_noticed(self) -> None:
        own = line()
        request = own.add("abcdefghij")
        own.step()
        states_of(own).release = lambda sequence: None  # type: ignore[method-assign]
        with pytest.raises(AssertionError, match="gone hold states"):
            own.end(request)


class TestPins:
    def test_keep_the_deepest_state(self) -> None:
        own = line(kept_states=2)
        done(own, "abcdefghij")
        own.scheduler.blocks.tree.pin("p", prompt_of("abcdefgh"))
        for letter in "xyz":
            done(own, letter * 6)
        assert usable(own, "abcdefghij") == 8
        own.scheduler.check()
        assert own.scheduler.blocks.tree.unpin("p")
        for letter in "uvw":
            done(own, letter * 6)
        assert usable(own, "abcdefghij") == 0

    def test_keep_one_that_comes_later(self) -> None:
        own = line(kept_states=1)
        done(own, "abcdefghij")
        own.scheduler.blocks.tree.pin("p", prompt_of("abcd"))  # there is none
        done(own, "abcdxy")
        done(own, "zzzzzz")
        assert usable(own, "abcdxy") == 4 and usable(own, "zzzzzz") == 0

    def test_go_with_the_weights(self) -> None:
        own = line()
        done(own, "abcdefghij")
        own.scheduler.blocks.tree.pin("p", prompt_of("abcdefgh"))
        own.scheduler.blocks.forget_cache()
        own.scheduler.check()
        assert places_of(own).num_free == 20


class Sure:
    """Drafts as many as are wanted, whatever they are."""

    def place(self, slot: int, params: Any, branch: int) -> None: ...

    def copy(self, copies: Any) -> None: ...

    def follow(self, table: Any, slots: Any) -> None: ...

    def propose(self, table: Any, slots: Any, lengths: Any) -> list[Any]:
        return [np.arange(length, dtype=np.int32) for length in lengths.tolist()]


def drafting(length: int = 6, drafted_states: int = 20, **changes: Any) -> Line:
    own = line(drafted_states=drafted_states, **changes)
    own.scheduler.drafting = Drafting(Sure(), DraftLengths(8, length, 8.0))
    return own


class TestDrafts:
    """`taken` is how many of the tokens of a step's only row count."""

    def test_save_at_each_end_of_a_block_in_one_place(self) -> None:
        own = drafting()
        own.add("ab")
        own.step()
        plan = own.schedule()
        assert saves(plan) == [(0, 2), (0, 6)] and plan.batch.query_start.tolist() == [0, 7]
        assert len({*plan.batch.state_saves[:, 2].tolist()}) == 1
        assert plan.batch.state_copies.tolist() == []

    def test_save_beside_prompts_and_rows_without(self) -> None:
        own = drafting()
        own.add("abcdef")
        own.add("abc", max_tokens=2)  # of which one is left
        own.step()
        own.add("xyzxyz")
        assert saves(own.step([7, 1])) == [(0, 2), (0, 6), (1, 1), (2, 4)]

    @pytest.mark.parametrize(("taken", "behind"), [(1, 0), (2, 4), (5, 4), (6, 8), (7, 8)])
    def test_are_believed_as_far_as_they_count(self, taken: int, behind: int) -> None:
        own = drafting()
        request = own.add("ab")
        own.step()
        own.step([taken])
        assert places_of(own).num_held == 1
        own.end(request)
        assert usable(own, "ab" + "A" * taken) == behind
        assert places_of(own).num_used == 0

    def test_leave_what_was_there_if_none_counts(self) -> None:
        own = drafting(length=4)
        request = own.add("ab")
        own.step()
        own.step([3])  # behind 4 of 5 tokens, one of them not computed
        assert saves(own.step([1])) == [(0, 3)]
        own.end(request)
        assert usable(own, "ab" + "A" * 6) == 4

    def test_leave_nothing_in_a_place_that_was_another_states(self) -> None:
        own = drafting(kept_states=1)
        request = own.add("abcdef")
        own.step()
        assert usable(own, "abcdef") == 4
        assert saves(own.step([1])) == [(0, 2), (0, 6)]
        own.end(request)
        assert usable(own, "abcdefAA") == 0 and places_of(own).num_free == 1

    def test_are_not_believed_before_they_are_settled(self) -> None:
        own = drafting(length=4)
        request = own.add("ab")
        own.step()
        own.step([3])
        own.schedule()  # and the step failed: nobody knows what it has written over
        own.end(request)
        assert usable(own, "ab" + "A" * 6) == 0 and places_of(own).num_free == 20

    def test_of_a_run_that_ends_before_are_not_believed(self) -> None:
        own = drafting()
        request = own.add("ab")
        own.step()
        plan = own.schedule()
        own.scheduler.advance(plan)
        own.scheduler.settle(plan, np.array([7]))
        own.scheduler.take(request.branches[0], [65] * 4)  # a stop token
        own.end(request)
        assert usable(own, "ab" + "A" * 6) == 0 and places_of(own).num_free == 20

    def test_are_gone_on_with_after_a_preemption(self) -> None:
        own = drafting()
        request = own.add("ab")
        own.step()
        own.step([7])
        own.scheduler.preempt(request.branches[0])
        own.scheduler.check()
        assert own.step().batch.context_lens.tolist() == [8]

    def test_are_as_many_as_states_can_be_set_aside(self) -> None:
        own = drafting(length=4, drafted_states=6)
        for prompt in ("ab", "cd", "ef", "gh"):
            own.add(prompt)
        own.step()
        lengths = own.step([1] * 4).batch.draft_lengths
        assert lengths is not None and lengths.tolist() == [2, 2, 1, 1]
        assert drafting(drafted_states=0).scheduler.limits.drafted_states == 0

    def test_are_none_where_no_state_can_be_set_aside(self) -> None:
        own = drafting(drafted_states=0)
        own.add("ab")
        own.step()
        assert own.step().batch.draft_lengths is None

    @pytest.mark.parametrize(
        ("wanted", "most", "expected"),
        [
            ([4, 0, 2], 6, [4, 0, 2]),
            ([4, 0, 2], 5, [3, 0, 2]),
            ([4, 0, 2], 3, [2, 0, 1]),
            ([4, 0, 2], 1, [1, 0, 0]),
            ([4, 0, 2], 0, [0, 0, 0]),
            ([0, 0], 3, [0, 0]),
        ],
    )
    def test_are_shared(self, wanted: list[int], most: int, expected: list[int]) -> None:
        assert shared(np.array(wanted), most).tolist() == expected


class TestBranches:
    def test_are_given_the_state_behind_the_prompt(self) -> None:
        own = line()
        request = own.add("abcdefghij", n=3)
        plan = own.step()
        slots = [branch.slot for branch in request.branches]
        assert plan.batch.state_saves.tolist() == [[0, 8, FIRST], [0, 10, slots[1]], [0, 10, slots[2]]]
        assert len(own.step().batch.state_copies) == 0
        own.step(6)
        assert places_of(own).num_held == 3
        own.scheduler.end(request.branches[1])
        assert usable(own, "abcdefghijB" + "A" * 5) == 16 and usable(own, "abcdefghijA" + "A" * 5) == 8
        own.end(request)

    def test_are_given_it_in_the_step_of_the_last_chunk(self) -> None:
        own = line(prefill_chunk_size=8)
        request = own.add("abcdefghij", n=2)
        plans = [own.step() for _ in range(2)]
        own_slot = request.branches[1].slot
        assert [(plan.batch.state_saves[:, 2] == own_slot).sum() for plan in plans] == [0, 1]
        assert plans[1].batch.state_saves.tolist() == [[0, 2, own_slot]]

    def test_without_a_slot_go_on_behind_the_prompts_state(self) -> None:
        own = line(max_num_sequence=2)
        request = own.add("abcdefghij", n=4)
        own.step()
        own.scheduler.end(request.branches[0])
        own.scheduler.end(request.branches[1])
        assert own.step().batch.context_lens.tolist() == [8, 8]


def case(run_ahead: bool, kept_states: int | None = 20, script: Any = None, **changes: Any) -> Case:
    more = {} if script is None else {"script": script}
    return loaded(run_ahead=run_ahead, kept_states=kept_states, **more, **changes)


ahead = pytest.mark.parametrize("run_ahead", [False, True])


@ahead
def test_a_conversation_is_not_computed_again(run_ahead: bool) -> None:
    own = case(run_ahead, script=answer("fine."))
    history = "hello"
    for turn in range(4):
        number = own.add(history)
        own.run()
        assert own.text(number) == "fine."
        usage = own.usage(number)
        behind_the_prompt, behind_the_answer = (len(history) - length for length in (9, 4))
        assert usage.cached_tokens // 4 in {
            behind_the_answer // 4 * (turn > 0),
            (behind_the_prompt - 1) // 4 * run_ahead,
        }
        history += "fine." + "and?"
    counters = own.core.metrics().counters
    assert counters.prefix_cache_hits == sum(end.usage.cached_tokens for end in own.box.ends.values()) > 0


@ahead
def test_what_a_token_that_did_not_count_has_moved_is_not_kept(run_ahead: bool) -> None:
    own = case(run_ahead, script=answer("xyz"))
    number = own.add("abcd")  # the end of the answer is the eighth token, and is computed ahead for nothing
    own.run()
    assert own.text(number) == "xyz"
    assert places_of(own).num_known == (0 if run_ahead else 1)
    again = own.add([*b"abcdxyz", EOS, *b"q"])
    own.run()
    assert own.text(again) == "xyz"


@ahead
@pytest.mark.parametrize("steps", range(1, 9))
def test_an_abort_at_any_time_keeps_what_is_true(run_ahead: bool, steps: int) -> None:
    own = case(run_ahead, prefill_chunk_size=4)
    number = own.add("abcdefghi", n=2)
    own.step(steps)
    own.abort(number)
    own.check()
    assert places_of(own).num_held == 0
    again = own.add("abcdefghijkl", n=2)
    own.run()
    assert own.text(again) == own.text(again, 1) == "abcdefghijkl"


@pytest.mark.parametrize("fault", ["step", "launch"])
@pytest.mark.parametrize("steps", range(1, 8))
def test_behind_a_failed_step_states_are_computed_again(fault: str, steps: int) -> None:
    """The other one is in the step behind it alone; nobody knows how far that has moved its state."""
    own = case(run_ahead=True, prefill_chunk_size=8, prefill_mode="chunked", kept_states=3)
    early = own.add("abcdefghijklmnop", n=2)
    own.step(steps)
    late = own.add("uvwxyzuvwxyz")
    if fault == "step":
        own.model.fail_next(ValueError("a bad kernel"))
    else:
        own.model.fail_next_launch(ValueError("no room"))
    own.run()
    assert all(isinstance(own.box.ends[n].error, (StepError, type(None))) for n in (early, late))
    again = own.add("abcdefghijklmnop", n=2)
    more = own.add("uvwxyzuvwxyz!")
    own.run()
    assert own.text(again) == own.text(again, 1) == "abcdefghijklmnop"
    assert own.text(more) == "uvwxyzuvwxyz!"


def test_one_that_is_in_the_dropped_step_alone_goes_on_with_a_state_of_its_own() -> None:
    own = case(run_ahead=True)
    early = own.add("abcdefgh")
    own.step(2)
    own.model.fail_next(ValueError("a bad kernel"))
    own.step()
    late = own.add("uvwxyzuvwxyz")
    own.step()
    assert own.reason(early) is FinishReason.ERROR and not own.ended(late)
    own.run()
    assert own.text(late) == "uvwxyzuvwxyz" and own.usage(late).preemptions == 1


@ahead
def test_what_a_failed_step_has_saved_is_not_known(run_ahead: bool) -> None:
    own = case(run_ahead)
    own.model.fail_next(ValueError("a bad kernel"))
    number = own.add("abcdefghij")
    own.run()
    assert own.reason(number) is FinishReason.ERROR and places_of(own).num_free == 20


ENDINGS: dict[str, tuple[Callable[[ReplyTo], ins.Instruction], Callable[[ReplyTo], ins.Instruction] | None]] = {
    "weights": (lambda to: ins.UpdateWeights({"w": 1}, to), None),
    "sleep": (ins.Sleep, ins.Wake),
    "reset": (ins.Reset, None),
    "restart": (lambda to: ins.DebugCall("lose_device", (), to), ins.Restart),
}


@ahead
@pytest.mark.parametrize("name", ENDINGS)
def test_nothing_is_kept_beyond_the_cache(run_ahead: bool, name: str) -> None:
    first, then = ENDINGS[name]
    own = case(run_ahead)
    own.add("abcdefghij")
    own.run()
    going_on = own.add("klmnopqrstuv")
    own.step(4)
    own.call(first)
    own.step()
    if then is not None:
        own.call(then)
        own.run_jobs()
    assert own.state is EngineState.READY
    own.run()
    if name in ("weights", "sleep"):
        assert own.text(going_on) == "klmnopqrstuv"
    again = own.add("abcdefghij")
    own.run()
    assert own.text(again) == "abcdefghij" and own.usage(again).cached_tokens == 0


@ahead
def test_a_copy_that_is_due_is_made_though_the_weights_change(run_ahead: bool) -> None:
    own = case(run_ahead)
    own.add("abcdefghij", max_tokens=1)
    own.run()
    own.add("klmnopqrstuv")
    own.step(3)
    number, other = own.add("abcdefghij"), own.add("xyz", bad_words=((1, 2),))
    plan = own.core.scheduler.schedule(ahead=True)  # type: ignore[union-attr]
    assert plan is None and states_of(own)._copies
    own.ask(lambda to: ins.UpdateWeights({"w": 1}, to))
    own.run()
    assert (own.text(number), own.text(other)) == ("abcdefghij", "xyz")


@pytest.mark.parametrize("in_flight", ["carry", "wait"])
@pytest.mark.parametrize("kept_states", [None, 2])
@ahead
def test_another_model_begins_with_no_states(run_ahead: bool, in_flight: Any, kept_states: int | None) -> None:
    own = case(run_ahead, kept_states=7)
    number = own.add("abcdefghijkl")
    own.step(5)
    own.loader.kept_states = kept_states
    own.call(lambda to: ins.Reload(own.core.loaded.config.replace(model="other"), in_flight, to))  # type: ignore[union-attr]
    for _ in range(20):
        own.step()
        own.run_jobs()
    own.run()
    assert own.text(number) == "abcdefghijkl" and len(own.loader.models) == 2


def computed(own: Case) -> int:
    return sum(tokens for _, tokens in own.model.batches)


@ahead
def test_a_prompt_in_pieces_is_computed_once(run_ahead: bool) -> None:
    own = case(run_ahead, prefill_chunk_size=6)
    number = own.open(n=2)
    for count in range(1, 4):
        own.piece(number, "abcdefgh")
        own.run()
        assert computed(own) == 8 * count
        assert (places_of(own).num_held, places_of(own).num_used) == (0, 0)
    own.piece(number, "xy", last=True)
    own.step()
    assert computed(own) == 26
    own.run()
    assert own.text(number) == "abcdefgh" * 3 + "xy" and own.usage(number).cached_tokens == 0


def test_pieces_that_were_taken_back_are_computed_again_up_to_one_chunk() -> None:
    own = case(run_ahead=False, prefill_chunk_size=16, max_single_sequence_length=128)
    number = own.open()
    own.piece(number, "abcdefghijkl")
    own.run()
    own.piece(number, "XYZ!XYZ!", keep=5)
    own.run()
    assert computed(own) == 12 + 12  # no state was kept behind the first block
    own.piece(number, "abcdefghijklmnopqrstuvwx")
    own.run()
    own.piece(number, "abcd", keep=35)
    own.run()
    assert computed(own) == 24 + 24  # nor within so much as more than one chunk
    own.piece(number, "!", last=True)
    own.run()
    assert own.text(number) == "abcdeXYZ!XYZ!abcdefghijklmnopqrstuvwx"[:35] + "abcd!"


def test_pieces_are_not_computed_ahead_where_no_state_can_be_kept() -> None:
    own = case(run_ahead=False, kept_states=0)
    number = own.open()
    own.piece(number, "abcdefgh")
    own.run()
    assert computed(own) == 0
    own.piece(number, "!", last=True)
    own.run()
    assert own.text(number) == "abcdefgh!"


@pytest.mark.parametrize("forced", [1, 5, 11])
@pytest.mark.parametrize("chunk", [3, 16])
def test_tokens_that_are_forced_move_the_state(forced: int, chunk: int) -> None:
    own = case(run_ahead=False, prefill_chunk_size=chunk)
    text = "abcdefghijklmnopqrst"
    number = own.add("hello", n=2, max_tokens=20)
    other = own.add("others", max_tokens=20)
    model, execute = own.model, own.model.execute
    own.loader.script = own.model._script = answer(text)  # type: ignore[method-assign]

    def forcing(batch: StepBatch) -> StepTokens:
        drawn = execute(batch)
        position = batch.sample_positions.tolist()
        if 2 not in position:
            return drawn
        entry = position.index(2)
        tokens = [*text.encode()[3 : 3 + forced]]
        model._tokens[int(batch.sample_slots[entry])] += tokens
        return StepTokens(drawn.token_ids, forced={entry: tokens})

    model.execute = forcing  # type: ignore[method-assign]
    own.run()
    assert own.text(number) == own.text(number, 1) == own.text(other) == text


@ahead
def test_adapters_have_states_of_their_own(run_ahead: bool) -> None:
    own = loaded(run_ahead=run_ahead, kept_states=None)
    own.loader.kept_states = 20
    own.loader.adapters = {"x": answer("from x"), "y": answer("from y")}
    own.load(adapters={"x": "x", "y": "y"})
    for name in (None, "x", "y"):
        number = own.add("abcdefghij", adapter=name)
        own.run()
        assert own.usage(number).cached_tokens == 0
        again = own.add("abcdefghij", adapter=name)
        own.run()
        assert own.usage(again).cached_tokens == 8
    running = own.add("abcdefghijklmno", adapter="x")
    own.step(3)
    assert own.core.view is not None
    epoch = own.core.view.epoch
    own.ask(lambda to: ins.LoadAdapter("x", ScriptedAdapter(answer("anew")), epoch, to))
    anew = own.add("abcdefghij", adapter="x")
    own.run()
    assert own.ended(running) and own.text(anew) == "anew" and own.usage(anew).cached_tokens == 0
    own.ask(lambda to: ins.UnloadAdapter("y", to))
    own.run()


@ahead
def test_scores_are_looked_at_from_the_start(run_ahead: bool) -> None:
    own = case(run_ahead, prefill_chunk_size=8)
    own.add("abcdefghijkl")
    own.run()
    number = own.add("abcdefghijkl", num_prompt_logprobs=0)
    own.run()
    assert own.usage(number).cached_tokens == 0 and own.text(number) == "abcdefghijkl"


def different(prompt: Sequence[int], branch: int) -> Iterable[int]:
    return [97 + (sum(prompt) + 3 * branch + i * i) % 26 for i in range(4 + (sum(prompt) + 5 * branch) % 19)]


CROWDED = [
    {"max_total_sequence_length": 64},
    {"max_total_sequence_length": 64, "prefill_chunk_size": 5, "max_num_sequence": 3},
    {"max_total_sequence_length": 52, "prefix_cache_mode": "disable"},
    {"max_total_sequence_length": 64, "prefill_mode": "chunked", "prefix_cache_max_num_recycling_seqs": 2},
]


Generated = list[tuple[list[int], FinishReason | None]]
"""Tokens of each branch, and why it ended."""


def generated(own: Case) -> Generated:
    numbers = [
        own.add("abcdefghabcd"[: 5 + i % 7] * (1 + i % 2), n=1 + i % 3, max_tokens=5 + 4 * (i % 4), priority=i % 2)
        for i in range(9)
    ]
    own.run()
    keys = [(number, branch) for i, number in enumerate(numbers) for branch in range(1 + i % 3)]
    return [(own.tokens(*key), own.reason(*key)) for key in keys]


@cache
def without_states(crowded: int) -> Generated:
    """What models that keep none generate, which is the same in whatever order steps are launched."""
    found = [generated(case(run_ahead, None, script=different, **CROWDED[crowded])) for run_ahead in (False, True)]
    assert found[0] == found[1] and all(tokens for tokens, _ in found[0])
    return found[0]


@pytest.mark.parametrize(
    ("crowded", "kept_states"),
    [*itertools.product(range(len(CROWDED)), [1, 40]), (0, 0), (1, 3)],  # 0 with drafts, below
)
@ahead
def test_what_is_generated_is_the_same(crowded: int, kept_states: int, run_ahead: bool) -> None:
    own = case(run_ahead, kept_states, script=different, **CROWDED[crowded])
    assert generated(own) == without_states(crowded)
    assert own.core.scheduler is not None
    assert own.core.scheduler.num_preemptions or "max_num_sequence" in CROWDED[crowded]


def speculating(make: Callable[[ScriptedModel], Scripted], script: Any = None, **changes: Any) -> Case:
    """A core over a model that keeps states, with a drafter."""
    settings = {"kept_states": 20, "drafted_states": 16} | {
        name: changes.pop(name) for name in ("kept_states", "drafted_states") if name in changes
    }
    own = Case(ScriptedLoader(script or echo, tokenizer=ByteTokenizer(), make_drafter=make, **settings))
    own.load(speculative_mode="ngram", **({"spec_draft_length": 5} | changes))
    return own


@pytest.mark.parametrize("make", [Oracle, Liar, lambda model: Guesser(model, 3)])
@pytest.mark.parametrize("stop", ["", "e", "fg", "k"])
def test_the_next_turn_goes_on_behind_what_was_guessed(make: Any, stop: str) -> None:
    own = speculating(make, answer("abcdefghijklmnop"))
    number = own.add("hello", stop_strs=(stop,) if stop else ())
    own.run()
    turn = "hello" + own.text(number) + "!"
    assert own.usage(number).draft_tokens > 0
    again = own.add(turn)
    own.run()
    assert own.text(again) == "abcdefghijklmnop"
    if make is Liar:  # where each token counts before the next is computed, the last block's state is kept
        assert own.usage(again).cached_tokens == (len(turn) - 2) // 4 * 4


@pytest.mark.parametrize("steps", range(1, 7))
@pytest.mark.parametrize("what", ["abort", "fault", "weights", "sleep"])
def test_drafts_leave_no_wrong_state_behind(what: str, steps: int) -> None:
    own = speculating(lambda model: Guesser(model, steps), prefill_chunk_size=8)
    text = "abcdefghijklmnopqrst"
    number, other = own.add(text, n=2), own.add("uvwxyzuvwxyz")
    own.step(steps)
    if what == "abort":
        own.abort(number)
    elif what == "fault":
        own.model.fail_next(ValueError("a bad kernel"))
    elif what == "weights":
        own.call(lambda to: ins.UpdateWeights({"w": 1}, to))
    else:
        own.call(ins.Sleep)
        own.call(ins.Wake)
    own.run()
    again, more = own.add(text + "!", n=2), own.add("uvwxyzuvwxyz!")
    own.run()
    assert own.text(again) == own.text(again, 1) == text + "!" and own.text(more) == "uvwxyzuvwxyz!"
    if what != "fault":
        assert own.text(other) == "uvwxyzuvwxyz"


def guessing(crowded: int, kept_states: int | None, drafted_states: int) -> Generated:
    """What is generated with guesses, of which some are right."""
    own = speculating(
        lambda model: Guesser(model, 1), different, kept_states=kept_states, drafted_states=drafted_states,
        **CROWDED[crowded],
    )  # fmt: skip
    found = generated(own)
    counters = own.core.metrics().counters
    assert 0 < counters.accepted_draft_tokens < counters.draft_tokens
    return found


@pytest.mark.parametrize("crowded", range(len(CROWDED)))
def test_with_drafts_the_same_is_generated(crowded: int) -> None:
    found = guessing(crowded, None, 16)
    for kept_states, drafted_states in ((0, 16), (3, 1), (40, 16)):
        assert guessing(crowded, kept_states, drafted_states) == found
