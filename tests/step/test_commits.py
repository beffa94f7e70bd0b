"""Tokens of a step reach whom they are for, however many rows there are and whatever became of them meanwhile."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from asyncengine import instructions as ins
from asyncengine.metrics import LATENCY_BUCKETS
from asyncengine.outputs import FinishReason
from asyncengine.step.batch import StepBatch, StepTokens

from .core_case import EOS, Box, Case, loaded


def letters(prompt: Sequence[int], branch: int) -> Iterable[int]:
    """An answer that nobody else has, 2 to 17 tokens long."""
    seed = sum((place + 1) * token for place, token in enumerate(prompt)) + 31 * branch
    return [97 + (seed * 7 + i * i * (seed + 3)) % 26 for i in range(2 + seed % 16)]


def expected(
    prompt: Sequence[int], branch: int, max_tokens: int, min_tokens: int, stops: Sequence[int]
) -> tuple[list[int], FinishReason, int | None]:
    """Told naively, one token after the other."""
    answer = [*letters(prompt, branch), *[EOS] * 40]
    for count, token in enumerate(answer, 1):
        if token in stops and count > min_tokens:
            return answer[:count], FinishReason.STOP, token
        if count == max_tokens:
            return answer[:count], FinishReason.LENGTH, None
    raise AssertionError("it has no end")


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("count", [3, 560])  # more than numpy is given at once, those left out who are aborted
def test_every_row_has_its_own_tokens_and_its_own_end(count: int, run_ahead: bool) -> None:
    case = loaded(
        letters,
        run_ahead=run_ahead,
        max_num_sequence=count,
        max_total_sequence_length=40 * count,
        prefill_chunk_size=8 * count,
    )
    wanted: dict[int, tuple[list[int], FinishReason, int | None]] = {}
    aborted: list[int] = []
    for i in range(count):
        prompt = [97 + i % 26, 97 + i // 26 % 26, *[97] * (1 + i % 3), 97 + i // 676]
        limits = {"max_tokens": 3 + i * 7 % 13, "min_tokens": i % 3}
        stops = (EOS, *range(97 + i % 5, 99 + i % 5), *range(300, 300 + 9 * (i % 4 == 0)))
        number = case.add(prompt, stop_token_ids=stops, num_logprobs=1, **limits)
        wanted[number] = expected(prompt, 0, stops=stops, **limits)
        if i % 97 == 1:
            aborted.append(number)
    case.step(3)
    while aborted:
        case.step(1, [ins.AbortRequests(tuple(aborted[:2]), (), case.reply_to())])
        del aborted[:2]
    case.run()
    for number, (tokens, reason, stop) in wanted.items():
        got = case.tokens(number)
        assert [entry.top_ids for entry in case.box.logprobs[number, 0]] == [(token,) for token in got]
        if case.reason(number) is FinishReason.ABORT:
            assert got == tokens[: len(got)]
        else:
            assert (got, case.reason(number), case.stop_reason(number)) == (tokens, reason, stop)


def beside(case: Case, box: Box, prompt: str, **changes: Any) -> int:
    """Adds a request whose events go elsewhere; returns its number."""
    new = case.new(prompt, **changes)
    adding = case.adding(new)
    case.give(ins.AddRequests(adding.requests, adding.epoch, box, None, adding.when_full))
    return new.number


@pytest.mark.parametrize("run_ahead", [False, True])
def test_every_reader_has_the_tokens_of_its_own_requests(run_ahead: bool) -> None:
    case, box = loaded(letters, run_ahead=run_ahead), Box()
    prompts = {"ab": case.box, "cde": box, "f": box, "ghij": case.box, "k": box}
    numbers = {}
    for i, (prompt, own) in enumerate(prompts.items()):
        case.step(1)  # so that they are at different tokens
        numbers[prompt] = beside(case, own, prompt, num_logprobs=1 if i % 2 else -1)
    case.run()
    for i, (prompt, own) in enumerate(prompts.items()):
        tokens = [*letters(list(prompt.encode()), 0), EOS]
        assert own.tokens[numbers[prompt], 0] == tokens
        assert [number for number, _ in own.tokens].count(numbers[prompt]) == 1
        logprobs = own.logprobs.get((numbers[prompt], 0), [])
        found = [None if entry is None else (entry.logprob, entry.top_ids) for entry in logprobs]
        told = [(-float(position), (token,)) for position, token in enumerate(tokens)]
        assert found == told if i % 2 else set(found) <= {None}


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_reader_who_has_left_takes_nobody_elses_tokens(run_ahead: bool) -> None:
    case, box = loaded(letters, run_ahead=run_ahead), Box()
    left = beside(case, box, "ab", num_logprobs=1)
    stays = case.add("cde", num_logprobs=1)
    beside(case, box, "fg", num_logprobs=1)
    case.step(3)
    box.open = False
    case.run()
    assert left not in case.box.ends and not case.core.requests.request_ids()
    assert case.tokens(stays) == [*letters(list(b"cde"), 0), EOS]
    assert [entry.logprob for entry in case.box.logprobs[stays, 0]] == [
        -float(i) for i in range(len(case.tokens(stays)))
    ]


def test_who_is_complete_is_told_by_its_own_row_though_another_has_left() -> None:
    case = loaded(letters)
    first, second, third = (case.add(prompt) for prompt in ("abc", "abcd", "abcde"))
    case.step(2)
    execute = case.model.execute
    case.model.execute = lambda batch: dataclasses.replace(execute(batch), finished=(1,))  # type: ignore[method-assign]
    case.step(1, [ins.AbortRequests((first,), (), case.reply_to())])
    case.model.execute = execute  # type: ignore[method-assign]
    assert case.reason(first) is FinishReason.ABORT
    assert (case.reason(second), case.stop_reason(second)) == (FinishReason.STOP, None)
    assert case.reason(third) is None


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("end", ["by itself", "abort", "unload"])
def test_an_engine_at_rest_keeps_nothing_of_those_who_have_ended(end: str, run_ahead: bool) -> None:
    case, box = loaded(letters, run_ahead=run_ahead), Box()
    number = beside(case, box, "abc", stop_strs=("zzz",))
    case.step(2)
    if end == "abort":
        case.abort(number)
    elif end == "unload":
        case.ask(ins.Unload)
    case.run()
    case.step()
    assert number in box.ends
    left = weakref.ref(box)
    del box
    gc.collect()
    assert left() is None


@pytest.mark.parametrize("run_ahead", [False, True])
def test_the_time_between_tokens_is_each_rows_own(run_ahead: bool) -> None:
    """Whoever joins, ends or is aborted meanwhile."""
    case = loaded(letters, run_ahead=run_ahead, prefill_chunk_size=4)
    seen: dict[tuple[int, int], int] = {}
    at: dict[tuple[int, int], float] = {}
    gaps: list[float] = []
    numbers = []
    for step in range(40):
        if step % 3 == 0 and step < 20:
            numbers.append(case.add("abcdefgh"[: 1 + step % 5], n=1 + step % 2))
        if step == 12:
            case.abort(numbers[1])
        case.now += (0.0003, 0.004, 0.015, 0.3)[step * step % 4 if step % 5 else 3]
        case.step()
        for key, tokens in case.box.tokens.items():
            if len(tokens) > seen.get(key, 0):
                assert len(tokens) == seen.get(key, 0) + 1
                if key in at:
                    gaps.append(case.now - at[key])
                seen[key], at[key] = len(tokens), case.now
    assert not case.core.runnable
    found = case.core.counters.inter_token_latency_seconds
    assert found.count == len(gaps) and found.total == pytest.approx(sum(gaps))
    counts = np.bincount(np.searchsorted(LATENCY_BUCKETS, gaps), minlength=len(found.counts))
    assert found.counts == counts.tolist()


@pytest.mark.parametrize("most", [1, 2])
def test_a_branch_that_is_complete_gets_none_of_the_tokens_that_are_forced_behind_it(most: int) -> None:
    """As behind a reload to a model for shorter sequences, of which the grammar knows nothing."""
    case = loaded(lambda prompt, branch: b"abcdef", max_single_sequence_length=8)
    number = case.add([97] * (8 - most), max_tokens=100)
    other = case.add("other", max_tokens=3)
    execute = case.model.execute

    def forcing(batch: StepBatch) -> StepTokens:
        drawn, rows = execute(batch), batch.sample_slots.tolist()
        last = [row for row, slot in enumerate(rows) if slot == 0 and batch.sample_positions[row] == most - 1]
        return dataclasses.replace(drawn, forced={row: list(b"xyz") for row in last})

    case.model.execute = forcing  # type: ignore[method-assign]
    case.run()
    assert case.text(number) == "abcdef"[:most] and case.reason(number) is FinishReason.LENGTH
    assert case.text(other) == "abc"
