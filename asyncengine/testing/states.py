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
    """

    def __init__(self, num_slots: int, num_kept: int) -> None:
        self._num_slots = num_slots
        self._states: list[State | None] = [None] * (num_slots + num_kept)

    def at(self, place: int) -> State | None:
        """What is at a place; None for rubbish."""
        return self._states[place]

    def move(self, batch: StepBatch, rows: Sequence[Sequence[int]]) -> None:
        """Computes a step.

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
            self._states[slot] = tuple(tokens)
            for of, count, place in batch.state_saves.tolist():
                if of == row:
                    saves[place] = tuple(tokens[: context + count])
        for place, state in saves.items():
            self._states[place] = state

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
        assert batch.draft_lengths is None, "a state cannot be taken back"
        slots: list[int] = batch.slots.tolist()
        copies, saves = batch.state_copies.tolist(), batch.state_saves.tolist()
        places = range(len(self._states))
        own = range(self._num_slots)
        assert len({*slots}) == len(slots) and all(slot in own for slot in slots), "a slot is there twice, or none"
        assert all(source in places and to in own for source, to in copies), "a copy from or to nowhere"
        assert saves == sorted(saves, key=lambda save: save[:2]), "saves are not in order"
        written = [place for *_, place in saves]
        assert len({*written, *slots}) == len(written) + len(slots), "two states are written to one place"
        assert all(place in places for place in written), "a state is saved nowhere"
        counts = (batch.query_start[1:] - batch.query_start[:-1]).tolist()
        assert all(1 <= count <= counts[row] for row, count, _ in saves), "a state is saved that is not computed"
        return slots
