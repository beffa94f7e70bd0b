"""What becomes of requests that the model refuses, or for which it fails. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Mapping

from asyncengine.errors import AsyncEngineError, RequestDroppedError, StepError
from asyncengine.media import MediaFailure
from asyncengine.outputs import FinishReason
from asyncengine.step.plan import Plan
from asyncengine.step.requests import RequestTable
from asyncengine.step.sequence import Request, SequenceState


def drop(requests: RequestTable) -> None:
    """Ends the requests whose parameters the model refused, or of which there is no room to go on."""
    assert requests.scheduler is not None
    dropped, requests.scheduler.dropped = requests.scheduler.dropped, []
    for sequence, cause in dropped:
        error: AsyncEngineError
        if isinstance(cause, StepError):
            error = cause
        else:
            error = RequestDroppedError(f"request {sequence.request.new.request_id}: {cause}")
            error.__cause__ = cause
        requests.end_branches(sequence.request, FinishReason.ERROR, error)


def drop_rows(requests: RequestTable, plan: Plan, failed: Mapping[int, Exception]) -> None:
    """Ends the requests for which the model could not draw; what is in the cache of them is right.

    Rows with drafts are left to `commit`: they may have had tokens before.
    """
    rows = [*plan.decodes, *(branch for chunk in plan.chunks for branch in chunk.branches)]
    ahead = 0 if plan.drafts is None else len(plan.drafts.token_ids)
    for row, cause in failed.items():
        if ahead and row < plan.num_decode_samples:
            continue
        sequence = rows[row - ahead]
        if sequence.state is not SequenceState.ENDED:
            drop_undrawn(requests, sequence.request, cause)


def drop_undrawn(requests: RequestTable, request: Request, cause: Exception) -> None:
    """Ends a request for which the model could not draw a token."""
    if not request.ended:
        error = RequestDroppedError(f"request {request.new.request_id}: no token could be drawn: {cause!r}")
        error.__cause__ = cause
        requests.end_branches(request, FinishReason.ERROR, error)


def fail_step(requests: RequestTable, plan: Plan, cause: Exception) -> None:
    """Ends the requests that took part in a failed step, or those with what could not be encoded for it; others are
    computed again.
    """
    assert requests.scheduler is not None
    batch = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks)]
    batch = [sequence for sequence in batch if sequence.resident]  # one that has ended may have a row yet
    for request in {sequence.request.new.number: sequence.request for sequence in batch}.values():
        if isinstance(cause, MediaFailure) and not request.has_media(cause.digest):
            continue
        error = StepError(f"request {request.new.request_id}: the step failed: {cause}")
        error.__cause__ = cause
        # What the failed step was writing must not reach the prefix cache, nor anyone who shares blocks.
        for branch in request.branches:
            branch.weight_version = -1
        requests.end_branches(request, FinishReason.ERROR, error)
    # A step behind it may have moved states of sequences on, or not.
    requests.scheduler.preempt_all()
