"""The sequences that take part in steps: how they come in, and how they leave. Owned by the step thread."""

from __future__ import annotations

from asyncengine.step.adapters import NO_ADAPTER
from asyncengine.step.decode_rows import DecodeRows
from asyncengine.step.kv_blocks import KVBlocks
from asyncengine.step.limits import Limits
from asyncengine.step.sequence import Sequence, SequenceState
from asyncengine.step.slots import SlotTable


class Residents:
    """Sequences with a slot and blocks, by what steps do with them.

    Attributes:
        prefilling: Those whose tokens are not all in the cache yet, in the order in which they began.
        decoding: Those of which each step draws another token.
        departures: How often a sequence has left the steps; so whoever remembers the number knows whether one has.
        rows: Those that decode, as they were when `decodes` was last asked for.
        no_rows: What `rows` is where nobody decodes.
    """

    def __init__(self, limits: Limits, slots: SlotTable, blocks: KVBlocks) -> None:
        self.prefilling: list[Sequence] = []
        self.departures = 0
        self.rows = self.no_rows = DecodeRows([], slots)
        self._limits, self._slots, self._blocks = limits, slots, blocks
        self.decoding: dict[Sequence, None] = {}
        self._finishing: dict[Sequence, None] = {}  # their last token is being drawn
        self._changed = False

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding) + len(self._finishing)

    def all(self) -> list[Sequence]:
        """All of them: those that decode before those whose prompts are computed."""
        return [*self.decoding, *self._finishing, *self.prefilling]

    def decodes(self) -> DecodeRows:
        """Those that decode, brought up to date; the same object while they stay the same."""
        if self._changed:
            self._changed = False
            self.rows = DecodeRows(list(self.decoding), self._slots)
        return self.rows

    def look_again(self) -> None:
        """Says that the tokens of sequences that decode have changed otherwise than by one for each."""
        self._changed = True

    def forget_rows(self) -> None:
        """Lets go of the sequences of the last step; nothing runs."""
        self.rows = self.no_rows

    # Coming in

    def fill(self, sequence: Sequence, slot: int) -> None:
        """Writes a sequence into the table's row of a slot, which is its own from now on."""
        new = sequence.request.new
        prompt_tokens = len(new.prompt)
        sequence.slot = slot
        self._slots.fill(
            slot,
            sequence.tokens,
            prompt_tokens,
            max_tokens=min(prompt_tokens + new.params.max_tokens, self._limits.max_tokens),
            min_tokens=prompt_tokens + new.params.min_tokens,
            stop_ids=new.params.stop_token_ids,
            bound=new.params.follows_tokens or new.params.search is not None,
            searching=new.params.search is not None,
            adapter=NO_ADAPTER if sequence.request.adapter is None else sequence.request.adapter.index,
            shift=0 if new.media is None else new.media.shift,
            source=0 if new.media is None else new.media.source,
        )

    def prefill(self, sequence: Sequence) -> None:
        """Lets a sequence begin."""
        sequence.state = SequenceState.PREFILL
        sequence.in_flight = 0
        self.prefilling.append(sequence)

    def decode(self, sequence: Sequence) -> None:
        """Lets a sequence decode whose tokens but for the last one are in the cache."""
        if sequence.state is SequenceState.PREFILL:
            self.prefilling.remove(sequence)
        sequence.state = SequenceState.DECODE
        self.decoding[sequence] = None
        self._changed = True

    def prefill_again(self, sequence: Sequence) -> None:
        """Lets a sequence that decodes, if it does, compute tokens that it was given as a piece of prefill."""
        if sequence.state is SequenceState.DECODE:
            del self.decoding[sequence]
            self._changed = True
            sequence.state = SequenceState.PREFILL
            self.prefilling.append(sequence)

    # Leaving

    def finish_full(self) -> None:
        """Lets those sequences sit out of which the steps that were launched draw the last token."""
        for sequence in self.decodes().full():
            del self.decoding[sequence]
            self._finishing[sequence] = None
            self._changed = True

    def leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of the steps and releases its blocks; it has its slot still."""
        if sequence.state is SequenceState.PREFILL:
            self.prefilling.remove(sequence)
        elif sequence in self._finishing:
            del self._finishing[sequence]
        else:
            del self.decoding[sequence]
            self._changed = True
        self.departures += 1
        self._blocks.release(sequence)
        self._blocks.tree.trim(in_use=len(self))

    def release_slot(self, sequence: Sequence) -> None:
        """Gives a sequence's slot back, if it has one."""
        if sequence.slot >= 0:
            self._slots.give_back(sequence.slot)
            sequence.slot = -1

    def release_unborn(self, sequence: Sequence) -> None:
        """Gives the slots back that branches of its request have which have not begun."""
        for branch in sequence.request.branches:
            if branch.state is SequenceState.UNBORN:
                self.release_slot(branch)
