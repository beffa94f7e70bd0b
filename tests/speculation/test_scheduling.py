"""The core with a drafter, driven by hand over a scripted model: the tokens are those of the script, in fewer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine import instructions as ins
from asyncengine.errors import RequestDroppedError
from asyncengine.speculation.lengths import DraftLengths
from asyncengine.testing import ByteTokenizer, ScriptedLoader, ScriptedModel
from asyncengine.testing.scripted import Script, echo
from tests.speculation.drafters import Broken, Guesser, Liar, Oracle, Scripted
from tests.step.core_case import EOS, Case, answer

Make = Callable[[ScriptedModel], Scripted]


def drafted(make: Make, script: Script = echo, length: int = 4, **changes: Any) -> Case:
    case = Case(ScriptedLoader(script, tokenizer=ByteTokenizer(), make_drafter=make))
    case.load(speculative_mode="ngram", spec_draft_length=length, **changes)
    return case


def test_right_drafts_take_fewer_steps_and_are_counted() -> None:
    case = drafted(Oracle, answer("abcdefghijklmnopqrs"))
    number = case.add("?")
    steps = case.run()
    assert case.text(number) == "abcdefghijklmnopqrs"
    assert case.tokens(number)[-1] == EOS
    assert steps == 1 + 4  # prefill; 19 tokens, 5 in a step
    usage, counters = case.usage(number), case.core.metrics().counters
    assert usage.completion_tokens == 20 == counters.generation_tokens
    assert (usage.draft_tokens, usage.accepted_draft_tokens) == (counters.draft_tokens, counters.accepted_draft_tokens)
    assert usage.accepted_draft_tokens == 20 - 1 - 3  # the last run ended with a draft
    assert counters.inter_token_latency_seconds.count == 19


def test_wrong_drafts_cost_no_step_and_change_nothing() -> None:
    case = drafted(Liar, answer("abcdefgh"))
    number = case.add("?")
    assert case.run() == 9
    assert case.text(number) == "abcdefgh"
    assert case.usage(number).accepted_draft_tokens == 0 < case.usage(number).draft_tokens


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_max_tokens_is_exact(max_tokens: int) -> None:
    case = drafted(Oracle, answer("abcdefghijklmnop"))
    number = case.add("?", max_tokens=max_tokens)
    case.run()
    assert case.text(number) == "abcdefghijklmnop"[:max_tokens]
    assert case.reason(number) == "length"


@pytest.mark.parametrize("stop", "bcdefghi")
def test_a_stop_token_in_the_middle_of_a_run_ends_it_there(stop: str) -> None:
    case = drafted(Oracle, answer("abcdefghijklmnop"))
    number = case.add("?", stop_token_ids=(ord(stop),))
    case.run()
    assert case.text(number) == "abcdefghijklmnop"[: ord(stop) - 96]
    assert (case.reason(number), case.stop_reason(number)) == ("stop", ord(stop))


def test_min_tokens_holds_within_a_run() -> None:
    case = drafted(Oracle, answer("aXbXcXdXe"))
    number = case.add("?", stop_token_ids=(ord("X"),), min_tokens=5)
    case.run()
    assert case.text(number) == "aXbXcX"


@pytest.mark.parametrize("stop", ["b", "cd", "efg", "hi"])
def test_a_stop_string_in_the_middle_of_a_run_ends_it_there(stop: str) -> None:
    case = drafted(Oracle, answer("abcdefghijklmnop"))
    number = case.add("?", stop_strs=(stop,))
    case.run()
    assert case.text(number) == "abcdefghijklmnop"["abcdefghijklmnop".index("a") : ord(stop[-1]) - 96]
    assert (case.reason(number), case.stop_reason(number)) == ("stop", stop)


@pytest.mark.parametrize("stop_strs", [(), ("never",)], ids=["told at once", "told one by one"])
def test_log_probabilities_stay_aligned(stop_strs: tuple[str, ...]) -> None:
    case = drafted(lambda model: Guesser(model, 1), answer("abcdefghijklmnop"))
    number = case.add("?", num_logprobs=1, stop_strs=stop_strs)
    case.run()
    entries = case.box.logprobs[number, 0]
    assert [entry.logprob for entry in entries] == [-float(i) for i in range(17)]
    assert [entry.top_ids for entry in entries] == [(token,) for token in case.tokens(number)]


def test_branches_are_told_of_their_copied_blocks_and_draft_each_for_itself() -> None:
    made: list[Scripted] = []

    def make(model: ScriptedModel) -> Scripted:
        made.append(Oracle(model))
        return made[-1]

    case = drafted(make, lambda prompt, branch: [97 + branch] * 12)
    number = case.add("abcdef", n=3)
    case.run()
    assert [case.text(number, branch) for branch in range(3)] == ["a" * 12, "b" * 12, "c" * 12]
    assert len(made[0].copies) == 2  # the prompt's last block, for the two branches that did not compute it
    assert len(made[0].followed) == 1


def test_blocks_that_are_not_there_shorten_drafts_and_preempt_nobody() -> None:
    case = drafted(Oracle, answer("abcdefghijklmnopqrstu"), length=16, max_total_sequence_length=64)
    numbers = [case.add("12345678"), case.add("abcdefgh")]
    case.run()
    assert [case.text(number) for number in numbers] == ["abcdefghijklmnopqrstu"] * 2
    assert case.core.metrics().counters.preemptions == 0


def test_preempted_sequences_go_on_with_the_same_tokens() -> None:
    case = drafted(
        Oracle, answer("abcdefghijklmnopqrstuvwxyz"), max_total_sequence_length=48, prefix_cache_mode="disable"
    )
    numbers = [case.add(f"{i}2345") for i in range(4)]
    case.run()
    assert [case.text(number) for number in numbers] == ["abcdefghijklmnopqrstuvwxyz"] * 4
    assert case.core.metrics().counters.preemptions > 0


def test_a_preempted_sequence_takes_along_how_its_drafts_fared() -> None:
    case = drafted(Liar, answer("abcdefghijklmnopqrstuvwxyz"), length=0)
    number = case.add("1234")
    case.step(6)
    scheduler = case.core.scheduler
    assert scheduler is not None and scheduler.drafting is not None
    lengths = scheduler.drafting.lengths
    (sequence,) = scheduler.running()
    learnt, fresh = lengths.learnt(sequence.slot), DraftLengths(1, 0, 8.0).learnt(0)
    assert learnt != fresh
    scheduler.preempt(sequence)
    case.step()
    assert sequence.resident and lengths.learnt(sequence.slot) == learnt
    case.add("5678")
    case.step()
    (other,) = set(scheduler.running()) - {sequence}
    assert lengths.learnt(other.slot) == fresh
    case.run()
    assert case.text(number) == "abcdefghijklmnopqrstuvwxyz"


def test_an_abort_during_a_verify_step_ends_the_request_before_its_run_is_published() -> None:
    case = drafted(Oracle, answer("abcdefghijklmnopqrstuvwxyz"))
    first, second = case.add("1234"), case.add("5678")
    case.step(2)
    had = case.text(first)
    case.step(pending=[ins.AbortRequests((first,), ())])
    assert case.reason(first) == "abort"
    assert case.text(first) == had
    case.run()
    assert case.text(second) == "abcdefghijklmnopqrstuvwxyz"
    # What the aborted one left in the prefix cache is right: the model would notice what is not.
    again = case.add("1234" + had + "abc")
    case.run()
    assert case.text(again) == "abcdefghijklmnopqrstuvwxyz"


def test_only_what_was_kept_reaches_the_prefix_cache() -> None:
    case = drafted(Liar, answer("abcdefgh"))
    case.add("1234")
    case.run()
    case.core.requests.counters.prompt_tokens = 0
    longer = case.add("1234abcdefgh" + "zz")
    case.run()
    assert case.usage(longer).cached_tokens == 12


def test_a_failed_verify_step_ends_its_requests_and_leaves_the_accounts_right() -> None:
    case = drafted(Oracle, answer("abcdefghijklmnopqrstuvwxyz"))
    number = case.add("1234")
    case.step(2)
    case.model.fail_next(RuntimeError("broken"))
    case.step()
    assert case.reason(number) == "error"
    other = case.add("1234")
    case.run()
    assert case.text(other) == "abcdefghijklmnopqrstuvwxyz"


def test_a_drafter_that_raises_is_not_asked_again_and_hurts_nobody() -> None:
    case = drafted(Broken, answer("abcdefgh"))
    number = case.add("?")
    case.run()
    assert case.text(number) == "abcdefgh"
    assert case.usage(number).draft_tokens == 0
    scheduler = case.core.scheduler
    assert scheduler is not None and scheduler.drafting is not None
    assert str(scheduler.drafting.failure) == "the drafter is broken"


def test_nothing_is_held_for_a_drafter_that_has_failed() -> None:
    case = drafted(Broken, answer("abcdefghijklmnopqrst"))
    case.add("1234")
    case.step(2)
    scheduler = case.core.scheduler
    assert scheduler is not None and scheduler.drafting is not None and scheduler.drafting.failure is not None
    case.add("5678")
    case.step(2)
    held = {len(scheduler.tokens_of(sequence)): sequence for sequence in scheduler.running()}
    assert int(scheduler.slots.num_blocks[held[6].slot]) == 2  # of 4 tokens


def test_steps_without_drafts_count_down_to_max_tokens_beside_those_with_some() -> None:
    """A sequence goes from steps with drafts to steps without and back, as an adaptive length does."""

    class Sometimes(Oracle):
        asked = 0

        def guess(self, right: list[int]) -> list[int]:
            self.asked += 1
            return right if self.asked % 3 == 0 else []

    for max_tokens in range(5, 25):
        case = drafted(Sometimes, answer("abcdefghijklmnopqrstuvwxyz"))
        number = case.add("?", max_tokens=max_tokens)
        case.run()
        assert case.text(number) == "abcdefghijklmnopqrstuvwxyz"[:max_tokens]


class _Fussy:
    """A grammar that takes what it is told to, and no more."""

    end_token_ids: tuple[int, ...] = ()

    def __init__(self, text: str, most: int) -> None:
        self.text, self.most = text, most

    def matcher(self) -> Any:
        grammar = self

        class Matcher:
            at = 0
            finished = False
            forces = False

            def fill(self, row: Any) -> None:
                row[:] = -1

            def accept(self, token_id: int) -> None:
                if self.at == grammar.most:
                    raise ValueError("no more")
                self.at += 1
                self.finished = self.at == len(grammar.text)

        return Matcher()


def test_a_grammar_that_completes_within_a_run_ends_it_there() -> None:
    case = drafted(Oracle, answer("abcdefgh"))
    number = case.add("?", grammar=_Fussy("abcdef", 100))
    case.run()
    assert case.text(number) == "abcdef"
    assert (case.reason(number), case.stop_reason(number)) == ("stop", None)


@pytest.mark.parametrize("most", range(1, 8))
def test_a_token_that_cannot_be_drawn_within_a_run_comes_after_those_that_could(most: int) -> None:
    case = drafted(Oracle, answer("abcdefghijkl"))
    number, other = case.add("?", grammar=_Fussy("x" * 100, most)), case.add("!")
    case.run()
    assert case.text(number) == "abcdefghijkl"[:most]
    assert case.reason(number) == "error"
    assert isinstance(case.end_error(number), RequestDroppedError)
    assert case.text(other) == "abcdefghijkl"


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(0, 9),
    blocks=st.integers(17, 60),
    page_size=st.sampled_from([1, 3, 4]),
    cache=st.sampled_from(["radix", "disable"]),
    mode=st.sampled_from(["hybrid", "chunked"]),
)
def test_whatever_is_guessed_the_tokens_are_the_scripts(
    seed: int, length: int, blocks: int, page_size: int, cache: str, mode: str
) -> None:
    random = np.random.default_rng(seed)

    def script(prompt: Any, branch: int) -> list[int]:
        own = np.random.default_rng([sum(prompt), len(prompt), branch])
        return own.integers(97, 100, int(own.integers(0, 30))).tolist()  # type: ignore[no-any-return]

    case = drafted(
        lambda model: Guesser(model, seed),
        script,
        length,
        max_total_sequence_length=max(blocks * page_size, 64),
        kv_cache_page_size=page_size,
        prefix_cache_mode=cache,
        prefill_mode=mode,
    )
    expected: dict[tuple[int, int], list[int]] = {}
    aborted: set[int] = set()
    numbers: list[int] = []
    for _ in range(40):
        if random.random() < 0.3:
            prompt = random.integers(97, 100, int(random.integers(1, 20))).tolist()
            n, most = int(random.integers(1, 4)), int(random.integers(1, 25))
            number = case.add(prompt, n=n, max_tokens=most)
            numbers.append(number)
            for branch in range(n):
                expected[number, branch] = [*script(prompt, branch), EOS][:most]
        if numbers and random.random() < 0.1:
            aborted.add(numbers[int(random.integers(len(numbers)))])
            case.step(pending=[ins.AbortRequests(tuple(aborted), ())])
        else:
            case.step()
    case.run()
    for (number, branch), tokens in expected.items():
        found = case.tokens(number, branch)
        assert found == (tokens[: len(found)] if number in aborted else tokens)
