"""Sequences that go on from what others have computed: branches of a prompt, beams of a search."""

from __future__ import annotations

import numpy as np

from asyncengine.step.beam_search import Choice
from asyncengine.step.kv_blocks import KVBlocks
from asyncengine.step.residents import Residents
from asyncengine.step.sequence import Sequence, SequenceState
from asyncengine.step.slots import SlotTable


class Branching:
    """Shares blocks that are whole, and copies one that is partly filled before the next step, as both will write to it
    (as the paged blocks of vLLM do, Kwon et al., 2023).
    """

    def __init__(self, slots: SlotTable, blocks: KVBlocks, residents: Residents) -> None:
        self._slots, self._blocks, self._residents = slots, blocks, residents

    def fork(self, trunk: Sequence, branch: Sequence, token_id: int) -> bool:
        """Lets an unborn branch with a slot begin with its first token, on the prompt's blocks that `trunk` computed.

        Returns:
            False if there is no block to be had. The branch has its tokens then, and nothing is computed of them.
        """
        prompt = trunk.request.new.prompt
        branch.tokens = np.append(prompt, np.int32(token_id))
        branch.num_output = 1
        if len(prompt) % self._slots.page_size and not self._blocks.make_room(1):
            return False
        self._go_on_from(trunk, branch, len(prompt))
        if self._blocks.states is not None:
            self._blocks.states.fork(trunk, branch)
        return True

    def branch_out(self, beams: list[Sequence], choices: list[Choice]) -> list[int] | None:
        """Lets the beams of a search, all of which have just been computed, go on with the tokens that were chosen.

        A beam keeps its place with the first of its choices. Where there are more, beams of which nothing was chosen
        take them on.

        Args:
            beams: All of the search, with slots.
            choices: Which beam goes on with which token.

        Returns:
            Which beam each choice has become; None if there are no blocks for them. Beams of which nothing was chosen
            have left the steps then, and the others stand where they stood.
        """
        keeps: dict[int, int] = {}
        for at, choice in enumerate(choices):
            keeps.setdefault(choice.beam, at)
        free = [beam for beam in beams if beam.branch not in keeps]
        for beam in free:
            if beam.resident:
                self._residents.leave(beam)
                beam.state = SequenceState.UNBORN
        computed = int(self._slots.num_computed[beams[choices[0].beam].slot])
        more = len(choices) - len(keeps)
        if computed % self._slots.page_size and not self._blocks.make_room(more):
            return None
        became = [choice.beam for choice in choices]
        for at, choice in enumerate(choices):
            if keeps[choice.beam] != at:
                trunk, beam = beams[choice.beam], free.pop()
                beam.tokens = self._slots.known_tokens(trunk.slot).copy()
                self._go_on_from(trunk, beam, computed)
                if self._blocks.states is not None:
                    self._blocks.states.hand(trunk, beam)
                became[at] = beam.branch
        slots = np.array([beams[at].slot for at in became], dtype=np.int64)
        self._slots.append_tokens(slots, np.array([choice.token_id for choice in choices], dtype=np.int32))
        self._residents.look_again()
        return became

    def _go_on_from(self, trunk: Sequence, branch: Sequence, computed: int) -> None:
        """Gives a branch with a slot what another sequence has computed; there is room for a block that is copied."""
        shared, rest = divmod(computed, self._slots.page_size)
        table = self._slots.blocks[trunk.slot, : shared + bool(rest)]
        self._residents.fill(branch, branch.slot)
        self._blocks.share(branch, table[:shared])
        if rest:
            self._blocks.copy(int(table[shared]), branch)
        self._slots.num_computed[branch.slot] = computed
        branch.weight_version = trunk.weight_version
        self._residents.decode(branch)
