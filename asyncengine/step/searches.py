"""The beam searches among the requests: how they go on, and what is told of them. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Iterable

from asyncengine.events import BranchEnded, Event, Tokens
from asyncengine.outputs import FinishReason
from asyncengine.step.batch import TokenLogprobs
from asyncengine.step.beam_search import BeamSearch
from asyncengine.step.limits import Limits
from asyncengine.step.scheduler import Scheduler
from asyncengine.step.sequence import Request, Sequence, SequenceState

Found = Iterable[tuple[Sequence, TokenLogprobs | None]]
"""Sequences, and what a step has found of the token that follows each."""


def go_on(found: Found, scheduler: Scheduler) -> list[Request]:
    """Lets searches go on.

    Args:
        found: What a step has found, of all beams of a search or of none.
        scheduler: Has the beams.

    Returns:
        The requests whose searches are over.
    """
    candidates: dict[Request, dict[int, TokenLogprobs]] = {}
    for sequence, logprobs in found:
        if sequence.request.search is not None and sequence.state is SequenceState.DECODE:
            assert logprobs is not None
            candidates.setdefault(sequence.request, {})[sequence.branch] = logprobs
    over: list[Request] = []
    for request, own in candidates.items():
        assert request.search is not None
        choices = request.search.advance(own, _most(request, scheduler.limits))
        if not choices:
            over.append(request)
        elif (became := scheduler.branch_out(request, choices)) is not None:
            request.search.go_on(became)
    return over


def _most(request: Request, limits: Limits) -> int:
    """Most tokens of a text: there may be less room than there was to be when the request was prepared."""
    params, prompt_tokens = request.new.params, len(request.new.prompt)
    room = limits.written_by_beams(prompt_tokens, params.num_sequences)
    return min(params.max_tokens, limits.max_tokens - prompt_tokens, room)


def told(request: Request, search: BeamSearch, reason: FinishReason) -> list[Event]:
    """What is told of a search at its end: the best that it has found, and why each branch of its request has ended.

    Args:
        request: Whose it is.
        search: It.
        reason: Why those branches end whose text has not come to its end.
    """
    new = request.new
    events: list[Event] = []
    best = search.best(new.params.n)
    for branch in range(new.params.n):
        key = new.number, branch
        if branch >= len(best):
            events.append(BranchEnded(key, reason))
            continue
        text = best[branch]
        logprobs: list[TokenLogprobs | None] = [*text.logprobs]
        keys = (key,) * len(text.token_ids)
        events += [
            Tokens(keys, text.token_ids, None if new.params.num_logprobs < 0 else logprobs),
            BranchEnded(key, text.finish_reason or reason, text.stop_reason, text.score),
        ]
    search.num_told = sum(len(text.token_ids) for text in best)
    return events
