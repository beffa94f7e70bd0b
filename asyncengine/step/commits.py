"""What the tokens of a step mean: who has them, who ends by them, and what is told of it. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from asyncengine.errors import RequestDroppedError
from asyncengine.events import Attention, BranchKey, Pooled, PromptLogprobs, Tokens
from asyncengine.instructions import Mailbox
from asyncengine.outputs import FinishReason
from asyncengine.step import failures
from asyncengine.step.batch import NO_INDEX, Float32, Int32, Int64, StepTokens, TokenLogprobs
from asyncengine.step.drafting import Drafts
from asyncengine.step.pieces import Pieces
from asyncengine.step.plan import Chunk, Plan
from asyncengine.step.requests import RequestTable
from asyncengine.step.searches import go_on
from asyncengine.step.sequence import Request, Sequence, SequenceState
from asyncengine.step.slots import SlotTable

_Beyond = tuple[list[int], bool]
"""What a grammar says of a drawn token: which tokens follow without a choice, and whether the text is complete then."""
_NOTHING: _Beyond = ([], False)

_End = tuple[FinishReason, int | str | None]
"""Why a branch ends, and the stop token or string that it ends by."""


@dataclass(slots=True)
class _Drawn:
    """What was drawn for some rows.

    Attributes:
        ids: (rows,) the tokens.
        logprobs: By row; None where nobody asked.
        beyond: Of rows of which there is something to say.
    """

    ids: Int32
    logprobs: list[TokenLogprobs | None] | None
    beyond: Mapping[int, _Beyond]

    def between(self, start: int, end: int) -> _Drawn:
        """That of rows in a row."""
        beyond = {row - start: what for row, what in self.beyond.items() if start <= row < end}
        return _Drawn(self.ids[start:end], None if self.logprobs is None else self.logprobs[start:end], beyond)

    def of(self, rows: list[int]) -> _Drawn:
        """That of some of the rows."""
        beyond = {i: self.beyond[row] for i, row in enumerate(rows) if row in self.beyond} if self.beyond else {}
        return _Drawn(self.ids[rows], None if self.logprobs is None else [self.logprobs[row] for row in rows], beyond)


@dataclass(slots=True)
class _Rows:
    """What is derived from a list of decoding sequences, kept while the list stays the same.

    Attributes:
        decodes: The sequences.
        keys: For each mailbox: its rows (None is all), and their keys.
        watched: Rows that have stop strings.
        stop_ids: (rows, columns) stop tokens.
        steps_left: Steps after which the first of them has all its tokens.
        any_stop: All stop tokens of all rows.
        places: (rows,) where the next tokens go in the slot table's `flat_tokens`.
        num_tokens: (rows,) how many tokens they have.
        pieces: For columns of the rows' length.
        last_token_at: When all of them had their newest token; None if not at the same time.
    """

    decodes: list[Sequence]
    keys: list[tuple[Mailbox, Int64 | None, tuple[BranchKey, ...]]]
    watched: list[tuple[int, Sequence]]
    stop_ids: Int32
    steps_left: int
    any_stop: frozenset[int]
    places: Int64
    num_tokens: Int64
    pieces: Pieces
    last_token_at: float | None = None


_NO_ROWS = _Rows([], [], [], np.empty((0, 0), dtype=np.int32), 0, frozenset(), NO_INDEX, NO_INDEX, Pieces(0))


class Commits:
    """Commits steps to the requests of a table.

    Args:
        table: Has the requests, and ends them.
    """

    def __init__(self, table: RequestTable) -> None:
        self._table = table
        self._rows = _NO_ROWS

    def forget(self) -> None:
        """Lets go of the sequences of the last step, with whatever is theirs."""
        self._rows = _NO_ROWS

    def commit(self, plan: Plan, drawn: StepTokens, interrupted: bool) -> None:
        """Gives each sequence its token, ends those that are complete, and writes it all to the outbox.

        Args:
            plan: The step.
            drawn: Its tokens.
            interrupted: Whether a sequence of the plan may have been ended since.
        """
        assert self._table.scheduler is not None
        now = self._table.clock()
        beyond: dict[int, _Beyond] = {}
        if drawn.finished or drawn.forced:
            told = {*drawn.finished, *drawn.forced}
            beyond = {row: (drawn.forced.get(row, []), row in drawn.finished) for row in told}
        all_rows = _Drawn(drawn.token_ids, drawn.logprobs, beyond)
        if drawn.scores:
            self._commit_scores(plan, drawn.scores)
        if len(drawn.pooled):
            self._commit_pooled(plan, drawn.pooled)
        if drawn.attention:
            self._commit_attention(plan, drawn.attention)
        at = len(plan.decodes)
        if plan.drafts is not None:
            at = plan.num_decode_samples
            self._commit_drafts(plan, plan.drafts, drawn, all_rows, now)
        elif at:
            slots, sequences = plan.decode_slots, plan.decodes
            own = all_rows.between(0, at) if plan.chunks else all_rows
            if interrupted or plan.searching:
                alive = [i for i, sequence in enumerate(sequences) if sequence.state is SequenceState.DECODE]
                if plan.searching:
                    self._commit_beams(sequences, own)
                    alive = [i for i in alive if sequences[i].request.search is None]
                sequences = [sequences[i] for i in alive]
                if sequences == self._table.scheduler.decodes:  # as they will be in the next step
                    sequences = self._table.scheduler.decodes
                slots, own = slots[alive], own.of(alive)
            if sequences:
                self._commit_decodes(sequences, slots, own, now)
        for chunk in plan.chunks:
            start, at = at, at + len(chunk.branches)
            if chunk.last and chunk.sequence.state is SequenceState.PREFILL:
                self._commit_prefill(chunk, all_rows.between(start, at), now)

    def _commit_scores(self, plan: Plan, scores: list[TokenLogprobs]) -> None:
        at = 0
        for chunk in plan.chunks:
            request, count = chunk.sequence.request, 0 if chunk.aligns else chunk.num_scored
            if count and not request.ended:
                self._table.outbox.add(request.mailbox, PromptLogprobs(request.new.number, scores[at : at + count]))
                request.scored = chunk.scored[1]
            at += count

    def _commit_pooled(self, plan: Plan, sums: Float32) -> None:
        """Adds up the hidden states, in double precision so that the pieces do not show; tells whose are complete."""
        pooling = (chunk for chunk in plan.chunks if chunk.pools)
        complete: list[tuple[Request, Float32]] = []
        for chunk, part in zip(pooling, sums, strict=True):
            request = chunk.sequence.request
            if request.ended:
                continue
            request.pooled = part.astype(np.float64) + (0.0 if request.pooled is None else request.pooled)
            request.scored = chunk.pooled[1]
            if chunk.last:
                count = len(request.new.prompt) if request.new.pooling == "mean" else 1
                complete.append((request, (request.pooled / count).astype(np.float32)))
        assert self._table.loaded is not None
        dense, classifier = self._table.loaded.dense, self._table.loaded.classifier
        embedded = [i for i, (request, _) in enumerate(complete) if dense and not request.new.classifies]
        if embedded:  # at once: the layers are read once for all of them
            vectors = np.stack([complete[i][1] for i in embedded])
            for layer in dense:
                vectors = layer(vectors)
            for i, vector in zip(embedded, vectors, strict=True):
                complete[i] = (complete[i][0], vector)
        for request, vector in complete:
            head = classifier if request.new.classifies else None
            self._table.outbox.add(request.mailbox, Pooled(request.new.number, vector, head))

    def _commit_attention(self, plan: Plan, parts: tuple[Float32, ...]) -> None:
        aligning = (chunk for chunk in plan.chunks if chunk.aligns)
        for chunk, part in zip(aligning, parts, strict=True):
            request = chunk.sequence.request
            if request.ended:
                continue
            request.attention = (*request.attention, part)
            request.scored = chunk.scored[1]
            if chunk.last:
                self._table.outbox.add(request.mailbox, Attention(request.new.number, request.attention))

    def _commit_decodes(self, sequences: list[Sequence], slots: Int64, drawn: _Drawn, now: float) -> None:
        assert self._table.scheduler is not None
        table = self._table.scheduler.slots
        if self._rows.decodes is not sequences:
            self._rows = _derive_rows(sequences, table, slots)
        derived = self._rows
        pieces, ids, logprobs, beyond = derived.pieces, drawn.ids, drawn.logprobs, drawn.beyond
        pieces.put(table.flat_tokens, derived.places, ids)
        derived.places = pieces.plus_one(derived.places)
        derived.num_tokens = pieces.plus_one(derived.num_tokens)
        pieces.put(table.num_tokens, slots, derived.num_tokens)
        gaps = self._table.counters.inter_token_latency_seconds
        if derived.last_token_at is None:
            gaps.observe_all(now - table.last_token_at[slots])
        else:
            gaps.observe(now - derived.last_token_at, len(sequences))
        pieces.put_all(table.last_token_at, slots, now)
        derived.last_token_at = now
        token_ids = ids.tolist()
        self._table.counters.generation_tokens += len(token_ids)
        for mailbox, rows, keys in derived.keys:
            if rows is None:
                self._table.outbox.add(mailbox, Tokens(keys, token_ids, logprobs))
            else:
                own = None if logprobs is None else [logprobs[row] for row in rows.tolist()]
                self._table.outbox.add(mailbox, Tokens(keys, ids[rows].tolist(), own))
        stopped: set[int] = set()
        if derived.any_stop and not derived.any_stop.isdisjoint(token_ids):
            stopped = set(table.stopped(slots, ids, derived.stop_ids))
        watched: dict[int, str] = {}
        for row, sequence in derived.watched:
            if row not in stopped and (stop := self._read_text(sequence, token_ids[row])) is not None:
                watched[row] = stop
        derived.steps_left -= 1
        if derived.steps_left > 0 and not watched and not beyond and not stopped:
            return
        ending = table.num_tokens[slots] >= table.max_tokens[slots]
        ending[[*stopped, *watched]] = True
        finished = [row for row, (tokens, complete) in beyond.items() if complete and not tokens]
        if finished:
            ending[finished] = True
        for row in np.flatnonzero(ending).tolist():
            if sequences[row].state is SequenceState.ENDED:
                continue
            stop = token_ids[row] if row in stopped else watched.get(row)
            by_length = stop is None and row not in finished
            self._table.end_branch(sequences[row], FinishReason.LENGTH if by_length else FinishReason.STOP, stop)
        for row, (tokens, complete) in beyond.items():
            if tokens and sequences[row].state is not SequenceState.ENDED:
                self._jump(sequences[row], tokens, complete)

    def _commit_beams(self, sequences: Iterable[Sequence], drawn: _Drawn) -> None:
        """Lets the searches among some sequences, one per row, go on."""
        scheduler, logprobs = self._table.scheduler, drawn.logprobs
        assert scheduler is not None and logprobs is not None
        for request in go_on(zip(sequences, logprobs, strict=True), scheduler):
            assert request.search is not None
            if best := request.search.best(1):
                self._table.end_branches(request, best[0].finish_reason or FinishReason.STOP)
            else:
                failures.drop_undrawn(self._table, request, ValueError("no token may follow the prompt"))
        failures.drop(self._table)

    def _commit_drafts(self, plan: Plan, drafts: Drafts, drawn: StepTokens, all_rows: _Drawn, now: float) -> None:
        """As `_commit_decodes`, where a row may have several tokens: those that were drafted rightly, and one more."""
        assert self._table.scheduler is not None and self._table.scheduler.drafting is not None
        assert drawn.taken is not None
        lengths = self._table.scheduler.drafting.lengths
        guesses = iter(drafts.token_ids.tolist())
        if plan.searching:
            firsts = (np.cumsum(drafts.lengths + 1) - drafts.lengths - 1).tolist()
            for sequence, first in zip(plan.decodes, firsts, strict=True):
                if sequence.request.search is not None and (cause := drawn.failed.get(first)) is not None:
                    failures.drop_undrawn(self._table, sequence.request, cause)
            self._commit_beams(plan.decodes, all_rows.of(firsts))
        at = 0
        for sequence, slot, drafted, taken in zip(
            plan.decodes, plan.decode_slots.tolist(), drafts.lengths.tolist(), drawn.taken.tolist(), strict=True
        ):
            start, at = at, at + drafted + 1
            guessed = [next(guesses) for _ in range(drafted)]
            if sequence.state is not SequenceState.DECODE or sequence.request.search is not None:
                continue  # it was ended during the step, or is a beam
            own = all_rows.between(start, start + taken)
            if drafted:
                pairs = zip(guessed, own.ids.tolist(), strict=False)
                lengths.learn(slot, drafted, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
                self._table.counters.draft_tokens += drafted
                sequence.request.draft_tokens += drafted
            if taken:
                self._commit_run(sequence, guessed, own, now)
            cause = drawn.failed.get(start + taken)
            if cause is not None and taken <= drafted and sequence.state is SequenceState.DECODE:
                failures.drop_undrawn(self._table, sequence.request, cause)

    def _commit_run(self, sequence: Sequence, guessed: list[int], drawn: _Drawn, now: float) -> None:
        """Gives a branch the tokens that it has drawn in one step, as far as it does not end among them."""
        scheduler = self._table.scheduler
        assert scheduler is not None
        table, request, ids = scheduler.slots, sequence.request, drawn.ids.tolist()
        generated = int(table.num_tokens[sequence.slot]) - len(request.new.prompt)
        gap = now - float(table.last_token_at[sequence.slot])
        table.last_token_at[sequence.slot] = now
        forced, complete = drawn.beyond.get(len(ids) - 1, _NOTHING)
        told = 0

        def tell(upto: int) -> None:
            nonlocal told
            own = None if drawn.logprobs is None else drawn.logprobs[told:upto]
            scheduler.take(sequence, ids[told:upto])
            self._table.outbox.add(request.mailbox, Tokens((sequence.key,) * (upto - told), ids[told:upto], own))
            told = upto

        for taken, token_id in enumerate(ids, 1):
            if taken <= len(guessed) and guessed[taken - 1] == token_id:
                request.accepted_draft_tokens += 1
                self._table.counters.accepted_draft_tokens += 1
            if sequence.text is not None:  # told before it is read, which may end the request
                tell(taken)
            end = self._end_by(sequence, token_id, generated + taken, complete and not forced and taken == len(ids))
            if end is not None or sequence.state is SequenceState.ENDED:
                break
        if told < taken:
            tell(taken)
        self._table.counters.generation_tokens += told
        self._table.counters.inter_token_latency_seconds.observe(gap / told, told)
        if end is not None:
            self._table.end_branch(sequence, *end)
        elif forced and sequence.state is not SequenceState.ENDED:
            self._jump(sequence, forced, complete)

    def _commit_prefill(self, chunk: Chunk, drawn: _Drawn, now: float) -> None:
        """A prefill is complete: its sequence goes on decoding, and so do the branches that shared it."""
        assert self._table.scheduler is not None
        scheduler, trunk, request = self._table.scheduler, chunk.sequence, chunk.sequence.request
        new = request.new
        if (arriving := request.arriving) is not None:
            scheduler.hold(trunk)
            arriving.note(new.prompt)
            self._table.compute_ahead(request, arriving)
            return
        if new.pin is not None:
            whole = len(new.prompt) - len(new.prompt) % scheduler.limits.page_size
            scheduler.blocks.tree.pin(new.pin, new.prompt[:whole], request.space)
        if not chunk.branches:  # max_tokens = 0
            self._table.end_branches(request, FinishReason.LENGTH)
            return
        if request.search is not None:
            scheduler.residents.decode(trunk)
            self._commit_beams([trunk], drawn)
            return
        if request.first_token_at is None:
            self._table.note_first_token(request, now)
        scheduler.residents.decode(trunk)
        scheduler.slots.append_tokens(np.array([trunk.slot]), drawn.ids[:1])
        token_ids = drawn.ids.tolist()
        self._table.counters.generation_tokens += len(token_ids)
        for branch, token_id in zip(chunk.branches[1:], token_ids[1:], strict=True):
            scheduler.fork(trunk, branch, token_id)
        for branch in request.branches:
            if branch.state is SequenceState.UNBORN:  # there were not enough slots for all
                scheduler.add(branch)
        keys = tuple(branch.key for branch in chunk.branches)
        self._table.outbox.add(request.mailbox, Tokens(keys, token_ids, drawn.logprobs))
        for row, (branch, token_id) in enumerate(zip(chunk.branches, token_ids, strict=True)):
            if branch.state is not SequenceState.ENDED:
                self._commit_first(branch, token_id, drawn.beyond.get(row, _NOTHING), now)

    def _commit_first(self, branch: Sequence, token_id: int, beyond: _Beyond, now: float) -> None:
        assert self._table.scheduler is not None
        if branch.resident:
            self._table.scheduler.slots.last_token_at[branch.slot] = now
        generated = len(self._table.scheduler.tokens_of(branch)) - len(branch.request.new.prompt)
        forced, complete = beyond
        end = self._end_by(branch, token_id, generated, complete and not forced)
        if end is not None:
            self._table.end_branch(branch, *end)
        elif forced and branch.state is not SequenceState.ENDED:
            self._jump(branch, forced, complete)

    def _end_by(self, branch: Sequence, token_id: int, generated: int, complete: bool) -> _End | None:
        """How a branch ends by a token, the last of `generated`; None if it does not.

        Reads its text, which ends the request where the tokenizer fails.

        Args:
            branch: That has not ended.
            token_id: The token.
            generated: Tokens of the branch up to this one.
            complete: Whether its grammar says that the text is complete with it.
        """
        params = branch.request.new.params
        if token_id in params.stop_token_ids and generated > params.min_tokens:
            return FinishReason.STOP, token_id
        if branch.text is not None and (stop := self._read_text(branch, token_id)) is not None:
            return FinishReason.STOP, stop
        if branch.state is SequenceState.ENDED:
            return None
        if complete:
            return FinishReason.STOP, None
        return (FinishReason.LENGTH, None) if self._is_full(branch, generated) else None

    def _is_full(self, branch: Sequence, generated: int) -> bool:
        assert self._table.scheduler is not None
        most, new = self._table.scheduler.limits.max_tokens, branch.request.new
        return generated >= new.params.max_tokens or len(new.prompt) + generated >= most

    def _jump(self, branch: Sequence, tokens: list[int], complete: bool) -> None:
        """Gives a branch tokens that it had no choice about, as far as it does not end among them.

        Jump-forward decoding is of SGLang (Zheng et al., 2024). Here a token is jumped over where it is the only one
        that the masks allow, so that the tokens are those that would have been drawn one by one.
        """
        assert self._table.scheduler is not None
        generated = len(self._table.scheduler.tokens_of(branch)) - len(branch.request.new.prompt)
        for taken, token_id in enumerate(tokens, 1):
            end = self._end_by(branch, token_id, generated + taken, complete and taken == len(tokens))
            if branch.state is SequenceState.ENDED:
                return
            if end is not None:
                break
        self._table.scheduler.extend(branch, tokens[:taken])
        self._table.counters.generation_tokens += taken
        self._table.outbox.add(branch.request.mailbox, Tokens((branch.key,) * taken, tokens[:taken]))
        if end is not None:
            self._table.end_branch(branch, *end)

    def _read_text(self, branch: Sequence, token_id: int) -> str | None:
        """Feeds a token to a branch's text; returns the stop string that it completes."""
        assert branch.text is not None
        try:
            branch.text.push([token_id])
        except BaseException as cause:  # the tokenizer is not ours; a panic in another language is no `Exception`
            error = RequestDroppedError(f"request {branch.request.new.request_id}: cannot decode {token_id}: {cause}")
            error.__cause__ = cause
            self._table.end_branches(branch.request, FinishReason.ERROR, error)
            return None
        return branch.text.stopped_by


def _derive_rows(sequences: list[Sequence], table: SlotTable, slots: Int64) -> _Rows:
    mailboxes = [sequence.request.mailbox for sequence in sequences]
    keys: list[tuple[Mailbox, Int64 | None, tuple[BranchKey, ...]]]
    if mailboxes.count(mailboxes[0]) == len(mailboxes):
        keys = [(mailboxes[0], None, tuple([sequence.key for sequence in sequences]))]
    else:
        rows: dict[Mailbox, list[int]] = {}
        for row, mailbox in enumerate(mailboxes):
            rows.setdefault(mailbox, []).append(row)
        keys = [
            (mailbox, np.array(own, dtype=np.int64), tuple([sequences[row].key for row in own]))
            for mailbox, own in rows.items()
        ]
    num_tokens, stop_ids = table.num_tokens[slots], table.stop_columns(slots)
    return _Rows(
        decodes=sequences,
        keys=keys,
        watched=[(row, sequence) for row, sequence in enumerate(sequences) if sequence.text is not None],
        stop_ids=stop_ids,
        steps_left=int((table.max_tokens[slots] - num_tokens).min()),
        any_stop=frozenset(stop_ids.reshape(-1).tolist()).union(*map(np.ndarray.tolist, table.more_stop_ids.values())),
        places=slots * table.tokens.shape[1] + num_tokens,
        num_tokens=num_tokens,
        pieces=Pieces(len(slots)),
    )
