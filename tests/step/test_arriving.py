"""Prompts that come in pieces: what is computed ahead, and that nothing is held meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asyncengine import instructions as ins
from asyncengine.errors import DeadlineExceededError, InvalidRequestError
from asyncengine.instructions import Deadlines
from asyncengine.outputs import FinishReason
from asyncengine.step import fitting
from asyncengine.step.adapters import NO_SPACE
from asyncengine.step.arriving import Arriving
from asyncengine.step.block_pool import BlockPool
from asyncengine.step.limits import Limits
from asyncengine.step.prefix_tree import PrefixTree

from .core_case import Case, answer, loaded, prompt_of

PIECE = "abcdefgh"  # two blocks


def tokens_computed(case: Case) -> int:
    return sum(tokens for _, tokens in case.model.batches)


def test_generation_begins_when_the_prompt_is_whole() -> None:
    case = loaded()
    number = case.open()
    case.piece(number, "hel")
    case.run()
    assert case.tokens(number) == []
    case.piece(number, "lo", last=True)
    case.run()
    assert case.text(number) == "hello"
    assert (case.usage(number).prompt_tokens, case.usage(number).completion_tokens) == (5, 6)


def test_whole_blocks_are_computed_as_they_come_and_once() -> None:
    case = loaded()
    number = case.open()
    for count in range(1, 4):
        case.piece(number, PIECE)
        assert case.run() == 1
        assert tokens_computed(case) == 8 * count
    case.piece(number, "xy", last=True)
    case.step()
    assert tokens_computed(case) == 26
    assert case.tokens(number) == [ord("a")]


def test_less_than_a_block_is_not_computed_ahead() -> None:
    case = loaded()
    number = case.open()
    for letter in "abc":
        case.piece(number, letter)
        assert not case.core.runnable
    case.piece(number, "d")
    assert case.run() == 1


def test_nothing_is_held_while_more_is_awaited() -> None:
    case = loaded()
    number = case.open()
    case.piece(number, PIECE)
    case.run()
    assert (case.pool.num_used, case.pool.num_cached) == (0, 2)
    assert case.core.scheduler is not None
    assert case.core.scheduler.slots.num_free == 8
    assert not case.core.runnable
    assert case.core.metrics().num_requests_waiting == 1


def test_who_awaits_more_keeps_nobody_from_running() -> None:
    case = loaded(answer("ok"), max_num_sequence=1, max_total_sequence_length=32, max_single_sequence_length=32)
    number = case.open(priority=-1)
    case.piece(number, PIECE * 2)
    case.run()
    other = case.add("x" * 24)
    case.run()
    assert case.text(other) == "ok"
    case.piece(number, "x", last=True)
    case.run()
    assert case.text(number) == "ok"


def test_the_first_token_comes_after_one_step_instead_of_many() -> None:
    case = loaded(max_single_sequence_length=128, prefill_chunk_size=16)
    whole = case.add(PIECE * 12 + "!", max_tokens=1)
    at_once = case.run()
    assert case.ended(whole)
    case.core.scheduler.blocks.forget_cache()  # type: ignore[union-attr]
    number = case.open(max_tokens=1)
    for _ in range(12):
        case.piece(number, PIECE)
        case.run()
    case.piece(number, "!", last=True)
    assert (at_once, case.run()) == (7, 1)
    assert case.usage(number).cached_tokens == 0  # it found nothing that it had not computed itself


def test_what_others_computed_before_is_found_and_counted() -> None:
    case = loaded()
    case.add(PIECE * 2, max_tokens=1)
    case.run()
    number = case.open()
    case.piece(number, PIECE * 2 + "abcd")
    case.run()
    assert tokens_computed(case) == 16 + 4
    case.piece(number, "!", last=True)
    case.run()
    assert case.usage(number).cached_tokens == 16
    counters = case.core.metrics().counters
    assert counters.prompt_tokens == 16 + 21
    assert (counters.prefix_cache_queries, counters.prefix_cache_hits) == (16 + 21, 16)


def test_tokens_that_turn_out_to_be_others_are_taken_back() -> None:
    case = loaded()
    number = case.open()
    case.piece(number, PIECE)
    case.run()
    case.piece(number, "XYZ!", keep=5)
    case.run()
    assert tokens_computed(case) == 8 + 4  # of its two blocks, the second one anew
    case.piece(number, "", keep=7, last=True)
    case.run()
    assert case.text(number) == "abcdeXY"


def test_a_piece_may_come_while_another_is_computed() -> None:
    case = loaded(prefill_chunk_size=4)
    number = case.open()
    case.piece(number, PIECE)
    case.step(1, [ins.ExtendPrompt(number, 8, prompt_of("ijkl")), ins.ExtendPrompt(number, 12, prompt_of("m"), True)])
    case.run()
    assert case.text(number) == PIECE + "ijklm"


def test_tokens_may_be_taken_back_while_they_are_computed() -> None:
    case = loaded(prefill_chunk_size=4)
    number = case.open()
    case.piece(number, PIECE)
    case.step(1, [ins.ExtendPrompt(number, 2, prompt_of("ZZZZ"))])
    case.run()
    case.piece(number, "!", last=True)
    case.run()
    assert case.text(number) == "abZZZZ!"


def test_branches_share_it() -> None:
    case = loaded(answer("yes"))
    number = case.open(n=3)
    case.piece(number, PIECE)
    case.run()
    case.piece(number, "?", last=True)
    case.run()
    assert [case.text(number, branch) for branch in range(3)] == ["yes"] * 3
    assert tokens_computed(case) == 9 + 3 * 3


@pytest.mark.parametrize("changes", [{"prefix_cache_mode": "disable"}, {"prefix_cache_max_num_recycling_seqs": 0}])
def test_without_a_prefix_cache_everything_is_computed_at_the_end(changes: dict[str, object]) -> None:
    case = loaded(**changes)
    number = case.open()
    for _ in range(3):
        case.piece(number, PIECE)
        assert not case.core.runnable
    case.piece(number, "!", last=True)
    case.run()
    assert case.text(number) == PIECE * 3 + "!"


def test_a_prompt_that_is_scored_is_computed_at_the_end() -> None:
    case = loaded(answer("ok"))
    number = case.open(num_prompt_logprobs=0)
    case.piece(number, PIECE)
    assert not case.core.runnable
    case.piece(number, "!", last=True)
    case.run()
    assert case.text(number) == "ok"


def test_what_was_evicted_meanwhile_is_computed_once_more_at_the_end() -> None:
    case = loaded(max_total_sequence_length=64)
    number = case.open(max_tokens=1)
    case.piece(number, PIECE * 2)
    case.run()
    case.add("x" * 61, max_tokens=1)  # takes all blocks there are
    case.run()
    before = tokens_computed(case)
    case.piece(number, PIECE)
    assert not case.core.runnable
    case.piece(number, "!", last=True)
    case.run()
    assert tokens_computed(case) - before == 25
    assert case.text(number) == "a"


def test_the_least_urgent_is_preempted_while_it_computes_ahead() -> None:
    case = loaded(answer("a" * 50), max_total_sequence_length=32, max_single_sequence_length=32, prefill_chunk_size=1)
    number = case.open(max_tokens=2, priority=1)
    first = case.add("ab", max_tokens=26)
    case.step(10)
    case.piece(number, PIECE * 2)
    case.run()
    assert case.core.metrics().counters.preemptions > 0
    case.piece(number, "!", last=True)
    case.run()
    assert case.text(number) == "aa"
    assert len(case.tokens(first)) == 26


# Ends


def test_abort_while_more_is_awaited() -> None:
    case = loaded()
    number = case.open(n=2)
    case.piece(number, PIECE + "ab")
    case.run()
    case.abort(number)
    assert case.reason(number) == case.reason(number, 1) == FinishReason.ABORT
    assert (case.usage(number).prompt_tokens, case.usage(number).completion_tokens) == (10, 0)
    case.piece(number, "more", keep=10, last=True)  # crosses the abort
    assert not case.core.runnable


@pytest.mark.parametrize("end", [ins.Unload, ins.Reset, ins.Shutdown])
def test_what_ends_all_requests_ends_those_that_await_more(end: type[ins.Unload | ins.Reset | ins.Shutdown]) -> None:
    case = loaded()
    empty, begun, computing = case.open(), case.open(), case.open()
    case.piece(begun, PIECE)
    case.run()
    case.piece(computing, PIECE * 3)
    case.step()
    case.ask(lambda to: end(reply_to=to))
    assert [case.reason(number) for number in (empty, begun, computing)] == [FinishReason.ABORT] * 3
    assert [case.usage(number).prompt_tokens for number in (empty, begun, computing)] == [0, 8, 24]


@pytest.mark.parametrize("kind", ["queue", "first_token", "total"])
def test_deadlines_count_while_a_prompt_comes(kind: str) -> None:
    case = loaded()
    number = case.open(deadlines=Deadlines(**{kind: 2.0}))
    case.piece(number, "ab")
    case.now += 3.0
    case.step()
    assert isinstance(case.end_error(number), DeadlineExceededError)


def test_a_prompt_that_outgrows_the_model_ends_its_request() -> None:
    case = loaded(max_single_sequence_length=16)
    number = case.open()
    case.piece(number, PIECE)
    case.run()
    case.piece(number, PIECE)
    assert isinstance(case.end_error(number), InvalidRequestError)
    assert case.reason(number) is FinishReason.ERROR


def test_of_each_piece_its_own_tokens_alone_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    case = loaded()
    looked_at, misfit = [], fitting.misfit

    def spied(new: Any, sequences: list[Any], *more: Any) -> Any:
        looked_at.append(sum(map(len, sequences)))
        return misfit(new, sequences, *more)

    monkeypatch.setattr("asyncengine.step.requests.misfit", spied)
    number = case.open()
    for _ in range(3):
        case.piece(number, PIECE)
        case.run()
    assert looked_at == [8, 8, 8]
    case.give(ins.ExtendPrompt(number, 20, np.array([97, 98, 10_000], dtype=np.int32), True))
    assert isinstance(case.end_error(number), InvalidRequestError)


def test_a_failed_step_ends_the_request_whose_piece_was_computed() -> None:
    case = loaded()
    awaiting, computing = case.open(), case.open()
    case.piece(computing, PIECE)
    case.model.fail_next(ValueError("a fault"))
    case.run()
    assert case.reason(computing) is FinishReason.ERROR
    case.piece(awaiting, "abc", last=True)
    case.run()
    assert case.text(awaiting) == "abc"


# While the model changes


@pytest.mark.parametrize("fits_beside", [True, False])
def test_it_is_carried_over_and_computed_anew(fits_beside: bool) -> None:
    case = loaded(fits_beside=fits_beside)
    number, complete = case.open(), case.open()
    case.piece(number, PIECE)
    case.run()
    ticket = case.call(lambda to: ins.Reload(case.core.loaded.config, "carry", to))  # type: ignore[union-attr]
    case.piece(number, "ijkl")  # pieces do not wait for the new model
    case.run_job()
    case.piece(complete, "xyz", last=True)
    case.step()
    case.run_jobs()
    assert case.answered(ticket)
    case.run()
    assert case.text(complete) == "xyz"
    assert tokens_computed(case) >= 12
    case.piece(number, "!", last=True)
    case.run()
    assert case.text(number) == PIECE + "ijkl!"
    assert case.usage(number).prompt_tokens == 13


def test_a_reload_that_waits_gets_the_rest_of_the_prompt() -> None:
    case = loaded()
    number = case.open()
    case.piece(number, PIECE)
    ticket = case.call(lambda to: ins.Reload(case.core.loaded.config, "wait", to))  # type: ignore[union-attr]
    case.run_jobs()
    case.run()
    assert not case.answered(ticket)
    case.piece(number, "!", last=True)
    case.run()
    case.run_jobs()
    assert case.text(number) == PIECE + "!"
    assert case.answered(ticket)


def test_it_must_fit_the_new_model() -> None:
    case = loaded()
    number = case.open()
    case.piece(number, PIECE * 2)
    case.run()
    case.load(in_flight="carry", max_single_sequence_length=12)
    assert isinstance(case.end_error(number), InvalidRequestError)


def test_pieces_wait_out_a_pause_and_a_sleep() -> None:
    case = loaded()
    number = case.open()
    case.piece(number, PIECE)
    case.run()
    case.ask(ins.Sleep)
    case.piece(number, PIECE)
    assert not case.core.runnable
    case.ask(ins.Wake)
    case.ask(ins.Pause)
    case.piece(number, "!", last=True)
    assert not case.core.runnable
    case.ask(ins.Resume)
    case.run()
    assert case.text(number) == PIECE * 2 + "!"


def test_new_weights_compute_it_anew() -> None:
    case = loaded()
    number = case.open(max_tokens=1)
    case.piece(number, PIECE)
    case.run()
    case.ask(lambda to: ins.UpdateWeights({"w": 1}, to))
    before = tokens_computed(case)
    case.piece(number, "!", last=True)
    case.run()
    assert tokens_computed(case) - before == 9


# By itself


def test_what_is_due() -> None:
    limits = Limits(4, 64, 16, 4, 16)
    pool = BlockPool(16)
    tree = PrefixTree(pool, 4)
    arriving = Arriving()
    assert not len(arriving.due(limits, tree, NO_SPACE))
    arriving.take(0, prompt_of("abcdef"), False)
    assert arriving.due(limits, tree, NO_SPACE).tobytes() == prompt_of("abcd").tobytes()
    tree.insert(prompt_of("abcd"), pool.allocate(1))
    arriving.note(prompt_of("abcd"))
    assert not len(arriving.due(limits, tree, NO_SPACE))
    arriving.take(6, prompt_of("gh"), False)
    assert len(arriving.due(limits, tree, NO_SPACE)) == 8
    arriving.take(2, prompt_of("cXXXXX"), False)
    assert arriving.computed == 2
    arriving.note(prompt_of("abcd"))
    assert arriving.computed == 3
