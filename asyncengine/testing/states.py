"""The states that a scripted model keeps, each of them the tokens that it is of. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Sequence

from asyncengine.step.batch import StepBatch

State = tuple[int, ...]
"""The tokens, as they are in the "KV cache"."""


class ScriptedStates:
    """One state per place, moved as `StepBatch` says; whoever goes on from a wrong one raises.

    Args:
        num_slots: Places of the slots' own.
        num_kept: Places behind those.
        num_drafted: How many tokens may be drafted in a step.
    """

    def __init__(self, num_slots: int, num_kept: int, num_drafted: int = 0) -> None:
        self._num_slots = num_slots
        self._num_drafted = num_drafted
        self._states: list[State | None] = [None] * (num_slots + num_kept)

    def at(self, place: int) -> State | None:
        """What is at a place; None for rubbish."""
        return self._states[place]

    def move(self, batch: StepBatch, rows: Sequence[Sequence[int]]) -> None:
        """Computes a step. With drafts, what it leaves of the rows that decode is rubbish until `take`.

        Args:
            batch: The step.
            rows: What is in the cache of each of its rows, what it computes included.

        Raises:
            AssertionError: A row goes on from a state that is not its own, or the batch is malformed.
        """
        slots = self._check(batch)
        for source, to in batch.state_copies.tolist():
            self._states[to] = self._states[source]
        saves: dict[int, State] = {}
        for row, (slot, context, tokens) in enumerate(zip(slots, batch.context_lens.tolist(), rows, strict=True)):
            known = () if context == 0 else self._states[slot]
            assert known == tuple(tokens[:context]), f"the state of slot {slot} is of {known}, not {tokens[:context]}"
            if batch.draft_lengths is not None and row < batch.num_decodes:
                self._states[slot] = None
                continue
            self._states[slot] = tuple(tokens)
            for of, count, place in batch.state_saves.tolist():
                if of == row:
                    saves[place] = tuple(tokens[: context + count])
        for place, state in saves.items():
            self._states[place] = state

    def take(self, batch: StepBatch, rows: Sequence[Sequence[int]], taken: Sequence[int]) -> None:
        """Ends a step with drafts: states of the rows that decode are of the tokens that count.

        Args:
            batch: The step.
            rows: As of `move`.
            taken: As `StepTokens.taken`. Who has no token that counts has no state.
        """
        assert batch.slots is not None and len(taken) == batch.num_decodes, "not every row that decodes is told of"
        for slot, context, tokens, count in zip(
            batch.slots.tolist(), batch.context_lens.tolist(), rows, taken, strict=False
        ):
            self._states[slot] = tuple(tokens[: context + count]) if count else None
        for row, count, place in batch.state_saves.tolist():
            if row < batch.num_decodes and count <= taken[row]:
                self._states[place] = tuple(rows[row][: int(batch.context_lens[row]) + count])

    def spoil(self, batch: StepBatch) -> None:
        """Fails a step: nobody knows how much of it was done."""
        for place in [*self._check(batch), *batch.state_copies[:, 1].tolist(), *batch.state_saves[:, 2].tolist()]:
            self._states[place] = None

    def clear(self) -> None:
        """Loses all of them."""
        self._states = [None] * len(self._states)

    def _check(self, batch: StepBatch) -> list[int]:
        """The slots of the rows, of a batch that is well-formed."""
        assert batch.slots is not None and len(batch.slots) == len(batch.context_lens), "rows have no slots"
        drafted = 0 if batch.draft_lengths is None else int(batch.draft_lengths.sum())
        assert drafted <= self._num_drafted, (
            f"{drafted} tokens are drafted; states can be set aside of {self._num_drafted}"
        )
        slots: list[int] = batch.slots.tolist()
        copies, saves = batch.state_copies.tolist(), batch.state_saves.tolist()
        places = range(len(self._states))
        own = range(self._num_slots)
        assert len({*slots}) == len(slots) and all(slot in own for slot in slots), "a slot is there twice, or none"
        assert all(source in places and to in own for source, to in copies), "a copy from or to nowhere"
        assert saves == sorted(saves, key=lambda save: save[:2]), "saves are not in order"
        written = [place for *_, place in saves]
        if batch.draft_lengths is not None:  # a row that decodes may name one place several times
            once = {(row, place) for row, _, place in saves if row < batch.num_decodes}
            written = [place for _, place in once] + [place for row, _, place in saves if row >= batch.num_decodes]
        assert len({*written, *slots}) == len(written) + len(slots), "two states are written to one place"
        assert all(place in places for place in written), "a state is saved nowhere"
        counts = (batch.query_start[1:] - batch.query_start[:-1]).tolist()
        assert all(1 <= count <= counts[row] for row, count, _ in saves), "a state is saved that is not computed"
        return slots
