"""Drafters whose guesses are given, for a scripted model. Without torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncengine.generation import SamplingParams
from asyncengine.step.batch import Int32, Int64
from asyncengine.step.slots import SlotTable
from asyncengine.testing import ScriptedModel

EOS = 256


class Scripted:
    """Knows what the model will say, and says what it wants.

    Attributes:
        copies: Of blocks, that it was told of.
        followed: Slots of whose prefill it was told.
    """

    def __init__(self, model: ScriptedModel) -> None:
        self.model = model
        self.copies: list[list[int]] = []
        self.followed: list[int] = []

    def place(self, slot: int, params: SamplingParams, branch: int) -> None:
        pass

    def copy(self, copies: Int64) -> None:
        self.copies += copies.tolist()

    def follow(self, table: SlotTable, slots: Int64) -> None:
        self.followed += slots.tolist()

    def propose(self, table: SlotTable, slots: Int64, lengths: Int64) -> Sequence[Int32]:
        found = []
        for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
            known = table.known_tokens(slot)
            of_text = known >= 0
            tokens = np.array(self.model._tokens[slot])
            assert np.array_equal(known[of_text], tokens[of_text])
            assert (tokens[~of_text] > EOS).all()  # pieces of images
            room = int(table.num_blocks[slot]) * table.page_size
            assert len(known) + length <= room, "there are no blocks for the drafts"
            answer = [*self.model._answer(slot, int(table.adapters[slot])), *[EOS] * length]
            at = len(known) - int(table.prompt_tokens[slot])
            found.append(np.array(self.guess(answer[at : at + length]), dtype=np.int32))
        return found

    def guess(self, right: list[int]) -> list[int]:
        """What is guessed where `right` would be right."""
        raise AssertionError


class Oracle(Scripted):
    """Is always right."""

    def guess(self, right: list[int]) -> list[int]:
        return right


class Liar(Scripted):
    """Is always wrong."""

    def guess(self, right: list[int]) -> list[int]:
        return [(token + 1) % EOS for token in right]


class Guesser(Scripted):
    """Is right, wrong, short and silent, as it comes."""

    def __init__(self, model: ScriptedModel, seed: int) -> None:
        super().__init__(model)
        self.random = np.random.default_rng(seed)

    def guess(self, right: list[int]) -> list[int]:
        length = int(self.random.integers(len(right) + 1))
        return [token if self.random.random() < 0.7 else int(self.random.integers(EOS)) for token in right[:length]]


class Broken(Scripted):
    """Fails."""

    def guess(self, right: list[int]) -> list[int]:
        raise RuntimeError("the drafter is broken")
