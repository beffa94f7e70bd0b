"""Which states of sequences are kept, and when, for models that have some beside keys and values. Owned by the step
thread.

Such a state (of a state-space layer, say) is of exactly the tokens that were computed so far: it cannot be cut back, so
a sequence can begin only where one was kept. That is done at the ends of blocks, for the prefix tree:

* where the prompt's last whole block ends before its last token: who asks again goes on there;
* where more of a prompt is known than its deepest state allows to use: two have the same beginning, and others will
  (Marconi, Pan et al., 2025; SGLang's MambaRadixCache);
* behind the last block that a sequence has computed, over and over in one place of its own. The tree gets it when the
  sequence leaves the steps: the next turn of a conversation goes on there. In a step with drafts that is done where the
  tokens turn out to count.

A state goes to the tree like the blocks before it, once the step that saves it is settled. What a step overwrites that
is under way is not believed to be what it was. Copies come first in a step: a place may be saved to in the step that
copies from it, and not before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from asyncengine.step.batch import NO_PAIRS, NO_SAVES, Int32, Int64
from asyncengine.step.decode_rows import DecodeRows
from asyncengine.step.drafting import Drafts
from asyncengine.step.limits import Limits
from asyncengine.step.plan import Chunk, StateMoves
from asyncengine.step.prefix_tree import PrefixTree
from asyncengine.step.sequence import Sequence
from asyncengine.step.slots import SlotTable
from asyncengine.step.state_places import StatePlaces


@dataclass(slots=True)
class _Own:
    """What a sequence has saved, or will.

    Attributes:
        due: Numbers of tokens, ascending, behind which its state is to be saved for the tree.
        saved: Numbers of tokens, and the places of their states; they wait for their step to be settled.
        rolling: The place that is written over; None while it has none.
        rolled: Behind how many tokens that was done last; 0 if it was not.
        guessed: Numbers of tokens, ascending, behind which a step with drafts does it as far as they count. While that
            is under way, `rolled` is the first of them.
        before: Behind how many tokens that was done before that step.
    """

    due: tuple[int, ...] = ()
    saved: list[tuple[int, int]] = field(default_factory=list)
    rolling: int | None = None
    rolled: int = 0
    guessed: tuple[int, ...] = ()
    before: int = 0

    @property
    def places(self) -> list[int]:
        """All that it holds."""
        return [*(place for _, place in self.saved), *(() if self.rolling is None else (self.rolling,))]


class KeptStates:
    """Chooses them.

    Args:
        limits: What the model can take; it keeps states.
        slots: What is known of the sequences.
        places: Where states can be kept.
        tree: Which of them are known.
    """

    def __init__(self, limits: Limits, slots: SlotTable, places: StatePlaces, tree: PrefixTree) -> None:
        self.places = places
        self._reuses = limits.reuses_prefixes
        self._page_size = limits.page_size
        self._slots = slots
        self._tree = tree
        self._own: dict[Sequence, _Own] = {}  # without those whose states are of no use to others
        self._copies: list[tuple[int, Sequence]] = []  # from where, for whom; due in the next batch
        self._handed: list[tuple[Sequence, Sequence]] = []  # from whom, for whom; due in the next batch

    def look(self, sequence: Sequence) -> tuple[Int32, tuple[int, ...]]:
        """The cached blocks that a sequence can begin with, and behind how many tokens it will save states."""
        request, tokens = sequence.request, sequence.tokens[:-1]  # the last token is always computed
        known = self._tree.match(tokens, request.space)
        usable = deepest = self.places.deepest(known)
        if request.unscored:  # of its other tokens, logits or hidden states are wanted
            usable = self.places.deepest(known[: request.unscored_from // self._page_size])
        blocks = {len(known)}
        if request.arriving is None and len(sequence.tokens) == len(request.new.prompt):
            blocks.add(len(tokens) // self._page_size)
        return known[:usable], tuple(count * self._page_size for count in sorted(blocks) if count > deepest)

    def begin(self, sequence: Sequence, cached: Int32, due: tuple[int, ...]) -> None:
        """Lets a sequence with a slot go on behind blocks that `look` has found."""
        if len(cached):
            place = self.places.at(int(cached[-1]))
            self.places.retain(place)
            self._copies.append((place, sequence))
        if self._reuses:
            self._own[sequence] = _Own(due)

    def fork(self, trunk: Sequence, branch: Sequence) -> None:
        """Lets a branch go on with the state that was saved for it."""
        if trunk in self._own:
            self._own[branch] = _Own()

    def hand(self, trunk: Sequence, branch: Sequence) -> None:
        """Lets a branch go on with the state that another sequence has; the next batch copies it."""
        self._handed.append((trunk, branch))
        self.fork(trunk, branch)

    def moves(self, rows: DecodeRows, chunks: list[Chunk], drafts: Drafts | None = None) -> StateMoves:
        """What the batch that is built now copies and saves; it counts as under way."""
        copies, saves = NO_PAIRS, NO_SAVES
        if self._copies:
            copies = np.array([(place, sequence.slot) for place, sequence in self._copies], dtype=np.int64)
            for place, _ in self._copies:
                self.places.release(place)
            self._copies.clear()
        if self._handed:
            handed = [(trunk.slot, branch.slot) for trunk, branch in self._handed]
            copies = np.concatenate([copies, np.array(handed, dtype=np.int64)])
            self._handed.clear()
        in_chunks = [(row, *save) for row, chunk in enumerate(chunks, len(rows.slots)) for save in self._of(chunk)]
        decoded: list[tuple[int, int, int]] = []
        if self._own:
            decoded = self._of_decodes(rows) if drafts is None else self._of_drafts(rows, drafts)
        if decoded or in_chunks:
            saves = np.array([*decoded, *in_chunks], dtype=np.int64)
        return StateMoves(copies, saves)

    def settle(self, sequences: list[Sequence], taken: Int64) -> None:
        """Notes how many tokens of each sequence count, of a step with drafts."""
        for sequence, count in zip(sequences, taken.tolist(), strict=True):
            own = self._own.get(sequence)
            if own is not None and own.guessed:
                computed = int(self._slots.num_computed[sequence.slot]) - 1 + count  # one was taken to count
                own.rolled = max((position for position in own.guessed if position <= computed), default=own.before)
                own.guessed = ()

    def publish(self, sequence: Sequence, known: Int32, settled: int, *, leaves: bool) -> None:
        """Makes states of a sequence known to the tree.

        Args:
            sequence: Which.
            known: The tree's blocks of its tokens.
            settled: How many of the tokens have been computed, beyond doubt.
            leaves: Whether it leaves the steps.
        """
        own = self._own.get(sequence)
        if own is None:
            return
        for position, place in own.saved:
            if position <= settled:
                self._tree.keep(int(known[position // self._page_size - 1]), place)
        own.saved = [save for save in own.saved if save[0] > settled]
        if leaves and own.rolling is not None and 0 < own.rolled <= settled:
            self._tree.keep(int(known[own.rolled // self._page_size - 1]), own.rolling)
            own.rolling = None

    def release(self, sequence: Sequence) -> None:
        """Takes from a sequence what it holds, and the copy that it waits for."""
        own = self._own.pop(sequence, None)
        for place in () if own is None else own.places:
            self.places.release(place)
        for place, other in self._copies:
            if other is sequence:
                self.places.release(place)
        self._copies = [copy for copy in self._copies if copy[1] is not sequence]
        self._handed = [handed for handed in self._handed if sequence not in handed]

    def forget(self) -> None:
        """Notes that what the running sequences compute will be of no use to others. Copies stay due."""
        for own in self._own.values():
            for place in own.places:
                self.places.release(place)
        self._own.clear()

    def check(self) -> None:
        """Compares all accounts with each other.

        Raises:
            AssertionError: They disagree.
        """
        own = [place for own in self._own.values() for place in own.places]
        self.places.check([*own, *(place for place, _ in self._copies), *self._tree.pinned_states])

    def check_idle(self) -> None:
        """Compares what can be compared at once while nothing runs: only what is pinned may be in use.

        Raises:
            AssertionError: Places are used that nobody holds.
        """
        used, pinned = self.places.num_used, len(self._tree.pinned_states)
        assert not self._own and not self._copies and not self._handed, "sequences that are gone hold states"
        assert 0 <= used <= pinned, f"{used} places of states are used while nothing runs"

    def _of(self, chunk: Chunk) -> list[tuple[int, int]]:
        """(tokens of the chunk, place) of each save; tokens ascend."""
        computed = int(self._slots.num_computed[chunk.sequence.slot])
        end = computed + chunk.count
        saves: list[tuple[int, int]] = []
        own = self._own.get(chunk.sequence)
        if own is not None:
            for position in own.due:
                if computed < position <= end and (place := self.places.take()) is not None:
                    own.saved.append((position, place))
                    saves.append((position - computed, place))
            boundary = end - end % self._page_size
            at_boundary = saves and saves[-1][0] == boundary - computed
            if boundary > computed and not at_boundary and (place := self._roll(own, boundary)) is not None:
                saves.append((boundary - computed, place))
        saves += [(chunk.count, branch.slot) for branch in chunk.branches[1:]]
        return saves

    def _of_decodes(self, rows: DecodeRows) -> list[tuple[int, int, int]]:
        """(row, 1, place) of each row whose token is the last of a block."""
        saves: list[tuple[int, int, int]] = []
        for row in rows.completing().tolist():
            sequence = rows.sequences[row]
            own = self._own.get(sequence)
            if own is not None:
                place = self._roll(own, int(self._slots.num_computed[sequence.slot]) + 1)
                if place is not None:
                    saves.append((row, 1, place))
        return saves

    def _of_drafts(self, rows: DecodeRows, drafts: Drafts) -> list[tuple[int, int, int]]:
        """(row, tokens of the row, place) of each save at an end of a block, whether or not its tokens will count."""
        saves: list[tuple[int, int, int]] = []
        computed = self._slots.num_computed[rows.slots]
        first = computed // self._page_size + 1  # the first block that may be completed
        last = (computed + 1 + drafts.lengths) // self._page_size
        for row in np.flatnonzero(first <= last).tolist():
            own = self._own.get(rows.sequences[row])
            if own is None:
                continue
            before = own.rolled
            ends = tuple(block * self._page_size for block in range(int(first[row]), int(last[row]) + 1))
            place = self._roll(own, ends[0])
            if place is not None:
                own.guessed, own.before = ends, before
                saves += [(row, end - int(computed[row]), place) for end in ends]
        return saves

    def _roll(self, own: _Own, position: int) -> int | None:
        """The sequence's own place, which will have its state behind `position` tokens; None if it can get none."""
        if own.rolling is None:
            own.rolling = self.places.take()
        if own.rolling is not None:
            own.rolled = position
        return own.rolling
