"""How a step's tokens are cut for recurrent layers, which look at each sequence by itself. Owned by the step thread."""

from __future__ import annotations

from dataclasses import dataclass

from asyncengine.model.recurrent.drafted_rows import DraftedRows
from asyncengine.step.batch import StepBatch


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one sequence that a layer computes at once.

    Attributes:
        tokens: Which of the step's, from and to.
        place: Of the sequence's state.
        fresh: Whether it begins with no state.
        saves: Places to which the state goes as it is behind them.
    """

    tokens: tuple[int, int]
    place: int
    fresh: bool
    saves: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step, cut: the rows that decode are computed at once, and each piece of a prompt by itself.

    Attributes:
        num_decodes: How many rows decode.
        alike: From where to where their places are, if these follow one another; None else.
        pieces: What follows them.
        drafted: The rows that decode, in a step with drafts.
    """

    num_decodes: int
    alike: tuple[int, int] | None = None
    pieces: tuple[Piece, ...] = ()
    drafted: DraftedRows | None = None


def late_saves(batch: StepBatch) -> tuple[tuple[int, int], ...]:
    """What is kept of the rows that decode, whose state is that behind the step; with drafts, nothing yet."""
    if batch.slots is None or batch.draft_lengths is not None:
        return ()
    decodes = batch.num_decodes
    return tuple((int(batch.slots[row]), place) for row, _, place in batch.state_saves.tolist() if row < decodes)


def cut(batch: StepBatch, drafted: DraftedRows | None = None) -> StepRows:
    """Cuts a step, whose rows that decode have one token each unless there are drafts."""
    assert batch.slots is not None and (batch.draft_lengths is None or drafted is not None)
    decodes = batch.num_decodes
    places = batch.slots.tolist()
    saves: dict[int, list[tuple[int, int]]] = {}
    for row, count, place in batch.state_saves.tolist():
        if row >= decodes:
            saves.setdefault(row, []).append((count, place))
    pieces: list[Piece] = []
    starts, context = batch.query_start.tolist(), batch.context_lens.tolist()
    for row in range(decodes, len(places)):
        start, end = starts[row], starts[row + 1]
        ends: dict[int, list[int]] = {}
        for count, place in saves.get(row, ()):
            ends.setdefault(start + count, []).append(place)
        ends.setdefault(end, [])
        fresh = context[row] == 0
        for stop in sorted(ends):
            pieces.append(Piece((start, stop), places[row], fresh, tuple(ends[stop])))
            start, fresh = stop, False
    first = places[0] if decodes else 0
    follow = places[:decodes] == list(range(first, first + decodes))
    return StepRows(decodes, (first, first + decodes) if follow else None, tuple(pieces), drafted)
